"""Executable: a lowered graph compiled by the core, callable with torch tensors.

It binds symbols to the sizes of a call, allocates outputs, runs the program, and makes what the
caller expects of the results. Weights are bound by name; `is_current` tells whether they are still
what was packed, `bind` packs them again.

Thread-safe: calls take turns. Tested by tests/python/test_backend.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from tilewright import _core, core, host, operators, profile
from tilewright.graph_text import DTYPE_NAMES, DTYPES, Type
from tilewright.lowered import Lowered
from tilewright.packed import PackedParameter, Releases, address, assignments

_stores: Any = WeakIdKeyDictionary()


def store_for(parameters: Iterable[torch.Tensor]) -> Any:
    """The WeightStore that these parameters' model uses; made for the first of its programs."""
    parameters = list(parameters)
    store = next((_stores[p] for p in parameters if p in _stores), None)
    if store is None:
        store = _core.WeightStore()
    for parameter in parameters:
        _stores.setdefault(parameter, store)
    return store


# What each store packed, by address. A store does not watch its sources and outlives programs: one
# that is made later must not find what was packed before a weight changed.
_packed: weakref.WeakKeyDictionary[Any, dict[int, Weights]] = weakref.WeakKeyDictionary()


def _forget_changed(store: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Drops what the store packed from these tensors before they changed, or from others that were
    where they are now. What stays is for `_remember`: a weak reference would hinder `release`."""
    packed = _packed.setdefault(store, {})
    for place in map(address, tensors):
        if place >> 63:  # a token: the store has the only copy of its values
            continue
        known = packed.pop(place, None)
        if known is None or not known.all_same() or known.contents_changed():
            store.forget(place)


def _remember(store: Any, tensors: Iterable[torch.Tensor]) -> None:
    """What these tensors held when the store packed them."""
    packed = _packed.setdefault(store, {})
    for tensor in tensors:
        place = address(tensor)
        if place >> 63 == 0:
            packed[place] = Weights({"": tensor})


def weight_bytes() -> int:
    """Of packed weights that are alive."""
    stores = {id(executable.store): executable.store for executable in list(executables)}
    return sum(int(store.bytes) for store in stores.values())


def tensor_at(address: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over memory of the core, valid during a host call."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))


def version_of(tensor: torch.Tensor) -> int:
    """Tensors made in inference mode keep no count of their writes; packed ones have none."""
    if isinstance(tensor, PackedParameter):
        if tensor.token is not None:
            return 0
        tensor = tensor.values()
    return 0 if tensor.is_inference() else tensor._version


def _is_as_marked(mark: tuple[Any, int, int]) -> bool:
    reference, place, version = mark
    tensor: Any = reference()
    return tensor is not None and address(tensor) == place and version_of(tensor) == version


class Weights:
    """What a program read from its constants, and how to tell that they changed since.

    Tensors are held weakly: a compiled graph must not keep a model alive that its user dropped. A
    write through `.data` changes neither address nor version; `contents_changed` looks at a sample
    of the bytes for that, which costs about a microsecond per tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._assignments = assignments.made
        self._marks: dict[str, tuple[Any, int, int]] = {
            name: (weakref.ref(tensor), address(tensor), version_of(tensor))
            for name, tensor in tensors.items()
        }
        # For `all_same`, which every call asks: what only assignments change; what torch counts the
        # writes of; and what it does not.
        self._packed: list[tuple[Any, int, int]] = []
        self._other: list[tuple[Any, int, int]] = []
        counted: list[torch.Tensor] = []
        for mark, tensor in zip(self._marks.values(), tensors.values(), strict=True):
            if isinstance(tensor, PackedParameter):
                (self._other if tensor.token is None else self._packed).append(mark)
            elif tensor.is_inference():
                self._other.append(mark)
            else:
                counted.append(tensor)
        self._counted = _core.TensorMarks(counted, torch.Tensor.data_ptr)
        self._fingerprint = _core.Fingerprint(
            [
                (tensor.data_ptr(), tensor.numel() * tensor.element_size())
                for tensor in tensors.values()
                if tensor.is_contiguous() and not isinstance(tensor, PackedParameter)
            ]
        )
        self._value = self._fingerprint.value()

    def same(self, name: str, tensor: torch.Tensor) -> bool:
        reference, place, version = self._marks[name]
        return bool(
            reference() is tensor and address(tensor) == place and version_of(tensor) == version
        )

    def is_of(self, name: str, tensor: torch.Tensor) -> bool:
        """The same tensor object, written or not."""
        return self._marks[name][0]() is tensor

    def alive(self) -> bool:
        return all(reference() is not None for reference, _, _ in self._marks.values())

    def all_same(self) -> bool:
        """Nobody replaced the memory of a tensor or wrote it in a way that torch counts."""
        if not self._counted.are_same() or not all(map(_is_as_marked, self._other)):
            return False
        made = assignments.made
        if made != self._assignments:
            if not all(map(_is_as_marked, self._packed)):
                return False
            self._assignments = made
        return True

    def contents_changed(self) -> bool:
        """REQUIRES: the tensors live."""
        return bool(self._fingerprint.value() != self._value)

    def readable(self, store: Any) -> dict[str, torch.Tensor]:
        """The constants; packed ones as copies, so that they stay packed."""
        found: dict[str, torch.Tensor] = {}
        for name, (reference, place, _) in self._marks.items():
            tensor: Any = reference()
            if isinstance(tensor, PackedParameter) and tensor.token is not None:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                store.unpack(place, tensor.data_ptr())
            if tensor is not None:
                found[name] = tensor.detach()
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that live."""
        found = {name: reference() for name, (reference, _, _) in self._marks.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def left(self) -> list[int]:
        """Addresses where a tensor is no longer."""
        found = []
        for reference, place, _ in self._marks.values():
            tensor: Any = reference()
            if place >> 63 == 0 and (tensor is None or address(tensor) != place):
                found.append(place)
        return found

    def places(self) -> list[int]:
        """Addresses; not tokens, which end with their parameters."""
        return [place for _, place, _ in self._marks.values() if place >> 63 == 0]


class Sizes:
    """A shape to evaluate at each call; free of cost when it has no symbols."""

    def __init__(self, type_: Type) -> None:
        self.dtype = type_.dtype
        self._dims = type_.shape
        constants = [size.constant for size in type_.shape if size.constant is not None]
        self._fixed = tuple(constants) if len(constants) == len(type_.shape) else None

    def __call__(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        if self._fixed is not None:
            return self._fixed
        return tuple(size.evaluate(symbols) for size in self._dims)


class Executable:
    """See the module's description."""

    def __init__(
        self,
        lowered: Lowered,
        tensors: Mapping[str, torch.Tensor],
        store: Any = None,
        frees: bool = False,
        in_place: bool = False,
    ) -> None:
        """`tensors`: the constants by name. `store`: where to pack them, by default the one of the
        parameters' model. `frees`: give back the memory of parameters that are packed
        (packed.py). `in_place`: if the core can run this program once without packing, `pack` has
        to be called before it runs again. CoreError when the core refuses the graph."""
        # Without the tensors: what runs must not keep a model alive that its user dropped.
        self.lowered = dataclasses.replace(lowered, constants={})
        self._constants = tuple(lowered.constants)
        self.lock = threading.RLock()
        self._results = [Sizes(type_) for type_ in lowered.results]
        self._symbols: dict[str, int] = {}
        self._checked: dict[str, torch.Tensor] = {}
        self.store = store
        self._frees = frees
        self._copies: dict[str, torch.Tensor] = {}
        self.weights = Weights({})
        self.is_spent = False  # it has run in place: `pack` comes next
        self._earlier: list[dict[str, Any]] = []
        executables.add(self)
        self.bind(tensors, in_place)

    def bind(self, tensors: Mapping[str, torch.Tensor], in_place: bool = False) -> None:
        """Compiles for these constants: at first, and after they changed."""
        constants = {name: tensors[name] for name in self._constants}
        for place in (*self.weights.left(), *map(address, self._copies.values())):
            self.store.forget(place)
        # The core reads row-major memory; a transposed weight is copied once and kept here.
        self._copies = {
            name: tensor.detach().contiguous()
            for name, tensor in constants.items()
            if not tensor.is_contiguous()
        }
        if self.store is None:
            self.store = store_for(constants.values())
        given = constants | self._copies
        _forget_changed(self.store, given.values())
        releases = Releases(self.store)

        def packed(name: str) -> None:
            releases.release(constants[name])

        self.program = core.engine().compile(
            self.lowered.text,
            {
                name: (address(tensor), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in given.items()
            },
            self.store,
            packed if self._frees else None,  # each at once: else all weights are there twice
            self.lowered.has_passed,
            in_place=in_place,
        )
        if self._frees:
            for name in self.program.packed_sources:
                packed(name)
            releases.finish()
        self.reads_in_place: bool = self.program.reads_in_place
        self.is_spent = False
        if not self.reads_in_place:
            _remember(self.store, given.values())
        self.weights = Weights(constants)
        compute = weakref.WeakMethod(self._host)
        profile.watch(self.program)
        self.program.set_host(lambda *call: compute()(*call))  # type: ignore[misc]
        operators.register(self.program.handle, self)

    def pack(self) -> None:
        """After the only run in place: packs its weights, and compiles for them. CoreError, and
        there is no program any more, when the core refuses or a weight is gone.

        REQUIRES: the weights are what they were."""
        constants = self.weights.tensors()
        if len(constants) < len(self._constants):
            raise core.CoreError("a weight is gone before it was packed")
        before = self.program.report()
        self._earlier.append(before | {"regions": []})  # what runs from now on has all of them
        self.weights = Weights({})  # its weak references would hinder `Releases`
        self.bind(constants)

    def reports(self) -> list[dict[str, Any]]:
        """What its program did, and without regions the one that it had before `pack`."""
        return [self.program.report(), *self._earlier]

    def of_weights(self, tensors: Mapping[str, torch.Tensor]) -> Executable:
        """The same program for another model's constants."""
        return Executable(dataclasses.replace(self.lowered, constants=dict(tensors)), tensors)

    def begin_check(self) -> None:
        """Each later run is compared with the reference, region by region, until `end_check`."""
        tensors = self.weights.readable(self.store) | self._copies
        self._checked = tensors  # the core reads them meanwhile
        self.program.begin_check(
            {
                name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in tensors.items()
            }
        )

    def end_check(self) -> list[dict[str, Any]]:
        """The regions of all runs since, in order."""
        rows = self.program.end_check()
        self._checked = {}
        return rows

    def forget_weights(self) -> None:
        for place in self.weights.places():
            self.store.forget(place)

    def is_decode(self, symbols: Mapping[str, int]) -> bool:
        tokens = self.lowered.tokens
        return tokens is not None and tokens.evaluate(symbols) == 1

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        symbols: Mapping[str, int],
        caches: Sequence[int] = (),
        decode: bool | None = None,
    ) -> list[torch.Tensor]:
        """The program's outputs. Tensors are row-major, in the program's order. caches: handles.
        decode: what the run is counted as, if the symbols do not say it. CoreError also when it has
        run in place before."""
        if self.reads_in_place:
            if self.is_spent:
                raise core.CoreError("its weights are to be packed first")
            self.is_spent = True
        self._symbols = dict(symbols)
        try:
            return operators.step(
                self.program.handle,
                tensors,
                [symbols[name] for name in self.lowered.shape_inputs],
                caches,
                self.is_decode(symbols) if decode is None else decode,
                core.threads(),
            )
        except RuntimeError as error:
            raise core.CoreError(str(error)) from None

    def repeat(
        self,
        step: _core.ReadyStep,
        symbols: dict[str, int],
        tokens: torch.Tensor,
        position: int,
        output: torch.Tensor,
    ) -> None:
        """As `run`, for a step of this program that was prepared once; not as an operator of torch.
        tokens: int64, row-major. CoreError when it fails."""
        self._symbols = symbols
        step.run(tokens.data_ptr(), position, output.data_ptr(), core.threads())

    def empty_results(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> list[torch.Tensor]:
        """What `run` returns, as meta tensors."""
        symbols: dict[str, Any] = dict(zip(self.lowered.shape_inputs, sizes, strict=True))
        types = [text for _, text in self.program.parameters if not text.startswith("cache")]
        for tensor, text in zip(tensors, types, strict=False):
            dims = text[text.index("[") + 1 : -1].split(", ")
            symbols.update(
                {d: n for d, n in zip(dims, tensor.shape, strict=False) if d.isidentifier()}
            )
        return [
            torch.empty(size(symbols), dtype=size.dtype, device="meta") for size in self._results
        ]

    def _host(self, function: str, attributes: str, inputs: Any, outputs: Any) -> None:
        host.run(
            function,
            attributes,
            [tensor_at(address, DTYPES[dtype], shape) for address, dtype, shape in inputs],
            [tensor_at(address, DTYPES[dtype], shape) for address, dtype, shape in outputs],
            self._symbols,
        )

    def call(self, arguments: Sequence[Any]) -> Any:
        """With the traced function's arguments; returns what it returned."""
        symbols = self.lowered.symbols(arguments)
        tensors = [arguments[i].contiguous() for i in self.lowered.inputs]
        results = self.run(tensors, symbols)
        leaves = [output.make(results, arguments, symbols) for output in self.lowered.outputs]
        return pytree.tree_unflatten(leaves, self.lowered.output_tree)


executables: weakref.WeakSet[Executable] = weakref.WeakSet()
