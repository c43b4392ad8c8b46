"""llama.cpp through the plain functions of llama-cpp-python: tokens in, logits out, greedy.

Keys and values are fp16 as llama.cpp's users have them; for fp32 cells they are fp32.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from bench_models import engines

CACHE_TYPES = {"fp32": "F32", "bf16": "F16", "int8": "F16", "int4": "F16"}


class Engine:
    """See the package's description."""

    def imports(self) -> None:
        import llama_cpp
        import numpy

        self._lib = llama_cpp
        self._numpy = numpy

    def load(self, request: dict[str, Any]) -> None:
        lib = self._lib
        threads = int(os.environ["BENCH_THREADS"])
        self._dtype = request["dtype"]
        lib.llama_backend_init()
        quiet = lib.llama_log_callback(lambda *_: None)
        self._quiet = quiet  # the library keeps no reference
        lib.llama_log_set(quiet, ctypes.c_void_p(0))
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(request["converted"].encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context: Any = None
        self._sequences = 0
        self._longest = request["longest"]
        self._open(len(request["prompts"]))

    def _open(self, sequences: int) -> None:
        """A context for this many sequences; a fixed size would cost the small batches."""
        lib = self._lib
        if self._context is not None and self._sequences == sequences:
            return
        if self._context is not None:
            lib.llama_free(self._context)
        settings = lib.llama_context_default_params()
        settings.n_ctx = sequences * (self._longest + 64)
        # Every prompt in one call: of more tokens than this the library ends the process.
        settings.n_batch = max(4096, sequences * self._longest)
        settings.n_ubatch = 512
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.type_k = settings.type_v = getattr(
            lib,
            f"GGML_TYPE_{CACHE_TYPES[self._dtype]}",
            {"F32": 0, "F16": 1}[CACHE_TYPES[self._dtype]],
        )
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._sequences = sequences

    def _decode(self, rows: list[list[int]], past: int, all_logits: bool = False) -> list[int]:
        """Runs one step of all sequences; returns where the last logits of each are."""
        lib = self._lib
        count = sum(len(row) for row in rows)
        batch = lib.llama_batch_init(count, 0, 1)
        last, at = [], 0
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row):
                batch.token[at] = token
                batch.pos[at] = past + position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = all_logits or position == len(row) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = count
        code = lib.llama_decode(self._context, batch)
        lib.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return last

    def _logits(self, index: int) -> Any:
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        return self._numpy.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        self._open(len(prompts))
        stamps: list[float] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter()
        self._clear()
        rows, past = prompts, 0
        for _ in range(new):
            last = self._decode(rows, past)
            past += len(rows[0])
            rows = [[int(self._logits(index).argmax())] for index in last]
            for kept, row in zip(tokens, rows):  # noqa: B905 - Python 3.9 engines
                kept += row
            stamps.append(time.perf_counter())
        return engines.timed_result(start, stamps, tokens)

    def logits(self, tokens: list[int], path: str) -> None:
        self._open(1)
        self._clear()
        self._decode([tokens], 0, all_logits=True)
        rows = [self._logits(index).copy() for index in range(len(tokens))]
        self._numpy.save(path, self._numpy.stack(rows))

    def precision(self) -> dict[str, str]:
        weights = {"fp32": "float32", "bf16": "bfloat16", "int8": "Q8_0", "int4": "Q4_0"}
        # Activations are converted to the partner type of the weights before each product.
        activations = {"fp32": "float32", "bf16": "bfloat16", "int8": "Q8_0", "int4": "Q8_0"}
        return {
            "weights": weights[self._dtype],
            "activations": activations[self._dtype],
            "arithmetic": activations[self._dtype],
            "kv": {"F32": "float32", "F16": "float16"}[CACHE_TYPES[self._dtype]],
            "head": weights[self._dtype],
        }

    def versions(self) -> dict[str, str]:
        return engines.installed("llama_cpp_python")

    def start_details(self) -> dict[str, Any]:
        return {"system": self._lib.llama_print_system_info().decode()[:200]}
