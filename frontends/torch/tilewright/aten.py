"""The table: how each pre-dispatch ATen overload becomes graph nodes.

One entry per overload. An entry gets the call's arguments in schema order, with tensors as graph
Values and symbolic integers as Dims, and returns the Value (or Values) of its result. It raises
UnsupportedError for argument values outside its domain; lower.py then makes the node `external`,
with that reason. Ops that only differ in spelling share a function through a list of names.
Elementwise ops are in aten_elementwise.py, what moves data in aten_data.py, products of matrices in
aten_products.py.

To add an op: write a function, decorate it with the overloads it lowers, add a case to
tests/python/test_lower.py.

Tested by tests/python/test_lower.py (every entry, against eager).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tilewright import dims
from tilewright.dims import Dim
from tilewright.graph_text import Type, UnsupportedError, Value

if TYPE_CHECKING:
    from tilewright.lower import Call

Lowering = Callable[..., Any]
TABLE: dict[str, Lowering] = {}

# In-place overloads whose functional twin differs by more than the trailing underscore.
INPLACE_TWINS: dict[str, str] = {"aten.index_copy_.default": "aten.index_copy.default"}

# Calls without a result that inference can drop: assertions and hints about sizes.
DROPPED = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_async.default",
        "aten._assert_async.msg",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)


def lowers(*overloads: str) -> Callable[[Lowering], Lowering]:
    """Registers a function for `aten.` overloads."""

    def register(function: Lowering) -> Lowering:
        for overload in overloads:
            TABLE[f"aten.{overload}"] = function
        return function

    return register


def axis_of(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


# --- values that stay what they are. Layout is the compiler's business; an output that must not
# alias its input is copied where outputs are made (lower.py).


@lowers(
    "alias.default",
    "clone.default",
    "contiguous.default",
    "detach.default",
    "detach_.default",
    "lift_fresh.default",
    "lift_fresh_copy.default",
    "positive.default",
    "conj.default",
    "resolve_conj.default",
    "resolve_neg.default",
)
def same(call: Call, x: Value, *_: Any) -> Value:
    return x


@lowers("dropout.default", "dropout_.default", "feature_dropout.default", "alpha_dropout.default")
def dropout(call: Call, x: Value, probability: float, train: bool) -> Value:
    if train and probability > 0:
        raise UnsupportedError("dropout in training mode")
    return x


@lowers(
    "to.dtype",
    "to.device",
    "to.dtype_layout",
    "to.other",
    "to.prim_Device",
    "to.prim_dtype",
    "to.prim_other",
    "type_as.default",
    "_to_copy.default",
    "_autocast_to_reduced_precision.default",
    "_autocast_to_full_precision.default",
)
def convert(call: Call, x: Value, *_: Any) -> Value:
    """All spellings of `to`: the traced result says the element type; the device is always CPU."""
    return call.convert(x, call.type.dtype)


# --- views


@lowers(
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "unsqueeze.default",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "flatten.using_ints",
    "unflatten.int",
    "view_as.default",
    "reshape_as.default",
    "ravel.default",
    "atleast_1d.default",
    "atleast_2d.default",
    "atleast_3d.default",
    "_reshape_alias.default",
)
def reshape(call: Call, x: Value, *_: Any) -> Value:
    if call.type.dtype != x.dtype:
        raise UnsupportedError("a view with another element type")
    return call.reshape(x, call.type.shape)


@lowers("expand.default", "expand_as.default", "broadcast_to.default")
def expand(call: Call, x: Value, *_: Any) -> Value:
    return call.expand(x, call.type.shape)


@lowers("permute.default")
def permute(call: Call, x: Value, order: Sequence[int]) -> Value:
    rank = len(x.shape)
    return call.permute(x, [axis_of(axis, rank) for axis in order])


@lowers("transpose.int", "swapaxes.default", "swapdims.default")
def transpose(call: Call, x: Value, first: int, second: int) -> Value:
    order = list(range(len(x.shape)))
    if not order:
        return x
    first, second = axis_of(first, len(order)), axis_of(second, len(order))
    order[first], order[second] = order[second], order[first]
    return call.permute(x, order)


@lowers("t.default", "numpy_T.default", "mT.default", "matrix_H.default", "adjoint.default")
def reverse_axes(call: Call, x: Value) -> Value:
    order = list(range(len(x.shape)))
    keep = 0 if call.overload == "aten.numpy_T.default" else max(0, len(order) - 2)
    return call.permute(x, order[:keep] + order[keep:][::-1])


@lowers("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")
def movedim(call: Call, x: Value, source: Any, destination: Any) -> Value:
    rank = len(x.shape)
    sources = [axis_of(a, rank) for a in ([source] if isinstance(source, int) else source)]
    targets = [
        axis_of(a, rank) for a in ([destination] if isinstance(source, int) else destination)
    ]
    order = [a for a in range(rank) if a not in sources]
    for target, moved in sorted(zip(targets, sources, strict=True)):
        order.insert(target, moved)
    return call.permute(x, order)


@lowers("slice.Tensor")
def slice_(
    call: Call, x: Value, axis: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Value:
    """Bounds may be negative, huge or beyond the end; the traced size of the result says how many
    remain, and with a symbolic axis only that tells which bounds were clamped."""
    axis = axis_of(axis, len(x.shape))
    size, count = x.shape[axis], call.type.shape[axis]
    if not isinstance(step, int):
        raise UnsupportedError("a slice with a symbolic step")
    first = Dim.of(0 if start is None else start)
    stop = None
    if size.constant is not None and first.constant is not None and isinstance(end, int | None):
        bounds = slice(first.constant, end, step).indices(size.constant)
        first, stop = Dim.of(bounds[0]), Dim.of(max(bounds[0], bounds[1]))
    elif step != 1:
        if first.constant is not None and first.constant < 0:
            raise UnsupportedError("a slice with a step from the end of a symbolic axis")
        stop = first + (count - 1) * step + 1
    elif end is None or (isinstance(end, int) and end >= 2**31):
        first = size - count
    elif count.constant == 0:
        first = Dim.of(0)
    else:
        first = _first_of_clamped(first, end, size, count)
    return call.slice(x, axis, first, first + count if stop is None else stop, step, call.type)


def _first_of_clamped(first: Dim, end: Any, size: Dim, count: Dim) -> Dim:
    """Where a slice to a bound begins. From the end, it begins inside only if as many elements are
    left as its bounds ask for."""
    if first.constant is not None and first.constant < 0:
        last = Dim.of(end)
        if last.constant is not None and last.constant < 0:
            last = size + last
        first = size + first
        if count != last - first:
            raise UnsupportedError("a slice from before the beginning of a symbolic axis")
    elif first.constant != 0 and dims.derived.keys() & count.symbols():
        raise UnsupportedError("a slice between bounds that only a call knows")
    return first


@lowers("narrow.default")
def narrow(call: Call, x: Value, axis: int, start: Any, length: Any) -> Value:
    axis = axis_of(axis, len(x.shape))
    first = Dim.of(start)
    if first.constant is not None and first.constant < 0:
        first = x.shape[axis] + first
    return call.slice(x, axis, first, first + call.type.shape[axis], 1, call.type)


@lowers("select.int")
def select(call: Call, x: Value, axis: int, index: Any) -> Value:
    axis = axis_of(axis, len(x.shape))
    first = Dim.of(index)
    if first.constant is not None and first.constant < 0:
        first = x.shape[axis] + first
    one = (*x.shape[:axis], Dim.of(1), *x.shape[axis + 1 :])
    row = call.slice(x, axis, first, first + 1, 1, Type(x.dtype, one))
    return call.reshape(row, call.type.shape)


@lowers(
    "split.Tensor",
    "split.sizes",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
)
def split(call: Call, x: Value, _sizes: Any, axis: int = 0) -> list[Value]:
    """The traced results say where each piece ends."""
    axis = axis_of(axis, len(x.shape))
    pieces, start = [], Dim.of(0)
    for type_ in call.types:
        stop = start + type_.shape[axis]
        pieces.append(call.slice(x, axis, start, stop, 1, type_))
        start = stop
    return pieces


@lowers("unbind.int")
def unbind(call: Call, x: Value, axis: int = 0) -> list[Value]:
    axis = axis_of(axis, len(x.shape))
    one = (*x.shape[:axis], Dim.of(1), *x.shape[axis + 1 :])
    rows = []
    for i, type_ in enumerate(call.types):
        row = call.slice(x, axis, Dim.of(i), Dim.of(i + 1), 1, Type(x.dtype, one))
        rows.append(call.reshape(row, type_.shape))
    return rows


# --- reductions and norms over the last axis


def _reduce(call: Call, op: str, x: Value, axes: Sequence[int] | None, keep: bool) -> Value:
    rank = len(x.shape)
    if axes is None or rank == 0 or [axis_of(a, rank) for a in axes] != [rank - 1]:
        raise UnsupportedError(f"{op} over other axes than the last")
    reduced = call.append(op, [x], Type(call.type.dtype, (*x.shape[:-1], Dim.of(1))))
    return reduced if keep else call.reshape(reduced, call.type.shape)


def _reduction(op: str) -> Lowering:
    def lower(
        call: Call, x: Value, axes: Sequence[int] | None, keep: bool = False, dtype: Any = None
    ) -> Value:
        x = call.convert(x, call.type.dtype)
        if not x.dtype.is_floating_point:
            raise UnsupportedError(f"{op} of integers")
        return _reduce(call, op, x, axes, keep)

    return lower


lowers("mean.dim")(_reduction("mean"))
lowers("sum.dim_IntList")(_reduction("sum"))


@lowers("amax.default")
def amax(call: Call, x: Value, axes: Sequence[int] = (), keep: bool = False) -> Value:
    return _reduce(call, "amax", x, axes, keep)


@lowers("max.default")
def largest_of_all(call: Call, x: Value) -> Value:
    """Of positions: a rotary table that grows asks for the last one."""
    if x.dtype.is_floating_point or not x.shape:
        raise UnsupportedError("the largest of all numbers, unless they are integers")
    count = math.prod(x.shape, start=Dim.of(1))
    flat = call.reshape(x, (count,))
    top = call.append("top_values", [flat], Type(x.dtype, (Dim.of(1),)), count=1)
    return call.reshape(top, ())


@lowers("softmax.int", "_softmax.default")
def softmax(call: Call, x: Value, axis: int, dtype: Any = None) -> Value:
    """`dtype` is where the sum is formed; the traced result has it already."""
    x = call.convert(x, call.type.dtype)
    rank = len(x.shape)
    if rank == 0:
        raise UnsupportedError("softmax of a scalar")
    axis = axis_of(axis, rank)
    if axis == rank - 1:
        return call.emit("softmax", x)
    order = [a for a in range(rank) if a != axis] + [axis]
    moved = call.permute(x, order)
    result = call.append("softmax", [moved], moved.type)
    return call.permute(result, [order.index(a) for a in range(rank)])


def _check_last_axis(shape: Sequence[Any], x: Value) -> None:
    if len(shape) != 1:
        raise UnsupportedError("a norm over more than the last axis")


@lowers("rms_norm.default")
def rms_norm(
    call: Call, x: Value, shape: Sequence[Any], weight: Value | None = None, eps: Any = None
) -> Value:
    _check_last_axis(shape, x)
    if eps is None:
        # ATen: the machine epsilon of the type it computes in.
        reduced = x.dtype in (torch.bfloat16, torch.float16)
        eps = torch.finfo(torch.float32 if reduced else x.dtype).eps
    return call.emit("rms_norm", *[v for v in (x, weight) if v is not None], eps=float(eps))


@lowers("layer_norm.default")
def layer_norm(
    call: Call,
    x: Value,
    shape: Sequence[Any],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    _check_last_axis(shape, x)
    if bias is not None and weight is None:
        raise UnsupportedError("layer_norm with a bias but no weight")
    operands = [v for v in (x, weight, bias) if v is not None]
    return call.emit("layer_norm", *operands, eps=float(eps))


# --- sources


@lowers("arange.default", "arange.start", "arange.start_step")
def arange(call: Call, *arguments: Any) -> Value:
    positional = {"aten.arange.default": 1, "aten.arange.start": 2, "aten.arange.start_step": 3}
    bounds = arguments[: positional[call.overload]]
    if not all(isinstance(bound, int | Dim) for bound in bounds):
        raise UnsupportedError("arange of fractions")
    if len(bounds) == 3 and bounds[2] != 1:
        raise UnsupportedError("arange with a step")
    start = Dim.of(bounds[0]) if len(bounds) > 1 else Dim.of(0)
    shape = call.type.shape
    values = call.append(
        "arange", [], Type(torch.int64, shape), start=[start], end=[start + shape[0]]
    )
    return call.convert(values, call.type.dtype)


@lowers(
    "full.default",
    "full_like.default",
    "new_full.default",
    "fill.Scalar",
    "scalar_tensor.default",
    "zeros.default",
    "zeros_like.default",
    "new_zeros.default",
    "ones.default",
    "ones_like.default",
    "new_ones.default",
)
def fill(call: Call, *arguments: Any) -> Value:
    if "zeros" in call.overload or "ones" in call.overload:
        number: Any = 1.0 if "ones" in call.overload else 0.0
    else:
        number = arguments[0 if "scalar_tensor" in call.overload else 1]
    if not isinstance(number, int | float):
        raise UnsupportedError("a fill with a symbolic number")
    return call.expand(call.builder.scalar(number, call.type.dtype), call.type.shape)
