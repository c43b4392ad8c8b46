"""The third part of the table of aten.py: linear layers, products, convolutions, attention,
experts.

Tested by tests/python/test_lower.py (every entry, against eager).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from tilewright.aten import TABLE, lowers
from tilewright.dims import Dim
from tilewright.graph_text import Type, UnsupportedError, Value

if TYPE_CHECKING:
    from tilewright.lower import Call


@lowers("linear.default")
def linear(call: Call, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.shape) != 2 or not x.shape:
        raise UnsupportedError("linear with a weight that is not a matrix")
    if bias is None:
        return call.emit("linear", x, weight)
    return call.emit("linear", x, weight, bias, bias=True)


def _each(value: Any, count: int) -> list[Any]:
    """ATen lets one number stand for all axes."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return numbers * count if len(numbers) == 1 else numbers


@lowers("conv1d.default", "conv2d.default", "conv3d.default")
def convolution(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """Of patches that do not overlap, which is a linear layer of each patch."""
    axes = len(weight.shape) - 2
    kernel = list(weight.shape[2:])
    plain = groups == 1 and all(p == 0 for p in _each(padding, axes))
    if not plain or len(x.shape) != len(weight.shape):
        raise UnsupportedError("a convolution with padding or groups, or without a batch")
    patches = [Dim.of(s) for s in _each(stride, axes)] == kernel
    pointwise = all(s == 1 for s in _each(stride, axes)) and all(k.constant == 1 for k in kernel)
    spread = any(d != 1 for d in _each(dilation, axes)) and not pointwise
    if spread or not (patches or pointwise):
        raise UnsupportedError("a convolution of patches that overlap")
    batch, counts = x.shape[0], call.type.shape[2:]
    for axis, (count, size) in enumerate(zip(counts, kernel, strict=True), 2):
        if count * size != x.shape[axis]:  # what is left over is not read
            cut = (*x.shape[:axis], count * size, *x.shape[axis + 1 :])
            x = call.slice(x, axis, Dim.of(0), count * size, 1, Type(x.dtype, cut))
    split = [d for pair in zip(counts, kernel, strict=True) for d in pair]
    x = call.reshape(x, (batch, x.shape[1], *split))
    inner = [1, *range(3, 2 * axes + 2, 2)]
    x = call.permute(x, [0, *range(2, 2 * axes + 2, 2), *inner])
    depth = math.prod(weight.shape[1:], start=Dim.of(1))
    x = call.reshape(x, (batch, *counts, depth))
    flat = call.reshape(weight, (weight.shape[0], depth))
    given = [x, flat] + ([bias] if bias is not None else [])
    type_ = Type(call.type.dtype, (batch, *counts, weight.shape[0]))
    result = call.append("linear", given, type_, bias=True if bias is not None else None)
    return call.permute(result, [0, axes + 1, *range(1, axes + 1)])


@lowers("matmul.default", "mm.default", "bmm.default")
def matmul(call: Call, a: Value, b: Value) -> Value:
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise UnsupportedError("matmul with a vector")
    return call.emit("matmul", a, b)


@lowers("addmm.default", "baddbmm.default")
def addmm(call: Call, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    product = call.append("matmul", [a, b], call.type)
    if alpha != 1:
        product = call.append("mul", [product, call.scalar(alpha, product.dtype)], call.type)
    if beta != 1:
        scaled = Type(bias.dtype, bias.shape)
        bias = call.append("mul", [bias, call.scalar(beta, bias.dtype)], scaled)
    return call.emit("add", product, bias)


def grouped_mm(call: Call, x: Value, weights: Value, ends: Value) -> Value:
    """transformers' product of rows sorted by expert: x [rows, k], weights [experts, k, n].

    `ends[e]` rows belong to experts up to e, so a row's expert is the number of ends that it is
    not before. Rows behind the last end are zero."""
    node = call.builder.producer(weights)
    swapped = node is not None and node.op == "permute" and node.attributes["order"] == [0, 2, 1]
    if swapped and node is not None:
        weights, node = node.operands[0], call.builder.producer(node.operands[0])
    if node is None or node.op != "constant":
        raise UnsupportedError("a grouped product with weights that are no constant")
    rows, experts = x.shape[0], weights.shape[0]
    one, counted = Dim.of(1), Type(torch.int64, (x.shape[0], weights.shape[0]))
    number = call.append("arange", [], Type(torch.int64, (rows,)), start=[Dim.of(0)], end=[rows])
    ends = call.reshape(call.convert(ends, torch.int64), (one, experts))
    passed = call.append(
        "le", [ends, call.reshape(number, (rows, one))], Type(torch.bool, counted.shape)
    )
    sums = call.append("cumsum", [call.convert(passed, torch.int64)], counted)
    column = Type(torch.int64, (rows, one))
    expert = call.slice(sums, 1, experts - 1, experts, 1, column)
    last = call.scalar(experts - 1, torch.int64)
    index = call.append("minimum", [expert, last], column)
    product = call.append(
        "expert_linear", [x, weights, index], call.type, transposed=None if swapped else True
    )
    inside = call.append("le", [expert, last], Type(torch.bool, column.shape))
    return call.emit("where", inside, product, call.builder.scalar(0.0, x.dtype))


TABLE["transformers.grouped_mm_fallback.default"] = grouped_mm


@lowers("scaled_dot_product_attention.default")
def attention(
    call: Call,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p != 0.0:
        raise UnsupportedError("attention with dropout")
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise UnsupportedError("attention on tensors that are not [b, heads, s, d]")
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0]:
        raise UnsupportedError("attention with a broadcast batch")
    one_for_all = k.shape[1].constant == v.shape[1].constant == 1  # broadcast
    if not enable_gqa and q.shape[1] != k.shape[1] and not one_for_all:
        raise UnsupportedError("attention with broadcast heads")
    if scale is None:
        head_dim = q.shape[3].constant
        if not head_dim:
            raise UnsupportedError("attention with a symbolic head size")
        scale = 1.0 / math.sqrt(head_dim)
    operands = [q, k, v]
    if mask is not None and is_causal:
        raise UnsupportedError("attention that is causal and has a mask")
    if mask is not None:
        if mask.dtype != torch.bool:
            mask = call.convert(mask, torch.float32)
        missing = 4 - len(mask.shape)
        operands.append(call.reshape(mask, (Dim.of(1),) * missing + mask.shape))
    return call.emit("attention", *operands, scale=float(scale), causal=is_causal)
