"""Systems inside PyTorch: eager, Tilewright in its three uses, Inductor, IPEX, zentorch.

All go through transformers' generate, as their users do; a streamer notes when each token came.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Any

from bench_models import engines


class _Stamps:
    """A streamer that notes the time of each token; the first call is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, _tokens: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Engine:
    """See the package's description."""

    def __init__(self) -> None:
        self._details: dict[str, float] = {}
        self._extra: dict[str, Any] = {}
        self._mode = ""

    def imports(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._auto = AutoModelForCausalLM
        self._torch = torch

    def load(self, request: dict[str, Any]) -> None:
        torch = self._torch
        self._mode = mode = request["mode"]
        threads = int(os.environ["BENCH_THREADS"])
        torch.set_num_threads(threads)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[
            request["dtype"]
        ]
        keyword = "torch_dtype" if mode == "ipex" else "dtype"
        begin = time.time()
        model = self._auto.from_pretrained(request["model"], **{keyword: self._dtype}).eval()
        self._details["weights"] = time.time() - begin
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        self._original = model
        self._model = getattr(self, f"_prepare_{mode}")(model)

    def _prepare_eager(self, model: Any) -> Any:
        return model

    def _prepare_optimize(self, model: Any) -> Any:
        begin = time.time()
        import tilewright

        self._details["import_tilewright"] = time.time() - begin
        _watch_tilewright(self._details)
        return tilewright.llm.optimize(model, inplace=True)

    def _prepare_compile(self, model: Any) -> Any:
        _watch_tilewright(self._details)
        model.compile(backend=_tilewright_backend())
        return model

    def _prepare_both(self, model: Any) -> Any:
        return self._torch.compile(self._prepare_optimize(model), backend=_tilewright_backend())

    def _static(self, model: Any, backend: str, **settings: bool) -> Any:
        """Compiled, with the cache that Inductor's graphs need to be reused."""
        import torch._inductor.config as inductor

        for name, value in settings.items():
            setattr(inductor, name, value)
        model.forward = self._torch.compile(model.forward, backend=backend)
        self._extra = {"cache_implementation": "static", "disable_compile": True}
        return model

    def _prepare_inductor(self, model: Any) -> Any:
        return self._static(model, "inductor")

    def _prepare_inductor_freezing(self, model: Any) -> Any:
        return self._static(model, "inductor", freezing=True)

    def _prepare_inductor_max_autotune(self, model: Any) -> Any:
        return self._static(model, "inductor", freezing=True, max_autotune=True)

    def _prepare_zentorch(self, model: Any) -> Any:
        import zentorch  # noqa: F401

        return self._static(model, "zentorch")

    def _prepare_zentorch_freezing(self, model: Any) -> Any:
        import zentorch  # noqa: F401

        return self._static(model, "zentorch", freezing=True)

    def _prepare_ipex(self, model: Any) -> Any:
        import intel_extension_for_pytorch as ipex

        return ipex.llm.optimize(model, dtype=self._dtype, inplace=True, deployment_mode=True)

    def _context(self) -> AbstractContextManager[Any]:
        wanted = self._mode == "ipex" and self._dtype == self._torch.bfloat16
        return self._torch.autocast("cpu", dtype=self._torch.bfloat16, enabled=wanted)

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        torch = self._torch
        ids = torch.tensor(prompts)
        stamps = _Stamps()
        start = time.perf_counter()
        with torch.inference_mode(), self._context():
            result = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                streamer=stamps,
                **self._extra,
            )
        assert len(stamps.times) == new, f"{len(stamps.times)} tokens instead of {new}"
        return engines.timed_result(start, stamps.times, result[:, ids.shape[1] :].tolist())

    def logits(self, tokens: list[int], path: str) -> None:
        import numpy

        torch = self._torch
        with torch.inference_mode(), self._context():
            result = self._model(torch.tensor([tokens]))
        logits = result[0] if isinstance(result, tuple) else result.logits
        numpy.save(path, logits[0].double().numpy().astype("float32"))

    def precision(self) -> dict[str, str]:
        name = str(self._dtype).removeprefix("torch.")
        arithmetic = name
        if self._mode in ("optimize", "compile", "both") and name == "bfloat16":
            arithmetic = "bfloat16 weights, float32 arithmetic"
        return {
            "weights": name,
            "activations": name,
            "arithmetic": arithmetic,
            "kv": name,
            "head": name,
        }

    def versions(self) -> dict[str, str]:
        found = engines.installed(
            "torch", "transformers", "intel-extension-for-pytorch", "zentorch", "tilewright"
        )
        if self._mode in ("optimize", "compile", "both"):
            found.setdefault("tilewright", "source tree")
        return found

    def start_details(self) -> dict[str, Any]:
        details: dict[str, Any] = dict(self._details)
        if self._mode in ("optimize", "compile", "both"):
            import tilewright

            explanation = tilewright.explain(self._model).to_dict()
            details["emission"] = explanation["emit_seconds"]
            details["kernels_emitted"] = explanation["kernels_emitted"]
            details["kernels_loaded"] = explanation["kernels_loaded"]
            details["own_flops_share"] = explanation["own_flops_share"]
            details["notes"] = explanation["notes"]
            details["isa"] = explanation["target"].get("isa", "")
            # Building a program is passes, layouts, emission and packing of the weights.
            building = details.pop("building", 0.0)
            if "capture" in details:  # a plan is sought, or made, and built in one
                details["capture"] = max(0.0, details["capture"] - building)
            details["passes_and_packing"] = max(0.0, building - details["emission"])
        return details


def _tilewright_backend() -> Any:
    """What the name "tilewright" stands for. Dynamo finds the name by the entry points of an
    installed package, and a build that lies on the path only has none."""
    from tilewright.backend import backend

    return backend


def _watch_tilewright(details: dict[str, float]) -> None:
    """Adds up how long capturing and building take, where the package has these functions."""

    def watched(owner: Any, name: str, key: str) -> None:
        function = getattr(owner, name, None)
        if function is None:
            return

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                details[key] = details.get(key, 0.0) + time.perf_counter() - begin

        setattr(owner, name, timed)

    from tilewright import decoder, program

    watched(decoder, "planned_model", "capture")
    watched(program.Executable, "bind", "building")
