"""TorchScript: a traced or scripted module's graph, executed by Python so that it can be captured.

Shapes are those of the example inputs, so sizes, lists and the conditions of `if` and loops are
plain Python; only calls of ATen on tensors reach the capture. What depends on the data of a tensor
is refused with a reason.

Tested by tests/python/test_frontends.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tilewright.graph_text import UnsupportedError

MAX_TRIPS = 4096

_PLAIN: dict[str, Callable[..., Any]] = {
    "aten::add": operator.add,
    "aten::sub": operator.sub,
    "aten::mul": operator.mul,
    "aten::div": operator.truediv,
    "aten::floordiv": operator.floordiv,
    "aten::floor_divide": operator.floordiv,
    "aten::remainder": operator.mod,
    "aten::neg": operator.neg,
    "aten::eq": operator.eq,
    "aten::ne": operator.ne,
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__not__": operator.not_,
    "aten::Int": int,
    "aten::Float": float,
    "aten::Bool": bool,
    "aten::ScalarImplicit": lambda x: x,
    "prim::NumToTensor": lambda x: x,
    "prim::min": min,
    "prim::max": max,
}
_ANY: dict[str, Callable[..., Any]] = {
    "aten::len": len,
    "aten::dim": lambda x: x.dim(),
    "aten::size": lambda x, *axis: x.size(*axis) if axis else list(x.shape),
    "aten::__getitem__": operator.getitem,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::append": lambda items, item: [items.append(item), items][1],
    "prim::dtype": lambda x: x.dtype,
    "prim::device": lambda x: x.device,
    "prim::unchecked_cast": lambda x: x,
    "prim::TupleIndex": operator.getitem,
    "prim::Uninitialized": lambda: None,
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::DictConstruct": lambda *items: dict(zip(items[::2], items[1::2], strict=True)),
}
_UNPACK = ("prim::ListUnpack", "prim::TupleUnpack")
_CONTAINERS = ("prim::ListConstruct", "prim::TupleConstruct", "prim::DictConstruct")
_READS_DATA = (
    "aten::Int",
    "aten::Float",
    "aten::Bool",
    "aten::ScalarImplicit",
    "aten::item",
    "aten::__contains__",
)
# A trace writes the number of `x * 2` as a 0-d tensor; the value computed is the same.
_TAKES_NUMBER = ("aten::add", "aten::sub", "aten::mul", "aten::div", "aten::pow")


def inlined_graph(module: torch.jit.ScriptModule) -> Any:
    graph = module.graph.copy()
    torch._C._jit_pass_inline(graph)
    return graph


def all_nodes(block: Any) -> list[Any]:
    """Of a graph or block, with those of its inner blocks."""
    found = []
    for node in block.nodes():
        found.append(node)
        for inner in node.blocks():
            found += all_nodes(inner)
    return found


def _is_tensor_constant(node: Any) -> bool:
    return bool(
        node.kind() == "prim::Constant" and isinstance(node.output().toIValue(), torch.Tensor)
    )


def constants(module: torch.jit.ScriptModule, graph: Any) -> dict[str, torch.Tensor]:
    """What the graph may read: parameters, buffers, and tensors that a freeze put in the graph."""
    tensors: dict[str, torch.Tensor] = {**dict(module.named_parameters())}
    tensors.update(module.named_buffers())
    for node in all_nodes(graph):
        if _is_tensor_constant(node) and node.output().toIValue().dim() > 0:
            tensors[_constant_name(node)] = node.output().toIValue().detach()
    return tensors


def _constant_name(node: Any) -> str:
    return f"constant.{node.output().debugName()}"


class Interpreter:
    """Runs `graph` once. `tensors`: stand-ins for `constants`, by name."""

    def __init__(self, module: Any, graph: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self._module, self._graph, self._tensors = module, graph, tensors
        self._values: dict[str, Any] = {}
        self.attributes: list[tuple[Any, str, Any]] = []  # read: module, name, value; no tensors

    def run(self, arguments: Sequence[Any]) -> Any:
        inputs = list(self._graph.inputs())
        self._values[inputs[0].debugName()] = ("", self._module)
        for value, argument in zip(inputs[1:], arguments, strict=True):
            self._values[value.debugName()] = argument
        outputs = self._block(self._graph)
        for value, result in zip(self._graph.outputs(), outputs, strict=True):
            _check_kept(value, result)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _block(self, block: Any) -> list[Any]:
        for node in block.nodes():
            results = self._node(node)
            for value, result in zip(node.outputs(), results, strict=True):
                self._values[value.debugName()] = result
        return [self._values[value.debugName()] for value in block.outputs()]

    def _node(self, node: Any) -> Sequence[Any]:
        """The results of one node, in order."""
        kind = node.kind()
        if kind == "prim::Constant":
            return [self._constant(node)]
        inputs = [self._values[value.debugName()] for value in node.inputs()]
        if kind == "prim::GetAttr":
            return [self._attribute(inputs[0], node.s("name"))]
        if kind == "prim::If":
            blocks = list(node.blocks())
            return self._block(blocks[0] if _condition(inputs[0]) else blocks[1])
        if kind == "prim::Loop":
            return self._loop(node, inputs)
        if kind == "prim::RaiseException":
            raise UnsupportedError(f"the module raises: {inputs[0]}")
        if kind in _UNPACK:
            return list(inputs[0])
        if kind in _CONTAINERS:
            for value, x in zip(node.inputs(), inputs, strict=True):
                _check_kept(value, x)
            if kind == "prim::TupleConstruct" and not str(node.output().type()).startswith("("):
                raise UnsupportedError("a named tuple")
        result = self._call(node, kind, inputs)
        return [] if node.outputsSize() == 0 else [result]

    def _constant(self, node: Any) -> Any:
        value = node.output().toIValue()
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return self._tensors[_constant_name(node)]
        return value

    def _attribute(self, owner: Any, name: str) -> Any:
        path, module = owner
        full = f"{path}.{name}" if path else name
        if full in self._tensors:
            return self._tensors[full]
        value = getattr(module, name)
        if isinstance(value, torch.nn.Module):
            return (full, value)
        if isinstance(value, torch.Tensor):
            raise UnsupportedError(f"the attribute {full} is a tensor but no buffer")
        self.attributes.append((module, name, value))
        return value

    def _loop(self, node: Any, inputs: list[Any]) -> list[Any]:
        (block,) = node.blocks()
        formals = [value.debugName() for value in block.inputs()]
        trips, going, *carried = inputs
        trip = 0
        while trip < trips and _condition(going):
            if trip == MAX_TRIPS:
                raise UnsupportedError(f"a loop of more than {MAX_TRIPS} trips")
            self._values.update(zip(formals, [trip, *carried], strict=True))
            going, *carried = self._block(block)
            trip += 1
        return carried

    def _call(self, node: Any, kind: str, inputs: list[Any]) -> Any:
        if kind in _ANY:
            return _ANY[kind](*inputs)
        if kind == "aten::_convolution" and not inputs[6] and 3 <= inputs[1].dim() <= 5:
            # What a trace makes of conv1d, conv2d and conv3d.
            convolution = getattr(torch.ops.aten, f"conv{inputs[1].dim() - 2}d")
            return convolution(*inputs[:6], inputs[8])
        if not any(_has_tensor(x) for x in inputs) and kind in _PLAIN:
            # Trailing numbers are `alpha` and the like; a trace counts sizes with them.
            two = kind in ("aten::add", "aten::sub") and len(inputs) == 3
            return _PLAIN[kind](*(inputs[:2] if two and inputs[2] == 1 else inputs))
        if kind in _READS_DATA:
            raise UnsupportedError(f"control flow or a size depends on data ({kind})")
        if not kind.startswith("aten::") or node.schema() == "(no schema)":
            raise UnsupportedError(f"no meaning for {kind} of TorchScript")
        return _aten(node, kind, inputs)


def _aten(node: Any, kind: str, inputs: list[Any]) -> Any:
    schema = torch._C.parse_schema(node.schema())
    packet = getattr(torch.ops.aten, kind.removeprefix("aten::"), None)
    overload = getattr(packet, schema.overload_name or "default", None)
    if overload is None:
        raise UnsupportedError(f"no overload {kind}.{schema.overload_name}")
    first = inputs[0] if inputs else None
    if kind in _TAKES_NUMBER and isinstance(first, torch.Tensor) and first.is_floating_point():
        inputs = [
            x.item() if i == 1 and _is_number(x) and first.dim() else x
            for i, x in enumerate(inputs)
        ]
    formals = overload._schema.arguments
    positional = [x for x, formal in zip(inputs, formals, strict=True) if not formal.kwarg_only]
    named = {formal.name: x for x, formal in zip(inputs, formals, strict=True) if formal.kwarg_only}
    # A number in a tensor's place needs the packet's choice of overload.
    call: Any = packet if overload._schema.overload_name == "Tensor" else overload
    return call(*positional, **named)


def _check_kept(value: Any, result: Any) -> None:
    """Sizes that a trace holds in tensors are numbers here; as results they would differ."""
    if value.type().kind() == "TensorType" and not isinstance(result, torch.Tensor):
        raise UnsupportedError("a size is returned as a tensor")


def _is_number(x: Any) -> bool:
    return type(x) is torch.Tensor and x.dim() == 0 and x.dtype in (torch.int64, torch.float64)


def _has_tensor(x: Any) -> bool:
    if isinstance(x, list | tuple):
        return any(_has_tensor(item) for item in x)
    return isinstance(x, torch.Tensor)


def _condition(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        raise UnsupportedError("control flow depends on the data of a tensor")
    return bool(value)
