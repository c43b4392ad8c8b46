"""Tilewright: a JIT runtime for LLM inference on x86 CPUs.

    model = tilewright.llm.optimize(model, dtype=torch.bfloat16, inplace=True)
    model = torch.compile(model, backend="tilewright")
    out = model.generate(**inputs)

Each of the two lines works alone. Importing this package reads no file, starts no thread and
imports no torch.

Tested by tests/python/test_packaging.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright import llm
    from tilewright.compare import Comparison, compare
    from tilewright.explain import Explanation, explain
    from tilewright.exported import optimize
    from tilewright.stats import stats

__all__ = ["Comparison", "Explanation", "compare", "explain", "llm", "optimize", "stats"]

_HOMES = {
    "Comparison": "compare",
    "compare": "compare",
    "Explanation": "explain",
    "explain": "explain",
    "optimize": "exported",
    "stats": "stats",
}


def __getattr__(name: str) -> Any:
    if name == "llm":
        return importlib.import_module("tilewright.llm")
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute '{name}'")
    importlib.import_module(f"tilewright.{_HOMES[name]}")
    # A submodule and its function share a name, and one submodule imports another: the functions
    # are what users mean.
    for public, home in _HOMES.items():
        if (module := sys.modules.get(f"tilewright.{home}")) is not None:
            globals()[public] = getattr(module, public)
    return globals()[name]
