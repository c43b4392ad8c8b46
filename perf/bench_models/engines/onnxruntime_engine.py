"""ONNX Runtime through onnxruntime-genai: its model builder makes the model, its generator runs it.

int4 uses blocks of 32 and accuracy level 4, i.e. 8-bit activations, which is its fast path.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_models import engines


def _with_tokenizer(model: Path, folder: Path) -> Path:
    """The same model with a tokenizer, which the builder insists on and nobody here uses."""
    import tokenizers

    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    if not (folder / "tokenizer.json").exists():
        words = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
        tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Engine:
    """See the package's description."""

    def imports(self) -> None:
        import numpy
        import onnxruntime_genai

        self._numpy = numpy
        self._genai = onnxruntime_genai

    def convert(self, request: dict[str, Any]) -> None:
        target = Path(request["converted"])
        if target.exists():
            return
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        source = _with_tokenizer(Path(request["model"]), Path(f"{partial}.source"))
        command += ["-i", str(source), "-o", str(partial), "-p", request["dtype"]]
        command += ["-e", "cpu", "-c", f"{partial}.cache"]
        if request["dtype"] == "int4":
            command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for made in (f"{partial}.cache", f"{partial}.source"):
            shutil.rmtree(made, ignore_errors=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(f"the model builder failed: {lines[-1] if lines else 'silently'}")
        partial.rename(target)

    def load(self, request: dict[str, Any]) -> None:
        self._dtype = request["dtype"]
        config = self._genai.Config(request["converted"])
        threads = int(os.environ["BENCH_THREADS"])
        if hasattr(config, "overlay"):
            session = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = self._genai.Model(config)

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        length = len(prompts[0])
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(
            do_sample=False,
            max_length=length + new,
            min_length=length + new,
            batch_size=len(prompts),
        )
        stamps = []
        start = time.perf_counter()
        generator = self._genai.Generator(self._model, settings)
        generator.append_tokens(self._numpy.array(prompts, self._numpy.int32))
        for _ in range(new):
            generator.generate_next_token()
            stamps.append(time.perf_counter())
        tokens = [
            [int(token) for token in generator.get_sequence(row)[length : length + new]]
            for row in range(len(prompts))
        ]
        return engines.timed_result(start, stamps, tokens)

    def logits(self, tokens: list[int], path: str) -> None:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(do_sample=False, max_length=len(tokens) + 1)
        generator = self._genai.Generator(self._model, settings)
        rows = []
        for token in tokens:
            generator.append_tokens(self._numpy.array([[token]], self._numpy.int32))
            rows.append(generator.get_logits().reshape(-1).copy())
        self._numpy.save(path, self._numpy.stack(rows).astype("float32"))

    def precision(self) -> dict[str, str]:
        weights = {"fp32": "float32", "int4": "int4 g32"}[self._dtype]
        activations = {"fp32": "float32", "int4": "int8 (accuracy level 4)"}[self._dtype]
        return {
            "weights": weights,
            "activations": activations,
            "arithmetic": activations,
            "kv": "float32",
            "head": weights,
        }

    def versions(self) -> dict[str, str]:
        return engines.installed("onnxruntime", "onnxruntime-genai")

    def start_details(self) -> dict[str, Any]:
        return {}
