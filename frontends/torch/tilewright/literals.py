"""Literals: what a captured graph computes from numbers alone, such as the slopes of ALiBi.

PyTorch computes them once, at capture, so that the bits are PyTorch's own; lower.py makes constants
of them where the op has no lowering. A result that depends on an input, on a weight (it may change
later), on a symbolic size or on chance is none.

Tested by tests/python/test_lower.py.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright.outputs import storage_key

_MOST_ELEMENTS = 4096  # more is worth a kernel


class Literals:
    """Of one captured graph."""

    def __init__(self, gm: GraphModule) -> None:
        self._known: dict[Node, torch.Tensor | None] = {}
        self._written: set[int] = set()  # storages that some call of the graph writes
        for node in gm.graph.nodes:
            if _is_call(node) and node.target._schema.is_mutable:
                values = (x.meta.get("val") for x in node.all_input_nodes)
                self._written |= {storage_key(x) for x in values if isinstance(x, torch.Tensor)}

    def value(self, node: Node) -> torch.Tensor | None:
        """The tensor that `node` always is, or None."""
        if node not in self._known:
            self._known[node] = None
            if self._is_literal(node):
                with torch.no_grad():
                    args, kwargs = pytree.tree_map_only(
                        Node, self._known.get, (node.args, dict(node.kwargs))
                    )
                    self._known[node] = node.target(*args, **kwargs)
        return self._known[node]

    def _is_literal(self, node: Node) -> bool:
        fake: Any = node.meta.get("val")
        if not _is_call(node) or not isinstance(fake, torch.Tensor):
            return False
        target: Any = node.target
        sizes = [*fake.shape, *pytree.tree_leaves((node.args, node.kwargs))]
        return (
            not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
            and not any(isinstance(size, torch.SymInt) for size in sizes)
            and fake.numel() <= _MOST_ELEMENTS
            and storage_key(fake) not in self._written
            and all(self.value(operand) is not None for operand in node.all_input_nodes)
        )


def name_of(tensor: torch.Tensor) -> str:
    """Equal for equal values only: graphs traced at several sizes are compared by names."""
    content = (str(tensor.dtype), tuple(tensor.shape), tensor.tolist())
    return f"literal.{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}"


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
