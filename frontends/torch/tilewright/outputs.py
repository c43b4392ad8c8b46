"""Outputs: how the results of a program become what the traced graph returned.

Dynamo-level backends have no wrapper that mends aliasing (torch's AOTAutograd has): an output that
is an input, or a view of one, must share its memory, and strides must be those that were traced,
since later graphs guard on them.

Tested by tests/python/test_lower.py, tests/python/test_backend.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tilewright.dims import Dim, NotPolynomialError
from tilewright.graph_text import GraphBuilder, Type, UnsupportedError, Value, tensor_type


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory (fake tensors too), while they live."""
    return int(tensor.untyped_storage()._cdata)


ZERO = Dim(())


@dataclass(frozen=True)
class Output:
    """One leaf of the result.

    kind "result": the program's output `index`, its axes put in `order`.
    kind "input": the caller's argument `index` itself.
    kind "view_of_input" / "view_of_result": that memory with a geometry of its own.
    kind "size": an integer. kind "plain": `value` as it is.
    """

    kind: str
    index: int = 0
    order: tuple[int, ...] | None = None
    shape: tuple[Dim, ...] = ()
    strides: tuple[Dim, ...] = ()
    offset: Dim = ZERO
    value: Any = None

    def symbols(self) -> set[str]:
        sizes = (*self.shape, *self.strides, self.offset)
        return {name for size in sizes for name in size.symbols()}

    def make(
        self,
        results: Sequence[torch.Tensor],
        arguments: Sequence[Any],
        symbols: Mapping[str, int],
    ) -> Any:
        """From the program's outputs, the caller's arguments and the call's symbols."""
        if self.kind == "result":
            result = results[self.index]
            return result if self.order is None else result.permute(self.order)
        if self.kind == "input":
            return arguments[self.index]
        if self.kind == "plain":
            return self.value
        if self.kind == "size":
            return self.offset.evaluate(symbols)
        base = arguments[self.index] if self.kind == "view_of_input" else results[self.index]
        # A parameter that requires grad yields views that do; inference never wants those.
        return base.detach().as_strided(
            [size.evaluate(symbols) for size in self.shape],
            [stride.evaluate(symbols) for stride in self.strides],
            self.offset.evaluate(symbols),
        )


class OutputPlanner:
    """Decides the Output of each leaf and adds the program outputs that they need."""

    def __init__(
        self,
        builder: GraphBuilder,
        environment: Mapping[Node, Any],
        input_storage: Mapping[int, int],
        sharing: Mapping[int, list[Node]],
    ) -> None:
        self.builder, self.environment = builder, environment
        self.input_storage, self.sharing = input_storage, sharing
        self._planned: dict[Node, Output] = {}
        self._bases: dict[int, int] = {}  # storage -> program output that holds all of it
        self._leaf_storage: dict[int, set[Node]] = {}

    def announce(self, leaves: Sequence[Any]) -> None:
        """All leaves first: which memory is returned more than once."""
        for leaf in leaves:
            if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor):
                self._leaf_storage.setdefault(storage_key(leaf.meta["val"]), set()).add(leaf)

    def plan(self, leaf: Any) -> Output:
        if not isinstance(leaf, Node):
            return Output("plain", value=leaf)
        if leaf not in self._planned:
            self._planned[leaf] = self._plan_node(leaf)
        return self._planned[leaf]

    def _plan_node(self, node: Node) -> Output:
        traced = node.meta.get("val")
        value = self.environment.get(node)
        if isinstance(value, Dim):
            return Output("size", offset=value)
        if not isinstance(traced, torch.Tensor):
            return Output("plain", value=value)
        assert isinstance(value, Value)
        key = storage_key(traced)
        owner = self.input_storage.get(key)
        if owner is not None:
            if node.op == "placeholder":
                return Output("input", owner)
            source = self.sharing[key][0].meta["val"]
            if source is traced or _same_geometry(source, traced):
                return Output("input", owner)
            return _view("view_of_input", owner, traced)
        if len(self._leaf_storage.get(key, ())) > 1:
            return self._plan_shared(key, traced)
        order = _physical_order(traced)
        return Output("result", self._add(value, order), _inverse(order))

    def _plan_shared(self, key: int, traced: torch.Tensor) -> Output:
        """Several leaves share one piece of memory: return its first tensor once, and views."""
        base = self.sharing[key][0]
        holder = base.meta["val"]
        value = self.environment.get(base)
        if not isinstance(value, Value) or not _covers_storage(holder):
            raise UnsupportedError("outputs that share memory in a way that cannot be followed")
        if key not in self._bases:
            self._bases[key] = self._add(value, None)
        return _view("view_of_result", self._bases[key], traced)

    def _add(self, value: Value, order: tuple[int, ...] | None) -> int:
        """Makes `value`, its axes in `order`, an output of the program."""
        if order is not None:
            shape = tuple(value.shape[axis] for axis in order)
            value = self.builder.append(
                "permute", [value], Type(value.dtype, shape), "out", order=list(order)
            )
        self.builder.outputs.append(value)
        return len(self.builder.outputs) - 1


def _view(kind: str, index: int, traced: torch.Tensor) -> Output:
    try:
        return Output(
            kind,
            index,
            shape=tuple(map(Dim.of, traced.shape)),
            strides=tuple(map(Dim.of, traced.stride())),
            offset=Dim.of(traced.storage_offset()),
        )
    except NotPolynomialError as error:
        raise UnsupportedError(str(error)) from None


def _geometry(tensor: torch.Tensor) -> tuple[str, ...]:
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (str(tensor.dtype), *(str(Dim.of(size)) for size in sizes))


def _same_geometry(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and _geometry(a) == _geometry(b)


def _covers_storage(tensor: torch.Tensor) -> bool:
    type_ = tensor_type(tensor.dtype, tensor.shape)
    return Dim.of(tensor.storage_offset()).constant == 0 and _is_row_major(type_, tensor)


def _is_row_major(type_: Type, tensor: torch.Tensor) -> bool:
    expected = Dim.of(1)
    for size, stride in zip(reversed(type_.shape), reversed(tensor.stride()), strict=True):
        if size.constant == 1:
            continue
        if Dim.of(stride) != expected:
            return False
        expected = expected * size
    return True


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _physical_order(traced: torch.Tensor) -> tuple[int, ...] | None:
    """The axes from the slowest to the fastest, if that differs from the logical order.

    Only a permutation of row-major memory is followed; anything else is returned row-major.
    """
    strides = [_hint(stride) for stride in traced.stride()]
    order = sorted(range(traced.dim()), key=lambda axis: -strides[axis])
    if order == list(range(traced.dim())):
        return None
    try:
        type_ = tensor_type(traced.dtype, traced.shape)
        if _is_row_major(type_, traced):
            return None
        expected = Dim.of(1)
        for axis in reversed(order):
            if type_.shape[axis].constant == 1:
                continue
            if Dim.of(traced.stride(axis)) != expected:
                return None
            expected = expected * type_.shape[axis]
    except (NotPolynomialError, UnsupportedError):
        return None
    return tuple(order)


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if order is None:
        return None
    return tuple(order.index(axis) for axis in range(len(order)))
