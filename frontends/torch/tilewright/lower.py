"""Lowering: a captured FX graph of pre-dispatch ATen becomes graph text for the core.

The ops are in the table (aten.py); this module walks the graph, keeps track of aliasing and
mutation, and says how the results of a run become what the caller expects (`Output`). An op that
the table does not take becomes a constant if it only computes with numbers (literals.py), else an
`external` node, which the front end runs through torch (host.py), with the reason in
`Lowered.externals`. What cannot be said at all raises
UnsupportedError, and the whole graph stays with torch.

Mutation: `index_copy_` on an input writes that input; other in-place ops on inputs are external and
write it too; in-place ops on intermediate values become their functional twins.

Tested by tests/python/test_lower.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright import (
    aten,
    aten_data,  # noqa: F401 - fills the table, too
    aten_elementwise,  # noqa: F401
    aten_products,  # noqa: F401
    dims,
    host,
    literals,
)
from tilewright.dims import Derived, Dim
from tilewright.graph_text import GraphBuilder, Type, UnsupportedError, Value, tensor_type
from tilewright.lowered import Lowered
from tilewright.outputs import Output, OutputPlanner, storage_key

NO_OPS = ("_set_grad_enabled", "_inference_mode", "_enter_inference_mode", "_exit_inference_mode")


class Call:
    """One ATen call being lowered: its result types, and ways to append nodes. See aten.py."""

    def __init__(self, builder: GraphBuilder, overload: str, name: str, types: list[Type]) -> None:
        self.builder, self.overload, self.name, self.types = builder, overload, name, types

    @property
    def type(self) -> Type:
        return self.types[0]

    def append(self, op: str, operands: Sequence[Value], type_: Type, **attributes: Any) -> Value:
        return self.builder.append(op, operands, type_, self.name, **attributes)

    def emit(self, op: str, *operands: Value, **attributes: Any) -> Value:
        """The node whose result is the call's result."""
        return self.append(op, operands, self.type, **attributes)

    def convert(self, x: Value, dtype: torch.dtype) -> Value:
        if x.dtype == dtype:
            return x
        return self.append("convert", [x], Type(dtype, x.shape), dtype=dtype)

    def reshape(self, x: Value, shape: tuple[Dim, ...]) -> Value:
        if x.shape == shape and not self.builder.keep_views:
            return x
        return self.append("reshape", [x], Type(x.dtype, shape), shape=list(shape))

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        if list(order) == list(range(len(order))):
            return x
        shape = tuple(x.shape[axis] for axis in order)
        return self.append("permute", [x], Type(x.dtype, shape), order=list(order))

    def expand(self, x: Value, shape: tuple[Dim, ...]) -> Value:
        if len(x.shape) != len(shape):
            x = self.reshape(x, (Dim.of(1),) * (len(shape) - len(x.shape)) + x.shape)
        if x.shape == shape and not self.builder.keep_views:
            return x
        return self.append("expand", [x], Type(x.dtype, shape), shape=list(shape))

    def slice(self, x: Value, axis: int, start: Dim, end: Dim, step: int, type_: Type) -> Value:
        whole = start.constant == 0 and end == x.shape[axis] and step == 1
        if whole and not self.builder.keep_views:
            return x
        attributes: dict[str, Any] = {"axis": axis, "start": [start], "end": [end]}
        if step != 1:
            attributes["step"] = step
        return self.append("slice", [x], type_, **attributes)

    def scalar(self, number: Any, dtype: torch.dtype) -> Value:
        """A 0-d operand of an op that computes in `dtype`.

        16-bit float ops take their scalar operands in fp32, as ATen does.
        """
        if dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32
        if isinstance(number, Dim):
            if number.constant is None:
                one = self.append(
                    "arange",
                    [],
                    Type(torch.int64, (Dim.of(1),)),
                    start=[number],
                    end=[number + 1],
                )
                return self.convert(self.reshape(one, ()), dtype)
            number = number.constant
        return self.builder.scalar(number, dtype)

    def promote(self, a: Any, b: Any, to: torch.dtype | None = None) -> tuple[Value, Value]:
        """Both operands in the type that ATen computes in: torch.result_type, or `to`."""
        common = to or torch.result_type(_stand_in(a), _stand_in(b))
        scalars = not any(isinstance(x, Value) and x.shape for x in (a, b))
        return self._operand(a, common, scalars), self._operand(b, common, scalars)

    def _operand(self, x: Any, common: torch.dtype, all_scalars: bool) -> Value:
        if not isinstance(x, Value):
            x = self.scalar(x, common)
        if common in (torch.bfloat16, torch.float16) and not x.shape and not all_scalars:
            return x if x.dtype == common else self.convert(x, torch.float32)
        return self.convert(x, common)


_STAND_INS: dict[tuple[torch.dtype, bool], torch.Tensor] = {}


def _stand_in(x: Any) -> Any:
    """What torch.result_type needs to know of an operand: type, and whether it has axes."""
    if isinstance(x, Dim):
        return 1
    if not isinstance(x, Value):
        return x
    key = (x.dtype, bool(x.shape))
    if key not in _STAND_INS:
        _STAND_INS[key] = torch.empty((1,) if x.shape else (), dtype=x.dtype, device="meta")
    return _STAND_INS[key]


class Lowerer:
    """Walks one captured graph. Subclassed by model_capture.py, which stamps layers."""

    def __init__(
        self, gm: GraphModule, name: str, frozen: Mapping[int, str], keep_views: bool = False
    ) -> None:
        self.gm = gm
        self.builder = GraphBuilder(name, keep_views)
        self.environment: dict[Node, Any] = {}
        self.externals: list[tuple[str, str]] = []
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.frozen = frozen
        self.inputs: list[int] = []
        self.mutated: set[int] = set()
        self.bindings: dict[str, tuple[int, int | None]] = {}
        self.derived: dict[str, Derived] = {}
        self.attributes: dict[int, str] = {}
        self._literals = literals.Literals(gm)
        self._positions = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._input_storage: dict[int, int] = {}  # storage -> placeholder
        self._sharing: dict[int, list[Node]] = {}
        for node in gm.graph.nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                self._sharing.setdefault(storage_key(node.meta["val"]), []).append(node)

    # --- the walk

    def run(self, tensors: Mapping[int, torch.Tensor]) -> Lowered:
        """`tensors`: the real tensor of each frozen placeholder."""
        return self._finish(self.walk(tensors))

    def walk(self, tensors: Mapping[int, torch.Tensor]) -> Node:
        """Lowers all nodes; returns the output node."""
        for i, node in enumerate(self.placeholders):
            self._placeholder(i, node, tensors.get(i))
        result: Node | None = None
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                result = node
            elif node.op != "placeholder":
                raise UnsupportedError(f"a {node.op} node in the captured graph")
        assert result is not None
        return result

    def _placeholder(self, index: int, node: Node, real: torch.Tensor | None) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            check_tensor(value)
            self._input_storage.setdefault(storage_key(value), index)
            if index in self.frozen:
                assert real is not None
                self.environment[node] = self.builder.constant(self.frozen[index], real)
                return
            parameter = self.builder.parameter(node.name, tensor_type(value.dtype, value.shape))
            self.inputs.append(index)
            self.environment[node] = parameter
            for axis, size in enumerate(parameter.shape):
                self._bind(size, index, axis)
        elif isinstance(value, torch.SymInt):
            self.environment[node] = size_of(value)
            self._bind(self.environment[node], index, None)
        elif isinstance(value, int | float | bool | str | None):
            self.environment[node] = value
        else:
            raise UnsupportedError(f"an input of type {type(value).__name__}")

    def _bind(self, size: Dim, index: int, axis: int | None) -> None:
        names = size.symbols()
        if len(names) == 1:
            name = next(iter(names))
            if size == Dim.symbol(name):
                self.bindings.setdefault(name, (index, axis))

    def _attribute(self, node: Node) -> None:
        target: Any = self.gm
        for part in str(node.target).split("."):
            target = getattr(target, part)
        if not isinstance(target, torch.Tensor):
            raise UnsupportedError(f"an attribute of type {type(target).__name__}")
        name = self.attributes.get(id(target), str(node.target))
        self.environment[node] = self.constant(name, target)

    def constant(self, name: str, tensor: torch.Tensor) -> Value:
        check_tensor(tensor)
        return self.builder.constant(name, tensor)

    def call(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            self.environment[node] = size_of(value)
            return
        if node.target is operator.getitem:
            self.environment[node] = self.operand(node.args[0])[node.args[1]]
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            name = getattr(node.target, "__name__", str(node.target))
            if name in NO_OPS:
                return
            if "autocast" in name:
                raise UnsupportedError("autocast inside the graph")
            raise UnsupportedError(f"a call of {name}")
        if str(node.target) in aten.DROPPED or node.target._schema.name == "prim::device":
            return
        arguments = bind_arguments(node)
        written = [
            i
            for i, a in enumerate(node.target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if written and str(node.target) not in aten.TABLE:
            self._call_in_place(node, arguments, written)
        else:
            self.environment[node] = self.emit_call(node, str(node.target), arguments)

    def operand(self, argument: Any) -> Any:
        """FX argument -> Values, Dims and plain Python."""
        if isinstance(argument, Node):
            if argument not in self.environment:
                raise UnsupportedError(f"a value of {argument.target} that has no meaning here")
            return self.environment[argument]
        if isinstance(argument, list | tuple):
            return [self.operand(item) for item in argument]
        if isinstance(argument, torch.SymInt):
            return size_of(argument)
        return argument

    def emit_call(self, node: Node, overload: str, arguments: list[Any]) -> Any:
        """Through the table, else as a literal, else as an external node."""
        values = [self.operand(argument) for argument in arguments]
        single = isinstance(node.meta.get("val"), torch.Tensor)
        call = Call(self.builder, overload, node.name, result_types(node))
        entry = aten.TABLE.get(overload)
        try:
            if entry is None:
                raise UnsupportedError(f"no lowering for {overload}")
            return entry(call, *values)
        except UnsupportedError as reason:
            literal = self._literals.value(node)
            if literal is not None:
                return self.constant(literals.name_of(literal), literal)
            return self.external(call, overload, values, str(reason), single)

    def external(
        self,
        call: Call,
        function: str,
        arguments: list[Any],
        reason: str,
        single: bool,
        mutates: list[int] | None = None,
    ) -> Any:
        if not call.types:
            raise UnsupportedError(f"{function} has no tensor result ({reason})")
        operands, text = host.encode_arguments(arguments)
        results = self.builder.append_many(
            "external",
            operands,
            call.types,
            call.name,
            function=function,
            arguments=text,
            mutates=mutates,
        )
        self.externals.append((function, reason))
        return results[0] if single else results

    # --- mutation

    def _call_in_place(self, node: Node, arguments: list[Any], written: list[int]) -> None:
        target = arguments[written[0]]
        if len(written) != 1 or not isinstance(target, Node):
            raise UnsupportedError(f"{node.target} writes more than one tensor")
        overload = str(node.target)
        self._refuse_stale_views(node, target)
        owner = self._input_storage.get(storage_key(target.meta["val"]))
        twin = aten.INPLACE_TWINS.get(overload, overload.replace("_.", "."))
        before = self.environment[target]
        if owner is None:
            if twin == "aten.index_copy.default":
                # The graph op writes its operand: give it a copy of its own.
                copied = self.builder.append("contiguous", [before], before.type, node.name)
                self.environment[target] = copied
            after = self.emit_call(node, twin, arguments)
            if after.dtype != before.dtype:
                call = Call(self.builder, overload, node.name, [before.type])
                after = call.convert(after, before.dtype)
        elif owner in self.frozen or before is not self.environment[self.placeholders[owner]]:
            raise UnsupportedError(f"{overload} writes a view of an input")
        else:
            self.mutated.add(owner)
            if twin == "aten.index_copy.default":
                after = self.emit_call(node, twin, arguments)
            else:
                values = [self.operand(argument) for argument in arguments]
                call = Call(self.builder, overload, node.name, [before.type])
                after = self.external(
                    call, overload, values, "an in-place op on an input", True, [0]
                )
        for other in self._sharing.get(storage_key(target.meta["val"]), []):
            if self.environment.get(other) is before:
                self.environment[other] = after
        self.environment[target] = self.environment[node] = after

    def _refuse_stale_views(self, node: Node, target: Node) -> None:
        """A view taken before the write and read after it would have to change with it."""
        here = self._positions[node]
        for other in self._sharing.get(storage_key(target.meta["val"]), []):
            if self.environment.get(other) is self.environment[target] or other is node:
                continue
            if self._positions[other] < here and any(
                self._positions[user] > here for user in other.users
            ):
                raise UnsupportedError(
                    f"a view ({other.name}) is read after {node.target} wrote it"
                )

    # --- the end

    def _finish(self, result: Node) -> Lowered:
        leaves, tree = pytree.tree_flatten(result.args[0])
        planner = OutputPlanner(self.builder, self.environment, self._input_storage, self._sharing)
        planner.announce(leaves)
        outputs = [planner.plan(leaf) for leaf in leaves]
        self.builder.remove_dead_nodes()
        self._drop_unused_inputs()
        shape_inputs = self._shape_inputs(outputs)
        return Lowered(
            text=self.builder.text(),
            constants=self.builder.constants(),
            inputs=self.inputs,
            shape_inputs=shape_inputs,
            bindings=self.bindings,
            derived=self.derived,
            at_most=self.builder.at_most,
            outputs=outputs,
            output_tree=tree,
            results=[value.type for value in self.builder.outputs],
            tokens=self._tokens(),
            mutated=frozenset(self.mutated),
            externals=self.externals,
        )

    def _tokens(self) -> Dim | None:
        """Queries of the first attention; without attention, rows of the first matrix product."""
        for op in ("attention", "linear", "matmul"):
            for node in self.builder.nodes:
                if node.op == op and len(node.operands[0].shape) > 1:
                    return node.operands[0].shape[-2]
        return None

    def _drop_unused_inputs(self) -> None:
        used = {id(v) for node in self.builder.nodes for v in node.operands}
        used |= {id(v) for v in self.builder.outputs}
        kept = [
            (parameter, index)
            for parameter, index in zip(self.builder.parameters, self.inputs, strict=True)
            if id(parameter) in used
        ]
        self.builder.parameters = [parameter for parameter, _ in kept]
        self.inputs = [index for _, index in kept]

    def _shape_inputs(self, outputs: Iterable[Output]) -> list[str]:
        """Symbols that no parameter's plain dimension shows get an empty parameter each.

        The core learns symbols from the shapes of its inputs; u8[symbol, 0] costs nothing.
        """
        shown = {
            str(size) for p in self.builder.parameters for size in p.shape if len(size.terms) == 1
        }
        needed = self.used_symbols()
        for output in outputs:
            needed |= output.symbols()
        for pair in self.builder.at_most:
            needed |= symbols_of(pair)
        self.derived = {name: dims.derived[name] for name in needed if name in dims.derived}
        unknown = sorted(dims.roots(needed) - self.bindings.keys())
        if unknown:
            raise UnsupportedError(f"no input tells the size {', '.join(unknown)}")
        missing = sorted(needed - shown)
        for name in missing:
            self.builder.parameter(
                f"shape.{name}", Type(torch.uint8, (Dim.symbol(name), Dim.of(0)))
            )
        return missing

    def used_symbols(self) -> set[str]:
        names: set[str] = set()
        for value in self.builder.parameters:
            names |= symbols_of(value.shape)
        for node in self.builder.nodes:
            for value in node.results:
                names |= symbols_of(value.shape)
            for attribute in node.attributes.values():
                if isinstance(attribute, list):
                    names |= symbols_of(d for d in attribute if isinstance(d, Dim))
            names |= host.symbols_of_arguments(node.attributes.get("arguments"))
        return names


def symbols_of(shape: Iterable[Dim]) -> set[str]:
    return {name for size in shape for name in size.symbols()}


def size_of(value: Any) -> Dim:
    try:
        return Dim.of(value)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def check_tensor(tensor: torch.Tensor) -> None:
    """Raises UnsupportedError for what the graph IR has no word for."""
    if tensor.layout != torch.strided:
        raise UnsupportedError(f"a tensor with layout {tensor.layout}")
    if tensor.device.type != "cpu":
        raise UnsupportedError(f"a tensor on device {tensor.device}")
    if tensor.is_complex() or tensor.is_quantized:
        raise UnsupportedError(f"a tensor of type {tensor.dtype}")


def result_types(node: Node) -> list[Type]:
    types = []
    for value in pytree.tree_leaves(node.meta.get("val")):
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"{node.target} returns a {type(value).__name__}")
        check_tensor(value)
        types.append(tensor_type(value.dtype, value.shape))
    return types


def bind_arguments(node: Node) -> list[Any]:
    """The call's arguments in schema order, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = list(node.args)
    for argument in node.target._schema.arguments[len(bound) :]:
        if argument.name in node.kwargs:
            bound.append(node.kwargs[argument.name])
        elif argument.has_default_value():
            bound.append(argument.default_value)
        else:
            raise UnsupportedError(f"{node.target} lacks its argument {argument.name}")
    return bound


def lower(
    gm: GraphModule,
    name: str = "graph",
    frozen: Mapping[int, tuple[str, torch.Tensor]] | None = None,
) -> Lowered:
    """A captured graph as text.

    `frozen`: placeholders that are constants, by position: their name and the tensor. Raises
    UnsupportedError if the graph cannot be said.
    """
    frozen = frozen or {}
    lowerer = Lowerer(gm, name, {i: source for i, (source, _) in frozen.items()})
    return lowerer.run({i: tensor for i, (_, tensor) in frozen.items()})
