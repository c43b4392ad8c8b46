"""An evaluator of graph text in torch ops: an oracle that shares no code with the front end.

It parses the text form on its own and computes each op by its definition in graph/op_list.def, so a
wrong lowering, a wrong printer or a wrong attribute shows as a wrong number.

Used by the Python tests; checked against the core's parser where the core is built.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
SYMBOL = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Line:
    results: list[str]
    op: str
    operands: list[str]
    attributes: dict[str, str]
    types: list[str]


@dataclass
class Graph:
    parameters: list[tuple[str, str]]
    lines: list[Line] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass
class Cache:
    """[b, heads, s, d] tensors that grow, and the first key of each sequence that counts."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    first_keys: list[int] | None = None


def split_top_level(text: str) -> list[str]:
    """Splits at commas outside brackets and strings."""
    parts, depth, quoted, start = [], 0, False, 0
    for i, c in enumerate(text):
        if c == '"' and (i == 0 or text[i - 1] != "\\"):
            quoted = not quoted
        if quoted:
            continue
        depth += (c in "[(<{") - (c in "])>}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def parse(text: str) -> Graph:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    header = lines[0]
    inside = header[header.index("(") + 1 : header.index(") -> (")]
    named = (part[1:].partition(": ") for part in split_top_level(inside))
    graph = Graph([(name, type_text) for name, _, type_text in named])
    for line in lines[1:]:
        if line == "}":
            continue
        if line.startswith("return"):
            graph.outputs = [part[1:] for part in split_top_level(line[len("return") :])]
            continue
        left, right = line.split(" = ", 1)
        results = [part[1:] for part in split_top_level(left)]
        right, types = right.rsplit(" : ", 1)
        if right.startswith("const "):
            attributes = {"source": right[len("const ") :]}
            graph.lines.append(Line(results, "const", [], attributes, [types]))
            continue
        attributes = {}
        if right.endswith("}"):
            start = right.index(" {")
            for item in split_top_level(right[start + 2 : -1]):
                key, value = item.split(" = ", 1)
                attributes[key] = value
            right = right[:start]
        op, operands = ([*right[:-1].split("(", 1), ""])[:2] if "(" in right else (right, "")
        graph.lines.append(
            Line(results, op, [p[1:] for p in split_top_level(operands)], attributes, [types])
        )
    return graph


def evaluate_dim(text: str, symbols: dict[str, int]) -> int:
    replaced = SYMBOL.sub(lambda match: str(symbols[match.group()]), text)
    assert re.fullmatch(r"[\d\s+*\-()]+", replaced), replaced
    return int(eval(replaced))  # digits and operators only


def dims(text: str, symbols: dict[str, int]) -> list[int]:
    return [evaluate_dim(part, symbols) for part in split_top_level(text.strip()[1:-1])]


def type_of(text: str, symbols: dict[str, int]) -> tuple[torch.dtype, list[int]]:
    name, shape = text.split("[", 1)
    return DTYPES[name], dims("[" + shape, symbols)


def bind(graph: Graph, inputs: list[torch.Tensor]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    tensors = [p for p in graph.parameters if not p[1].startswith("cache")]
    for (_, type_text), tensor in zip(tensors, inputs, strict=True):
        sizes = split_top_level(type_text.split("[", 1)[1][:-1])
        for text, size in zip(sizes, tensor.shape, strict=True):
            if SYMBOL.fullmatch(text):
                assert symbols.setdefault(text, size) == size, (
                    f"{text} is {symbols[text]} and {size}"
                )
    for (name, type_text), tensor in zip(tensors, inputs, strict=True):
        dtype, shape = type_of(type_text, symbols)
        assert tensor.dtype == dtype and list(tensor.shape) == shape, (
            name,
            type_text,
            tensor.shape,
        )
    return symbols


def attention(line: Line, operands: list) -> torch.Tensor:
    q = operands[0]
    scale = float(line.attributes["scale"])
    length = q.shape[2]
    if isinstance(operands[1], Cache):
        cache = operands[1]
        k, v = cache.keys, cache.values
        total = k.shape[2]
        allowed = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        allowed = allowed.expand(q.shape[0], 1, length, total).clone()
        for b, first in enumerate(cache.first_keys or []):
            allowed[b, :, :, :first] = False
    else:
        k, v = operands[1], operands[2]
        allowed = torch.ones(length, k.shape[2], dtype=torch.bool)
        if line.attributes["causal"] == "true":
            allowed = allowed.tril()
        if len(operands) == 4:
            mask = operands[3]
            allowed = allowed & mask if mask.dtype == torch.bool else allowed
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    scores = (q.double() @ k.transpose(-1, -2)) * scale
    if len(operands) == 4 and operands[3].dtype != torch.bool:
        scores = scores + operands[3].double()
    weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), -1).nan_to_num(0.0)
    return (weights @ v).to(q.dtype)


UNARY = {
    name: getattr(torch, name)
    for name in re.split(
        r"\s+",
        "neg abs reciprocal sqrt rsqrt exp expm1 log log1p sin cos tanh erf sigmoid relu "
        "logical_not",
    )
}
BINARY = {
    name: getattr(torch, name)
    for name in re.split(
        r"\s+", "add sub mul div maximum minimum eq ne lt le gt ge logical_and logical_or matmul"
    )
}


def external(line: Line, operands: list, symbols: dict[str, int]) -> list[torch.Tensor]:
    name = json.loads(line.attributes["function"])
    namespace, packet, overload = name.split(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    def decode(item):
        if isinstance(item, list):
            return [decode(part) for part in item]
        if not isinstance(item, dict):
            return item
        ((kind, value),) = item.items()
        if kind == "tensor":
            return operands[value]
        if kind == "dim":
            return sum(math.prod([f, *(symbols[n] for n in names)]) for names, f in value)
        decoders = {"float": float, "device": torch.device}
        return decoders.get(kind, lambda name: getattr(torch, name))(value)

    arguments = [decode(item) for item in json.loads(json.loads(line.attributes["arguments"]))]
    keywords = {
        formal.name: arguments.pop(i)
        for i, formal in reversed(list(enumerate(operator._schema.arguments)))
        if formal.kwarg_only
    }
    results = operator(*arguments, **keywords)
    return [results] if isinstance(results, torch.Tensor) else list(results)


def compute(line: Line, operands: list, constants: dict, symbols: dict[str, int]) -> list:
    op, a = line.op, line.attributes
    x = operands[0] if operands else None
    if op == "const":
        return [constants[json.loads(a["source"])]]
    if op == "scalar":
        return [torch.tensor(float(a["value"])).to(DTYPES[a.get("dtype", "f32")])]
    if op == "arange":
        start, end = dims(a["start"], symbols)[0], dims(a["end"], symbols)[0]
        return [torch.arange(start, end)]
    if op == "reshape":
        return [x.reshape(dims(a["shape"], symbols))]
    if op == "expand":
        return [x.expand(dims(a["shape"], symbols))]
    if op == "permute":
        return [x.permute(dims(a["order"], symbols))]
    if op == "slice":
        start, end = dims(a["start"], symbols)[0], dims(a["end"], symbols)[0]
        axis, step = int(a["axis"]), int(a.get("step", "1"))
        assert 0 <= start <= end <= x.shape[axis], "slice bounds must be normalised"
        return [x[(slice(None),) * axis + (slice(start, end, step),)]]
    if op in UNARY:
        return [UNARY[op](x)]
    if op in BINARY:
        return [BINARY[op](*operands)]
    if op == "where":
        return [torch.where(*operands)]
    if op == "pow":
        return [x ** float(a["exponent"])]
    if op == "silu":
        return [F.silu(x)]
    if op == "gelu":
        return [F.gelu(x, approximate=json.loads(a.get("approximate", '"none"')))]
    if op == "convert":
        return [x.to(DTYPES[a["dtype"]])]
    if op in ("sum", "mean", "amax"):
        return [getattr(x, op)(-1, keepdim=True)]
    if op == "softmax":
        return [torch.softmax(x, -1)]
    if op == "rms_norm":
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + float(a["eps"]))
        return [y.to(x.dtype) if len(operands) == 1 else y.to(x.dtype) * operands[1]]
    if op == "layer_norm":
        return [F.layer_norm(x, x.shape[-1:], *operands[1:], eps=float(a["eps"]))]
    if op == "linear":
        assert len(operands) == (3 if a.get("bias") == "true" else 2)
        weight = operands[1].t() if a.get("transposed") == "true" else operands[1]
        return [F.linear(x, weight, *operands[2:])]
    if op in ("top_values", "top_indices"):
        return [x.topk(int(a["count"]))[op == "top_indices"]]
    if op == "gather":
        return [x.gather(-1, operands[1])]
    if op == "cumsum":
        return [x.cumsum(-1)]
    if op == "embedding":
        return [x[operands[1]]]
    if op == "cat":
        return [torch.cat(operands, int(a["axis"]))]
    if op == "contiguous":
        return [x.clone(memory_format=torch.contiguous_format)]
    if op == "index_copy":
        return [x.index_copy_(int(a["axis"]), *operands[1:])]
    if op == "kv_append":
        x.keys = operands[1] if x.keys is None else torch.cat([x.keys, operands[1]], 2)
        x.values = operands[2] if x.values is None else torch.cat([x.values, operands[2]], 2)
        return [x]
    if op == "attention":
        return [attention(line, operands)]
    if op == "external":
        return external(line, operands, symbols)
    raise AssertionError(f"unknown op {op}")


def evaluate(
    text: str,
    constants: dict[str, torch.Tensor],
    inputs: list[torch.Tensor],
    caches: list[Cache] | None = None,
) -> list[torch.Tensor]:
    """Runs the graph. Every stated result type is checked against the computed tensor."""
    graph = parse(text)
    symbols = bind(graph, inputs)
    tensors, given_caches = iter(inputs), iter(caches or [])
    values: dict = {}
    for name, type_text in graph.parameters:
        values[name] = next(given_caches if type_text.startswith("cache") else tensors)
    for line in graph.lines:
        results = compute(line, [values[name] for name in line.operands], constants, symbols)
        types = split_top_level(line.types[0].strip("()")) if line.results else []
        for name, result, type_text in zip(line.results, results, types, strict=True):
            if not type_text.startswith("cache"):
                dtype, shape = type_of(type_text, symbols)
                assert (result.dtype, list(result.shape)) == (dtype, shape), (line, result.shape)
            values[name] = result
    return [values[name] for name in graph.outputs]
