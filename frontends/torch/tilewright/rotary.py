"""Rotary tables that a model computes anew when sequences outgrow it: dynamic NTK scaling.

transformers' rotary modules decide that in each forward, from the positions' values, which a trace
cannot follow. A program is captured with the table as it is; a call at whose length the module
would change it goes to the module's own forward, which does. That is rare: within the length that
the model was made for nothing changes.

Tested by tests/python/test_generate.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_UPDATES = "transformers.modeling_rope_utils"  # where the decorator is defined


def growing_tables(model: nn.Module) -> list[Any]:
    """The model's modules with such a table. Others of the same words are their own affair."""
    return [
        module
        for module in model.modules()
        if isinstance(kind := getattr(module, "rope_type", None), str)
        and "dynamic" in kind
        and _is_updated_by_transformers(type(module).forward)
    ]


def _is_updated_by_transformers(forward: Any) -> bool:
    """Whether one of the decorators of a forward is transformers' update of tables."""
    while forward is not None:
        if getattr(forward, "__globals__", {}).get("__name__") == _UPDATES:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def would_change(module: Any, length: int) -> bool:
    """Whether the module's forward, at positions up to `length`, replaces its table."""
    known, original = int(module.max_seq_len_cached), int(module.original_max_seq_len)
    return length > known or (length < original and known > original)


@contextmanager
def as_they_are(modules: Sequence[Any]) -> Iterator[None]:
    """While it lasts, forwards use the tables without a look at the positions."""
    kinds = [module.rope_type for module in modules]
    for module in modules:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.rope_type = kind
