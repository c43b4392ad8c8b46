"""Unification: one graph with symbolic sizes from graphs captured at several concrete sizes.

Tested by tests/python/test_capture.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tilewright import graph_text
from tilewright.dims import Dim
from tilewright.graph_text import GraphBuilder, Type, UnsupportedError, Value

# (batch, tokens, earlier tokens). The last gives the coefficients: b and s are 1 there.
SAMPLES = ((3, 67, 131), (5, 97, 211), (1, 1, 37))
# Of a step whose rows of logits are chosen by a tensor: how many, then.
CHOSEN = (11, 17, 1)
_DIFFERENT = "the model computes something else for one token than for many"


def unify(builders: Sequence[GraphBuilder]) -> GraphBuilder:
    """One graph with symbols from graphs of SAMPLES' sizes. UnsupportedError if they differ."""
    first = builders[0]
    if (
        len({len(b.nodes) for b in builders}) != 1
        or len({len(b.parameters) for b in builders}) != 1
    ):
        raise UnsupportedError(_DIFFERENT)
    result = GraphBuilder(first.name)
    made: dict[int, Value] = {}
    ordinals = [_ordinals(builder) for builder in builders]

    def value(values: Sequence[Value]) -> Value:
        name = result.unique(values[0].name)
        made[id(values[0])] = Value(name, _unify_types([v.type for v in values]))
        return made[id(values[0])]

    for parameters in zip(*(builder.parameters for builder in builders), strict=True):
        result.parameters.append(value(parameters))
    for nodes in zip(*(builder.nodes for builder in builders), strict=True):
        positions = {
            tuple(order[id(v)] for v in node.operands)
            for node, order in zip(nodes, ordinals, strict=True)
        }
        if len({node.op for node in nodes}) != 1 or len(positions) != 1:
            raise UnsupportedError(_DIFFERENT)
        node = nodes[0]
        results = [value(values) for values in zip(*(n.results for n in nodes), strict=True)]
        attributes = {
            key: _unify_attribute([n.attributes.get(key) for n in nodes]) for key in node.attributes
        }
        operands = [made[id(v)] for v in node.operands]
        result.adopt(graph_text.Node(node.op, operands, results, attributes, node.source))
    result.outputs = [made[id(v)] for v in first.outputs]
    return result


def _ordinals(builder: GraphBuilder) -> dict[int, int]:
    values = [*builder.parameters, *(v for node in builder.nodes for v in node.results)]
    return {id(value): i for i, value in enumerate(values)}


def _unify_types(types: Sequence[Type]) -> Type:
    if len({(t.dtype, len(t.shape), t.is_cache) for t in types}) != 1:
        raise UnsupportedError(_DIFFERENT)
    sizes = zip(*(t.shape for t in types), strict=True)
    return Type(types[0].dtype, tuple(map(_solve_dims, sizes)), types[0].is_cache)


def _solve_dims(sizes: Sequence[Dim]) -> Dim:
    return solve(tuple(size.constant or 0 for size in sizes))


def _unify_attribute(values: Sequence[Any]) -> Any:
    if values[0] and isinstance(values[0], list) and isinstance(values[0][0], Dim):
        if len({len(value) for value in values}) != 1:
            raise UnsupportedError(_DIFFERENT)
        return [_solve_dims(sizes) for sizes in zip(*values, strict=True)]
    if any(value != values[0] for value in values[1:]):
        raise UnsupportedError(f"a number that depends on the input's size: {values}")
    return values[0]


@functools.cache
def solve(values: tuple[int, ...]) -> Dim:
    """The size that has these values at SAMPLES: a number, or c*x or x + c, x being b, s, b*s, n
    (of CHOSEN) or, with t for all tokens so far, t or b*t."""
    if len(set(values)) == 1:
        return Dim.of(values[0])
    b, s, t, n = (Dim.symbol(name) for name in "bstn")
    for monomial in (b, s, b * s, t, b * t, n):
        sizes = [
            monomial.evaluate({"b": batch, "s": tokens, "t": tokens + past, "n": chosen})
            for (batch, tokens, past), chosen in zip(SAMPLES, CHOSEN, strict=True)
        ]
        factor, rest = values[-1] // sizes[-1], values[-1] - sizes[-1]
        if all(value == factor * size for value, size in zip(values, sizes, strict=True)):
            return monomial * factor
        if all(value == size + rest for value, size in zip(values, sizes, strict=True)):
            return monomial + rest
    raise UnsupportedError(f"a size that depends on the input's in a way not understood: {values}")
