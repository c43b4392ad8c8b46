"""The fallback: nodes that the core does not run itself, run through torch.

The core hands over a function name, its attributes and views of its memory; `run` computes into
the output views. Two kinds of functions arrive: ATen overloads of `external` nodes, whose arguments
this module has encoded as JSON, and graph ops without a kernel (or switched off by the user), with
their attributes in the graph's text form.

Tested by tests/python/test_lower.py, tests/python/test_backend.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.dims import Dim
from tilewright.graph_text import DTYPE_NAMES, DTYPES, UnsupportedError, Value

# --- arguments of external nodes


def encode_arguments(arguments: Sequence[Any]) -> tuple[list[Value], str]:
    """Tensor operands in order, and the whole argument list as JSON with references to them."""
    operands: list[Value] = []

    def encode(argument: Any) -> Any:
        if isinstance(argument, Value):
            operands.append(argument)
            return {"tensor": len(operands) - 1}
        if isinstance(argument, Dim):
            if argument.constant is not None:
                return argument.constant
            return {"dim": [[list(product), factor] for product, factor in argument.terms]}
        if isinstance(argument, list | tuple):
            return [encode(item) for item in argument]
        if isinstance(argument, float) and not math.isfinite(argument):
            return {"float": repr(argument)}
        if isinstance(argument, torch.dtype):
            return {"dtype": str(argument).removeprefix("torch.")}
        if isinstance(argument, torch.device):
            return {"device": str(argument)}
        if isinstance(argument, torch.layout | torch.memory_format):
            return {"torch": str(argument).removeprefix("torch.")}
        if argument is None or isinstance(argument, bool | int | float | str):
            return argument
        raise UnsupportedError(f"an argument of type {type(argument).__name__}")

    encoded = [encode(argument) for argument in arguments]
    return operands, json.dumps(encoded, separators=(",", ":"))


def decode_arguments(
    text: str, tensors: Sequence[torch.Tensor], symbols: Mapping[str, int]
) -> list[Any]:
    def decode(argument: Any) -> Any:
        if isinstance(argument, list):
            return [decode(item) for item in argument]
        if not isinstance(argument, dict):
            return argument
        ((kind, value),) = argument.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dim":
            return Dim(tuple((tuple(p), factor) for p, factor in value)).evaluate(symbols)
        if kind == "float":
            return float(value)
        if kind == "device":
            return torch.device(value)
        return getattr(torch, value)

    return [decode(argument) for argument in json.loads(text)]


def symbols_of_arguments(text: str | None) -> set[str]:
    if text is None or '"dim"' not in text:
        return set()
    names: set[str] = set()

    def visit(argument: Any) -> None:
        if isinstance(argument, list):
            for item in argument:
                visit(item)
        elif isinstance(argument, dict) and "dim" in argument:
            names.update(name for product, _ in argument["dim"] for name in product)

    visit(json.loads(text))
    return names


def overload(name: str) -> Any:
    """`aten.cumsum.default` -> the operator. AttributeError when torch does not have it."""
    namespace, packet, variant = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), variant)


def call(operator: Any, arguments: Sequence[Any]) -> Any:
    """Calls an overload with its arguments in schema order."""
    formal = operator._schema.arguments
    positional = [a for a, f in zip(arguments, formal, strict=True) if not f.kwarg_only]
    keywords = {f.name: a for a, f in zip(arguments, formal, strict=True) if f.kwarg_only}
    return operator(*positional, **keywords)


# --- attributes of graph ops

_ATTRIBUTE = re.compile(r'(\w+) = ("(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,}]+)')


def parse_attributes(text: str) -> dict[str, str]:
    """`{eps = 1e-05, order = [0, 2, 1]}` -> the values' text."""
    return {key: value.strip() for key, value in _ATTRIBUTE.findall(text)}


def _string(text: str) -> str:
    return str(json.loads(text))


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.strip("[]").split(",") if part.strip()]


def _activation(name: str, x: torch.Tensor) -> torch.Tensor:
    table: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "": lambda y: y,
        "none": lambda y: y,
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return table[name](x)


def _linear(attributes: dict[str, str], x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weight, *extra = rest
    if attributes.get("transposed") == "true":
        weight = weight.t()
    bias = extra.pop(0) if attributes.get("bias") == "true" else None
    y = _activation(_string(attributes.get("activation", '""')), F.linear(x, weight, bias))
    return y + extra.pop(0) if attributes.get("residual") == "true" else y


def _expert_linear(
    attributes: dict[str, str],
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *bias: torch.Tensor,
) -> torch.Tensor:
    rows = x.repeat_interleave(indices.shape[1], 0)
    if attributes.get("transposed") == "true":
        weights = weights.transpose(1, 2)
    y = x.new_empty(rows.shape[0], weights.shape[1])
    chosen = indices.flatten()
    for expert in chosen.unique().tolist():
        own = chosen == expert
        y[own] = F.linear(rows[own], weights[expert], *(b[expert] for b in bias))
    return y


def _rms_norm(attributes: dict[str, str], x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + float(attributes["eps"]))
    if attributes.get("plus_one") == "true":
        return (y * (1.0 + weight[0].float())).to(x.dtype)
    return y.to(x.dtype) * weight[0] if weight else y.to(x.dtype)


def _layer_norm(attributes: dict[str, str], x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    weight, bias = (*rest, None, None)[:2]
    return F.layer_norm(x, x.shape[-1:], weight, bias, float(attributes["eps"]))


def _rope(
    attributes: dict[str, str], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + rotated * sin


def _attention(
    attributes: dict[str, str],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *more: torch.Tensor,
) -> torch.Tensor:
    special = attributes.keys() & {"window", "softcap", "slopes", "sinks"}
    if special:
        return _attention_in_steps(attributes, q, k, v, *more)
    mask = more[0] if more else None
    causal = attributes.get("causal") == "true"
    if mask is not None and causal:
        below = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -math.inf)
        causal = False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=float(attributes["scale"]), enable_gqa=True
    )


def _attention_in_steps(
    attributes: dict[str, str],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *more: torch.Tensor,
) -> torch.Tensor:
    """What ATen has no op for: a window, a cap on the scores, slopes (ALiBi), sinks."""
    extra = list(more)
    sinks = extra.pop() if attributes.get("sinks") == "true" else None
    slopes = extra.pop() if attributes.get("slopes") == "true" else None
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    scores = q.float() @ k.transpose(-1, -2) * float(attributes["scale"])
    if "softcap" in attributes:
        cap = float(attributes["softcap"])
        scores = torch.tanh(scores / cap) * cap
    places = torch.arange(k.shape[-2])
    if slopes is not None:
        scores = scores + slopes[:, None, None] * places
    if extra:
        mask = extra[0]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if attributes.get("causal") == "true":
        distance = torch.arange(q.shape[-2])[:, None] - places
        window = int(attributes.get("window", k.shape[-2]))
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
    if sinks is not None:
        column = sinks[:, None, None].float().expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[-2]].nan_to_num(0.0)
    return (weights @ v).to(q.dtype)


def _gated_mlp_up(
    attributes: dict[str, str], x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    return _activation(_string(attributes["activation"]), F.linear(x, gate)) * F.linear(x, up)


def _index_copy(
    attributes: dict[str, str], x: torch.Tensor, index: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    return x.index_copy_(int(attributes["axis"]), index, source)


def _plain(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda attributes, *operands: function(*operands)


_TORCH_FUNCTIONS = """
    add sub mul div maximum minimum neg abs reciprocal sqrt rsqrt exp expm1 log log1p
    sin cos tanh erf sigmoid relu where eq ne lt le gt ge logical_and logical_or logical_not matmul
"""
GRAPH_OPS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: _plain(getattr(torch, name)) for name in re.findall(r"\w+", _TORCH_FUNCTIONS)},
    "silu": _plain(F.silu),
    "gelu": lambda a, x: F.gelu(x, approximate=_string(a.get("approximate", '"none"'))),
    "pow": lambda a, x: torch.pow(x, float(a["exponent"])),
    "convert": lambda a, x: x.to(DTYPES[a["dtype"]]),
    "sum": lambda a, x: x.sum(-1, keepdim=True),
    "mean": lambda a, x: x.mean(-1, keepdim=True),
    "amax": lambda a, x: x.amax(-1, keepdim=True),
    "softmax": lambda a, x: torch.softmax(x, -1),
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "expert_linear": _expert_linear,
    "gated_mlp_up": _gated_mlp_up,
    "embedding": lambda a, table, indices: F.embedding(indices, table),
    "top_values": lambda a, x: x.topk(int(a["count"])).values,
    "top_indices": lambda a, x: x.topk(int(a["count"])).indices,
    "gather": lambda a, x, indices: x.gather(-1, indices),
    "cumsum": lambda a, x: x.cumsum(-1),
    "cat": lambda a, *pieces: torch.cat(pieces, int(a["axis"])),
    "contiguous": lambda a, x: x,
    "index_copy": _index_copy,
    "rope": _rope,
    "attention": _attention,
    "permute": lambda a, x: x.permute(_ints(a["order"])),
}


def run(
    function: str,
    attributes: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    symbols: Mapping[str, int],
) -> None:
    """Computes `function` into `outputs`. Raises whatever torch raises."""
    with torch.no_grad():
        if "." in function:
            results = call(overload(function), decode_arguments(attributes, inputs, symbols))
        elif function in ("reshape", "expand"):  # the output's shape is the attribute
            x = inputs[0]
            shape = outputs[0].shape
            results = x.reshape(shape) if function == "reshape" else x.expand(shape)
        else:
            results = GRAPH_OPS[function](parse_attributes(attributes), *inputs)
        if isinstance(results, torch.Tensor):
            results = (results,)
        for output, result in zip(outputs, results, strict=True):
            output.copy_(result)


__all__ = ["DTYPE_NAMES", "GRAPH_OPS", "encode_arguments", "run"]
