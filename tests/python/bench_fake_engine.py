"""An engine with a clock of its own, for tests of the benchmark: no model, no real time.

Its time per token is a base, a slow drift, noise, and the factor that the module `planted_slowdown`
(if one is on the path) says; its logits have the error that the load request's mode names.
"""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy

VOCABULARY = 512


class Engine:
    """See bench_models.engines."""

    def __init__(self) -> None:
        self._calls = 0

    def imports(self) -> None:
        try:
            self._factor = importlib.import_module("planted_slowdown").FACTOR
        except ImportError:
            self._factor = 1.0

    def load(self, request: dict[str, Any]) -> None:
        self._mode = request["mode"]
        if self._mode == "broken":
            raise RuntimeError("this one cannot load") from OSError("libmissing.so: no such file")
        self._random = random.Random(self._mode)

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        self._calls += 1
        seconds = self._factor * (1 + 0.01 * self._calls) * self._random.uniform(0.98, 1.02)
        return {
            "first_seconds": 0.1 * seconds,
            "decode_seconds": 0.01 * seconds,
            "token_seconds": [],
            "tokens": [[(sum(prompt) + i) % VOCABULARY for i in range(new)] for prompt in prompts],
        }

    def logits(self, tokens: list[int], path: str) -> None:
        generator = numpy.random.default_rng(0)
        logits = generator.normal(size=(len(tokens), VOCABULARY))
        if self._mode == "erroneous":
            logits = logits + 0.02 * generator.normal(size=logits.shape)
        numpy.save(path, logits.astype("float32"))

    def precision(self) -> dict[str, str]:
        return dict.fromkeys(("weights", "activations", "arithmetic", "kv", "head"), "float32")

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def start_details(self) -> dict[str, Any]:
        return {}
