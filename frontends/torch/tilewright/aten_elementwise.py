"""The part of the table of aten.py that computes each element by itself.

Tested by tests/python/test_lower.py (every entry, against eager).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.aten import Lowering, lowers
from tilewright.dims import Dim
from tilewright.graph_text import Type, UnsupportedError, Value

if TYPE_CHECKING:
    from tilewright.lower import Call

_UNARY = """
    neg abs reciprocal sqrt rsqrt exp expm1 log log1p sin cos tanh erf sigmoid silu relu
"""


def _unary(op: str) -> Lowering:
    def lower(call: Call, x: Value) -> Value:
        # ATen computes these in the result's type: int64 -> float32.
        return call.emit(op, call.convert(x, call.type.dtype))

    return lower


for _name in _UNARY.split():
    lowers(f"{_name}.default")(_unary(_name))


@lowers("gelu.default")
def gelu(call: Call, x: Value, approximate: str = "none") -> Value:
    return call.emit("gelu", x, approximate=approximate)


def _in_f32(activation: Lowering) -> Lowering:
    """ATen forms these from several functions, in fp32, and rounds once."""

    def lower(call: Call, x: Value, *arguments: Any) -> Value:
        if not x.dtype.is_floating_point or x.dtype == torch.float64:
            raise UnsupportedError(f"an activation of {x.dtype}")
        result = activation(Formula(call, x.shape), call.convert(x, torch.float32), *arguments)
        return call.convert(result, call.type.dtype)

    return lower


class Formula:
    """Appends elementwise nodes in fp32, of one shape; numbers become constants."""

    def __init__(self, call: Call, shape: tuple[Dim, ...]) -> None:
        self.call = call
        self.shape = shape

    def __call__(self, op: str, *operands: Value | float) -> Value:
        values = [
            operand if isinstance(operand, Value) else self.call.scalar(operand, torch.float32)
            for operand in operands
        ]
        dtype = torch.bool if op in _COMPARISONS else torch.float32
        return self.call.append(op, values, Type(dtype, self.shape))


@lowers("softplus.default")
@_in_f32
def softplus(f: Formula, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    scaled = x if beta == 1 else f("mul", x, beta)
    curve = f("log1p", f("exp", scaled))
    if beta != 1:
        curve = f("div", curve, beta)
    return f("where", f("gt", scaled, threshold), x, curve)


def _elu(f: Formula, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    scaled = x if input_scale == 1 else f("mul", x, input_scale)
    negative = f("mul", f("expm1", scaled), alpha * scale)
    return f("where", f("gt", x, 0), x if scale == 1 else f("mul", x, scale), negative)


lowers("elu.default")(_in_f32(_elu))


@lowers("selu.default")
@_in_f32
def selu(f: Formula, x: Value) -> Value:
    """Klambauer et al., Self-Normalizing Neural Networks, 2017."""
    return _elu(f, x, 1.6732632423543772, 1.0507009873554805)


@lowers("leaky_relu.default")
@_in_f32
def leaky_relu(f: Formula, x: Value, slope: float = 0.01) -> Value:
    return f("where", f("gt", x, 0), x, f("mul", x, slope))


def _binary(op: str) -> Lowering:
    def lower(call: Call, a: Any, b: Any) -> Value:
        left, right = call.promote(a, b)
        return call.emit(op, left, right)

    return lower


lowers("mul.Tensor", "mul.Scalar", "multiply.Tensor")(_binary("mul"))
lowers("maximum.default", "max.other")(_binary("maximum"))
lowers("minimum.default", "min.other")(_binary("minimum"))

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in _COMPARISONS:
    lowers(f"{_name}.Tensor", f"{_name}.Scalar")(_binary(_name))


def _sum(op: str) -> Lowering:
    def lower(call: Call, a: Any, b: Any, alpha: Any = 1) -> Value:
        left, right = call.promote(a, b)
        if alpha != 1:
            right = call.append(
                "mul", [right, call.scalar(alpha, call.type.dtype)], Type(right.dtype, right.shape)
            )
        return call.emit(op, left, right)

    return lower


lowers("add.Tensor", "add.Scalar")(_sum("add"))
lowers("sub.Tensor", "sub.Scalar", "subtract.Tensor")(_sum("sub"))


@lowers("rsub.Scalar", "rsub.Tensor")
def rsub(call: Call, a: Any, b: Any, alpha: Any = 1) -> Value:
    if alpha != 1:
        raise UnsupportedError("rsub with alpha")
    left, right = call.promote(b, a)
    return call.emit("sub", left, right)


@lowers("div.Tensor", "div.Scalar", "true_divide.Tensor", "divide.Tensor")
def div(call: Call, a: Any, b: Any) -> Value:
    left, right = call.promote(a, b, to=call.type.dtype)
    return call.emit("div", left, right)


@lowers("pow.Tensor_Scalar")
def pow_(call: Call, x: Value, exponent: Any) -> Value:
    if not isinstance(exponent, int | float) or float(exponent) not in (2.0, 3.0, 0.5, -0.5, -1.0):
        raise UnsupportedError(f"pow with exponent {exponent}")
    if not x.dtype.is_floating_point:
        raise UnsupportedError("pow of integers")
    return call.emit("pow", x, exponent=float(exponent))


@lowers("square.default")
def square(call: Call, x: Value) -> Value:
    return pow_(call, x, 2)


@lowers("clamp.default", "clip.default")
def clamp(call: Call, x: Value, low: Any = None, high: Any = None) -> Value:
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            left, right = call.promote(x, bound)
            x = call.append(op, [left, right], call.type)
    return x


@lowers("clamp_min.default", "clamp_max.default")
def clamp_one(call: Call, x: Value, bound: Any) -> Value:
    is_low = call.overload == "aten.clamp_min.default"
    return clamp(call, x, bound if is_low else None, None if is_low else bound)


@lowers(
    "logical_and.default",
    "bitwise_and.Tensor",
    "__and__.Tensor",
    "logical_or.default",
    "bitwise_or.Tensor",
    "__or__.Tensor",
)
def logical(call: Call, a: Value, b: Value) -> Value:
    if a.dtype != torch.bool or b.dtype != torch.bool:
        raise UnsupportedError("bit operations on integers")
    return call.emit("logical_and" if "and" in call.overload else "logical_or", a, b)


@lowers("logical_not.default", "bitwise_not.default")
def logical_not(call: Call, x: Value) -> Value:
    if x.dtype != torch.bool:
        raise UnsupportedError("logical_not of numbers")
    return call.emit("logical_not", x)


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(call: Call, condition: Value, a: Any, b: Any) -> Value:
    left, right = call.promote(a, b, to=call.type.dtype)
    return call.emit("where", condition, left, right)


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(call: Call, x: Value, mask: Value, number: Any) -> Value:
    left, right = call.promote(number, x, to=x.dtype)
    return call.emit("where", mask, left, right)
