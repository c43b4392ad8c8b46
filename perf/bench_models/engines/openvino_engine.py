"""OpenVINO: the stateful model that optimum-intel exports, run with OpenVINO's own runtime.

Precision is set, not left to the default, which would pick bf16 arithmetic and 8-bit keys and
values by itself; what the runtime then says it uses is reported.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from bench_models import engines

# int8 and int4 are weight compression; arithmetic and cache stay at what plain models use.
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32", "int4": "f32"}
CACHES = {"fp32": "f32", "bf16": "bf16", "int8": "f16", "int4": "f16"}


class Engine:
    """See the package's description."""

    def imports(self) -> None:
        import numpy
        import openvino

        self._numpy = numpy
        self._openvino = openvino

    def convert(self, request: dict[str, Any]) -> None:
        """Exports once, beside the other made models."""
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        target = Path(request["converted"])
        if target.exists():
            return
        compression = {
            "int8": lambda: OVWeightQuantizationConfig(bits=8, sym=True),
            "int4": lambda: OVWeightQuantizationConfig(bits=4, sym=True, group_size=64),
        }.get(request["dtype"], lambda: None)()
        keywords = {"load_in_8bit": False} if compression is None else {}
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        model = OVModelForCausalLM.from_pretrained(
            request["model"],
            export=True,
            compile=False,
            quantization_config=compression,
            **keywords,
        )
        model.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)

    def load(self, request: dict[str, Any]) -> None:
        core = self._openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[request["dtype"]],
            "KV_CACHE_PRECISION": CACHES[request["dtype"]],
            "INFERENCE_NUM_THREADS": int(os.environ["BENCH_THREADS"]),
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_DIR": os.environ["BENCH_CACHE_DIR"],
        }
        model = core.read_model(str(Path(request["converted"]) / "openvino_model.xml"))
        try:
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError:
            # Not every CPU has every type of cache; the runtime then chooses.
            del settings["KV_CACHE_PRECISION"]
            compiled = core.compile_model(model, "CPU", settings)
        self._compiled = compiled
        self._dtype = request["dtype"]
        self._request = compiled.create_infer_request()
        self._names = {name.get_any_name() for name in compiled.inputs}

    def _step(self, ids: Any, past: int) -> Any:
        numpy = self._numpy
        batch, tokens = ids.shape
        positions = numpy.arange(past, past + tokens, dtype=numpy.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": numpy.ones((batch, past + tokens), numpy.int64),
            "position_ids": numpy.broadcast_to(positions, (batch, tokens)).copy(),
            "beam_idx": numpy.arange(batch, dtype=numpy.int32),
        }
        self._request.infer({k: v for k, v in inputs.items() if k in self._names})
        return self._request.get_output_tensor(0).data

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        numpy = self._numpy
        ids = numpy.array(prompts, numpy.int64)
        stamps, chosen = [], []
        start = time.perf_counter()
        self._request.reset_state()
        past = 0
        for _ in range(new):
            logits = self._step(ids, past)
            past += ids.shape[1]
            ids = logits[:, -1].argmax(-1).astype(numpy.int64).reshape(-1, 1)
            chosen.append(ids)
            stamps.append(time.perf_counter())
        return engines.timed_result(start, stamps, numpy.concatenate(chosen, 1).tolist())

    def logits(self, tokens: list[int], path: str) -> None:
        self._request.reset_state()
        ids = self._numpy.array([tokens], self._numpy.int64)
        result = self._step(ids, 0)[0]
        if len(result) != len(tokens):
            raise RuntimeError("the exported model gives the last token's logits only")
        self._numpy.save(path, result.astype("float32"))

    def precision(self) -> dict[str, str]:
        def told(name: str) -> str:
            try:
                value = self._compiled.get_property(name)
            except RuntimeError:
                return "not told"
            return str(getattr(value, "get_type_name", lambda: value)())

        arithmetic = told("INFERENCE_PRECISION_HINT")
        # Plain weights are kept in the type of the arithmetic: fp32 on a CPU without bf16 products.
        weights = {"int8": "int8 sym", "int4": "int4 g64"}.get(self._dtype, arithmetic)
        head = {"int8": "int8", "int4": "int8"}.get(self._dtype, arithmetic)
        return {
            "weights": weights,
            "activations": arithmetic,
            "arithmetic": arithmetic,
            "kv": told("KV_CACHE_PRECISION"),
            "head": head,
        }

    def versions(self) -> dict[str, str]:
        return engines.installed("openvino", "optimum-intel", "nncf", "transformers", "torch")

    def start_details(self) -> dict[str, Any]:
        return {}
