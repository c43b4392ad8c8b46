"""The graph IR as Python sees it: build nodes, print the text that the core parses.

The grammar and the ops are the core's (graph/graph.h, graph/op_list.def); nothing here checks
types, the core's verifier does, and says on which line.

Tested by tests/python/test_lower.py (through tests/python/graph_evaluator.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tilewright.dims import Dim

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_NAME = re.compile(r"[A-Za-z0-9_.]+")
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class UnsupportedError(Exception):
    """What we were asked to lower is outside our domain; the message is the reason users see."""


class Type(NamedTuple):
    """An element type and a shape; ``is_cache`` marks the key/value cache of one layer."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    is_cache: bool = False

    def __str__(self) -> str:
        name = DTYPE_NAMES.get(self.dtype)
        if name is None:
            raise UnsupportedError(f"element type {self.dtype} is not supported")
        if self.is_cache:
            return f"cache<{name}, {' x '.join(map(str, self.shape))}>"
        return f"{name}[{', '.join(map(str, self.shape))}]"


def tensor_type(dtype: torch.dtype, shape: Iterable[Any]) -> Type:
    """Sizes may be ints, SymInts or Dims. Raises UnsupportedError for a size that is none."""
    try:
        return Type(dtype, tuple(Dim.of(size) for size in shape))
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


@dataclass(frozen=True, eq=False, repr=False)
class Value:
    """One SSA value; identity is equality."""

    name: str
    type: Type

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.type.dtype


@dataclass(eq=False, repr=False)
class Node:
    op: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)
    source: torch.Tensor | None = None  # of a constant: the tensor that its name is bound to

    @property
    def stays(self) -> bool:
        """Needed even if nobody uses its results: it writes, or it marks a place (expand.py)."""
        if self.op in ("index_copy", "kv_append", "layer_input", "layer_output"):
            return True
        return bool(self.attributes.get("mutates"))


def is_source(node: Node) -> bool:
    return node.op in ("constant", "scalar")


class GraphBuilder:
    """Collects nodes in execution order. Not thread-safe."""

    def __init__(self, name: str, keep_views: bool = False) -> None:
        """`keep_views`: views that change nothing at these sizes may at others, so they stay."""
        self.name = name
        self.keep_views = keep_views
        self.parameters: list[Value] = []
        self.nodes: list[Node] = []
        self.outputs: list[Value] = []
        self.at_most: list[tuple[Dim, Dim]] = []  # what a call's sizes must obey: first <= second
        self._names: dict[str, int] = {}
        self._constants: dict[str, Value] = {}
        self._scalars: dict[tuple[str, torch.dtype], Value] = {}

    def unique(self, name: str) -> str:
        """`name`, or `name.1`, `name.2` ... when it is taken."""
        if not _NAME.fullmatch(name):
            name = re.sub(r"[^A-Za-z0-9_.]", "_", name) or "v"
        count = self._names.get(name)
        self._names[name] = 0 if count is None else count + 1
        return name if count is None else self.unique(f"{name}.{count + 1}")

    def parameter(self, name: str, type_: Type) -> Value:
        value = Value(self.unique(name), type_)
        self.parameters.append(value)
        return value

    def constant(self, source: str, tensor: torch.Tensor) -> Value:
        """The weight named `source`; one node per name."""
        found = self._constants.get(source)
        if found is not None:
            return found
        value = Value(self.unique(f"w.{source}"), tensor_type(tensor.dtype, tensor.shape))
        self.nodes.append(Node("constant", [], [value], {"source": source}, tensor))
        self._constants[source] = value
        return value

    def scalar(self, number: float, dtype: torch.dtype) -> Value:
        key = (repr(float(number)), dtype)
        if key not in self._scalars:
            stated = None if dtype == torch.float32 else dtype
            self._scalars[key] = self.append(
                "scalar", [], tensor_type(dtype, ()), "c", value=float(number), dtype=stated
            )
        return self._scalars[key]

    def adopt(self, node: Node) -> None:
        """Appends a node that was made elsewhere, its values' names being unique here."""
        self.nodes.append(node)
        if node.op == "constant":
            self._constants[node.attributes["source"]] = node.results[0]

    def append(
        self, op: str, operands: Sequence[Value], type_: Type, name: str = "v", **attributes: Any
    ) -> Value:
        """One node with one result."""
        return self.append_many(op, operands, [type_], name, **attributes)[0]

    def append_many(
        self,
        op: str,
        operands: Sequence[Value],
        types: Sequence[Type],
        name: str = "v",
        **attributes: Any,
    ) -> list[Value]:
        results = [Value(self.unique(name), type_) for type_ in types]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(Node(op, list(operands), results, kept))
        return results

    def producer(self, value: Value) -> Node | None:
        """The node whose result it is; None for parameters."""
        for node in reversed(self.nodes):
            if any(result is value for result in node.results):
                return node
        return None

    def remove_dead_nodes(self) -> None:
        """Drops what neither an output nor a mutation needs."""
        live = {id(value) for value in self.outputs}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.stays or any(id(result) in live for result in node.results):
                live.update(id(operand) for operand in node.operands)
                kept.append(node)
        self.nodes = kept[::-1]

    def constants(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of the constants that are left."""
        return {
            node.attributes["source"]: node.source
            for node in self.nodes
            if node.op == "constant" and node.source is not None
        }

    def text(self) -> str:
        parameters = ", ".join(f"%{value.name}: {value.type}" for value in self.parameters)
        results = ", ".join(str(value.type) for value in self.outputs)
        lines = [f"graph {self.name}({parameters}) -> ({results}) {{"]
        lines += [f"  {print_node(node)}" for node in self.nodes]
        returned = ", ".join(f"%{value.name}" for value in self.outputs)
        lines.append(f"  return {returned}" if returned else "  return")
        lines.append("}")
        return "\n".join(lines) + "\n"


def print_node(node: Node) -> str:
    results = ", ".join(f"%{value.name}" for value in node.results)
    types = ", ".join(str(value.type) for value in node.results)
    if node.op == "constant":
        return f"{results} = const {_quote(node.attributes['source'])} : {types}"
    operands = ", ".join(f"%{value.name}" for value in node.operands)
    text = f"{results} = {node.op}({operands})"
    if node.attributes:
        text += f" {print_attributes(node.attributes)}"
    return f"{text} : {types if len(node.results) == 1 else f'({types})'}"


def print_attributes(attributes: Mapping[str, Any]) -> str:
    """Keys in alphabetical order, as the core prints them."""
    items = (f"{key} = {_print_attribute(attributes[key])}" for key in sorted(attributes))
    return "{" + ", ".join(items) + "}"


def _print_attribute(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isinf(value) or math.isnan(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return repr(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return str(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
