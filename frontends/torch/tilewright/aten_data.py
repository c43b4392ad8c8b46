"""The second part of the table of aten.py: tables, indices, running sums, joining and repeating.

Tested by tests/python/test_lower.py (every entry, against eager).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tilewright.aten import axis_of, lowers
from tilewright.dims import Dim
from tilewright.graph_text import Type, UnsupportedError, Value

if TYPE_CHECKING:
    from tilewright.lower import Call


@lowers("embedding.default")
def embedding(call: Call, table: Value, indices: Value, *_: Any) -> Value:
    if indices.dtype not in (torch.int64, torch.int32) or len(table.shape) != 2:
        raise UnsupportedError("embedding with these indices or table")
    return call.emit("embedding", table, call.convert(indices, torch.int64))


def _without_ones(shape: Sequence[Dim]) -> list[Dim]:
    return [size for size in shape if size.constant != 1]


def _repeated_from(call: Call, x: Value, whole: Sequence[Dim], once: Sequence[Dim]) -> Value | None:
    """The value of shape `once` that was expanded to x, of shape `whole`, by new axes alone."""
    shapes = [_without_ones(whole), _without_ones(once)]
    while _without_ones(x.shape) in shapes:
        if x.shape == tuple(once):
            return x
        node = call.builder.producer(x)
        if node is None or node.op not in ("reshape", "expand"):
            return None
        x = node.operands[0]
    return None


@lowers("gather.default")
def gather(call: Call, x: Value, axis: int, indices: Value, sparse: bool = False) -> Value:
    """Along the last axis; or rows of one table for all sequences, spelled out: table and indices
    repeated to 3-D."""
    rank = len(x.shape)
    axis = axis_of(axis, rank)
    if rank > 0 and axis == rank - 1 and x.shape[:-1] == indices.shape[:-1]:
        return call.emit("gather", x, call.convert(indices, torch.int64))
    if rank != 3 or axis != 1 or x.shape[2] != indices.shape[2]:
        raise UnsupportedError("gather along another axis than the last")
    table = _repeated_from(call, x, x.shape, x.shape[1:])
    rows = _repeated_from(call, indices, indices.shape, indices.shape[:2])
    if table is None or rows is None:
        raise UnsupportedError("gather from a table of each sequence")
    return call.emit("embedding", table, call.convert(rows, torch.int64))


@lowers("scatter.value")
def scatter(call: Call, x: Value, axis: int, indices: Value, number: Any) -> Value:
    """Marks a few places of each row, as routers mark groups of experts."""
    last = len(x.shape) - 1
    count = indices.shape[-1].constant if indices.shape else None
    if last < 0 or axis_of(axis, last + 1) != last or x.shape[:-1] != indices.shape[:-1]:
        raise UnsupportedError("scatter along another axis than the last")
    if count is None or not 1 <= count <= 16 or not isinstance(number, int | float):
        raise UnsupportedError("scatter of many elements")
    places = call.append(
        "arange", [], Type(torch.int64, x.shape[-1:]), start=[Dim.of(0)], end=[x.shape[-1]]
    )
    marked = Type(torch.bool, x.shape)
    hits = []
    for i in range(count):
        one = Type(torch.int64, (*indices.shape[:-1], Dim.of(1)))
        index = call.slice(indices, last, Dim.of(i), Dim.of(i + 1), 1, one)
        hits.append(call.append("eq", [index, places], marked))
    found = hits[0]
    for hit in hits[1:]:
        found = call.append("logical_or", [found, hit], marked)
    return call.emit("where", found, call.builder.scalar(number, x.dtype), x)


def _leading_part(
    call: Call, x: Value, indices: Sequence[Value | None]
) -> list[tuple[int, Dim, Dim]] | None:
    """If x[i, j, ...] is x[a:b, c:d, ...], the axes that it cuts and where: each index counts along
    an axis of its own. So a padding mask is read: mask[batch[:, None, None, None], key], where a
    sliding window has keys count from some later one."""
    if len(indices) != len(x.shape):
        return None
    rank = len(call.type.shape)
    places: list[int] = []
    cuts: list[tuple[int, Dim, Dim]] = []
    for i, (size, value) in enumerate(zip(x.shape, indices, strict=True)):
        if value is None or value.dtype != torch.int64:
            return None
        wide = [axis for axis, dim in enumerate(value.shape) if dim.constant != 1]
        bounds = _counting(call, value)
        if len(wide) > 1 or bounds is None:
            return None
        # An axis of one element may lie anywhere.
        places += [rank - len(value.shape) + axis for axis in wide]
        if bounds != (Dim.of(0), size):
            cuts.append((i, *bounds))
    return cuts if places == sorted(set(places)) else None


def _counting(call: Call, value: Value) -> tuple[Dim, Dim] | None:
    """Start and end, if the elements are start, start + 1, ... end - 1."""
    node = call.builder.producer(value)
    if node is None:
        return None
    if node.op == "arange":
        return node.attributes["start"][0], node.attributes["end"][0]
    if node.op == "reshape":
        return _counting(call, node.operands[0])
    if node.op == "scalar":
        number = Dim.of(int(node.attributes["value"]))
        return number, number + 1
    if node.op != "add":
        return None
    left, right = (_counting(call, operand) for operand in node.operands)
    if left is None or right is None:
        return None
    (first, end), (second, second_end) = left, right
    if end == first + 1:  # one number, added to all
        return second + first, second_end + first
    return (first + second, end + second) if second_end == second + 1 else None


@lowers("index.Tensor")
def index(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """Rows of a table; or one place, given as a constant."""
    cuts = _leading_part(call, x, indices)
    if cuts is not None:
        for axis, start, end in cuts:
            for low, high in ((Dim.of(0), start), (end, x.shape[axis])):
                if low.constant is None or high.constant is None:
                    call.builder.at_most.append((low, high))
                elif low.constant > high.constant:
                    raise UnsupportedError("an index from the end, or beyond it")
            shape = (*x.shape[:axis], end - start, *x.shape[axis + 1 :])
            x = call.slice(x, axis, start, end, 1, Type(x.dtype, shape))
        return call.reshape(x, call.type.shape)
    given = [(axis, value) for axis, value in enumerate(indices) if value is not None]
    if len(given) != 1 or given[0][1].dtype != torch.int64:
        raise UnsupportedError("an index of several axes, or by a mask")
    axis, value = given[0]
    node = call.builder.producer(value)
    known: Any = node.source if node is not None else None
    if type(known) is torch.Tensor and known.shape == (1,):
        first = Dim.of(int(known))
        first = x.shape[axis] + first if int(known) < 0 else first
        return call.slice(x, axis, first, first + 1, 1, call.type)
    if axis != 0 or len(x.shape) != 2:
        raise UnsupportedError("an index of another axis than a table's first")
    return call.emit("embedding", x, value)


@lowers("topk.default")
def topk(
    call: Call, x: Value, count: Any, axis: int = -1, largest: bool = True, ordered: bool = True
) -> list[Value]:
    if axis_of(axis, len(x.shape)) != len(x.shape) - 1 or not largest:
        raise UnsupportedError("topk over another axis than the last, or of the smallest")
    if not isinstance(count, int) or x.dtype == torch.bool:
        raise UnsupportedError("topk of booleans, or of a symbolic number")
    return [
        call.append(op, [x], type_, count=count)
        for op, type_ in zip(("top_values", "top_indices"), call.types, strict=True)
    ]


@lowers("cumsum.default")
def cumsum(call: Call, x: Value, axis: int, dtype: torch.dtype | None = None) -> Value:
    """Positions are running sums of a padding mask."""
    if call.type.dtype != torch.int64 or axis_of(axis, len(x.shape)) != len(x.shape) - 1:
        raise UnsupportedError("cumsum of another type than int64, or not along the last axis")
    return call.emit("cumsum", call.convert(x, torch.int64))


@lowers("cat.default", "concat.default", "concatenate.default")
def cat(call: Call, pieces: Sequence[Value], axis: int = 0) -> Value:
    """ATen skips empty vectors, which DynamicCache starts with."""
    rank = len(call.type.shape)
    kept = [p for p in pieces if not (len(p.shape) == 1 and p.shape[0].constant == 0)] or pieces[:1]
    kept = [call.convert(piece, call.type.dtype) for piece in kept]
    if len(kept) == 1:
        return kept[0]
    return call.emit("cat", *kept, axis=axis_of(axis, rank))


@lowers("stack.default")
def stack(call: Call, pieces: Sequence[Value], axis: int = 0) -> Value:
    axis = axis_of(axis, len(call.type.shape))
    shape = (*call.type.shape[:axis], Dim.of(1), *call.type.shape[axis + 1 :])
    return call.emit("cat", *[call.reshape(piece, shape) for piece in pieces], axis=axis)


@lowers("repeat.default")
def repeat(call: Call, x: Value, repeats: Sequence[Any]) -> Value:
    """[a, b].repeat(n, m) is expand to [n, a, m, b] and reshape."""
    lead = len(repeats) - len(x.shape)
    sizes = (Dim.of(1),) * lead + x.shape
    split_shape = [d for size in sizes for d in (Dim.of(1), size)]
    wide_shape = [d for n, size in zip(repeats, sizes, strict=True) for d in (Dim.of(n), size)]
    wide = call.expand(call.reshape(x, tuple(split_shape)), tuple(wide_shape))
    return call.reshape(wide, call.type.shape)


@lowers("repeat_interleave.self_int")
def repeat_interleave(
    call: Call, x: Value, repeats: Any, axis: int | None = None, output_size: Any = None
) -> Value:
    """Each element several times in a row: a new axis behind its own, expanded."""
    if axis is None:
        x, axis = call.reshape(x, (math.prod(x.shape, start=Dim.of(1)),)), 0
    axis = axis_of(axis, len(x.shape))
    before, after = x.shape[: axis + 1], x.shape[axis + 1 :]
    wide = call.expand(
        call.reshape(x, (*before, Dim.of(1), *after)), (*before, Dim.of(repeats), *after)
    )
    return call.reshape(wide, call.type.shape)


@lowers("index_copy.default")
def index_copy(call: Call, x: Value, axis: int, index: Value, source: Value) -> Value:
    """The graph op writes operand 0: lower.py decides whether that is the caller's tensor."""
    return call.emit("index_copy", x, index, source, axis=axis_of(axis, len(x.shape)))


@lowers("copy.default")
def copy(call: Call, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return call.expand(call.convert(source, x.dtype), x.shape)
