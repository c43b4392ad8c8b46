"""How each kind of system loads a model, generates greedily, and says what it computes with.

An engine has: imports(), load(request), generate(prompts, new) -> {"first_seconds",
"decode_seconds" (per further token), "token_seconds", "tokens"}, logits(tokens, path), precision(),
versions(), start_details(), and where a model must be converted first, convert(request).
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from typing import Any


def installed(*packages: str) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed_result(start: float, stamps: list[float], tokens: list[list[int]]) -> dict[str, Any]:
    """The answer to "generate", from the time of each token."""
    steps = len(stamps) - 1
    return {
        "first_seconds": stamps[0] - start,
        "decode_seconds": (stamps[-1] - stamps[0]) / steps if steps else 0.0,
        "token_seconds": [after - before for before, after in itertools.pairwise(stamps)],
        "tokens": tokens,
    }
