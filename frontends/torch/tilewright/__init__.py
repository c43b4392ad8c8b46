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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright import llm
    from tilewright.explain import Explanation, explain
    from tilewright.exported import optimize
    from tilewright.stats import stats

__all__ = ["Explanation", "explain", "llm", "optimize", "stats"]


def __getattr__(name: str) -> Any:
    if name == "llm":
        return importlib.import_module("tilewright.llm")
    homes = {"Explanation": "explain", "optimize": "exported"}
    home = homes.get(name, name if name in ("explain", "stats") else None)
    if home is not None:
        module = importlib.import_module(f"tilewright.{home}")
        # The submodule and the function share a name: the function is what users mean.
        if home in __all__:
            globals()[home] = getattr(module, home)
        return getattr(module, name)
    raise AttributeError(f"module 'tilewright' has no attribute '{name}'")
