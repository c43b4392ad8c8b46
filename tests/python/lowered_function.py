"""Runs a function through torch.compile, our capture and lowering, and the graph evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graph_evaluator
from tilewright import capture, lower
from tilewright.lowered import Lowered


class LoweredFunction:
    """`compiled(...)` computes with the lowered graphs; `graphs` keeps them."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None = None) -> None:
        self.graphs: list[Lowered] = []
        self.compiled = torch.compile(function, backend=self.backend, dynamic=dynamic)

    def backend(self, gm: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        lowered = lower.lower(capture.from_dynamo(gm, inputs))
        self.graphs.append(lowered)

        def run(*arguments: Any) -> Any:
            symbols = lowered.symbols(arguments)
            tensors = [arguments[i] for i in lowered.inputs]
            tensors += [torch.empty(symbols[n], 0, dtype=torch.uint8) for n in lowered.shape_inputs]
            with torch.no_grad():
                results = graph_evaluator.evaluate(lowered.text, lowered.constants, tensors)
            results = [r.clone(memory_format=torch.contiguous_format) for r in results]
            leaves = [output.make(results, arguments, symbols) for output in lowered.outputs]
            return pytree.tree_unflatten(leaves, lowered.output_tree)

        return run

    @property
    def externals(self) -> list[str]:
        return [name for graph in self.graphs for name, _ in graph.externals]

    def ops(self) -> list[str]:
        return [
            line.op for graph in self.graphs for line in graph_evaluator.parse(graph.text).lines
        ]


def check(
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> LoweredFunction:
    """Eager and lowered give the same values, types and strides, and write inputs alike."""
    torch._dynamo.reset()
    copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    lowered = LoweredFunction(function, dynamic)
    with torch.no_grad():
        expected = function(*inputs)
        actual = lowered.compiled(*copies)
    assert lowered.graphs, "nothing was compiled"
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(copies, inputs, rtol=rtol, atol=atol)
    for ours, theirs in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.stride() == theirs.stride(), (ours.stride(), theirs.stride())
    return lowered
