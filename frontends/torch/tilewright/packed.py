"""PackedParameter: a parameter whose values live in packed weights until somebody asks for them.

After `optimize(inplace=True)` a weight would be in memory twice: as torch's tensor and as the
core's packed copy. The program needs the second only, so the first is freed and the Parameter
becomes a PackedParameter: the same Python object, with the same shape, type and place.

It has two states and one transition. Packed, it answers questions about itself (shape, dtype,
device, requires_grad ...) and nothing else. Whatever wants its values (an operation, `.data`,
`state_dict`, a copy, pickling, a view) unpacks it for good, bit for bit, into an ordinary tensor
that the operation gets; from then on it is that tensor. So an alias of the values can never be out
of date: while it may exist, the values are kept in torch's tensor, and the program looks there for
changes before every call (program.Weights). The price is the memory, for those who look.

Tested by tests/python/test_packed.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

from tilewright import _core
from tilewright.assignments import Assignments, CountsAssignments

# Answered from the wrapper: what neither reads nor exposes values.
_ATTRIBUTES = """
    shape dtype device layout requires_grad grad grad_fn is_leaf ndim is_cuda is_meta is_cpu
    is_sparse is_quantized is_mkldnn is_nested nbytes itemsize _backward_hooks output_nr
    retains_grad
"""
_METHODS = """
    size dim stride numel nelement element_size is_contiguous is_floating_point is_complex
    is_inference is_conj is_neg is_signed get_device storage_offset ndimension requires_grad_
    _is_view __len__ __hash__
"""
_QUESTIONS: set[Any] = {getattr(torch.Tensor, name) for name in _METHODS.split()}
_QUESTIONS |= {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()}
_QUESTIONS.add(torch.Tensor.requires_grad.__set__)

# As long as nobody made one to a PackedParameter, each of them is what it was. Unpacking makes
# some, and so does torch.utils.swap_tensors.
assignments = Assignments()


class Source:
    """The store's copy of a weight; forgotten when nothing stands for it any more."""

    def __init__(self, store: Any, token: int) -> None:
        self.store = store
        self.token = token
        weakref.finalize(self, store.forget, token)

    def unpack(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        with no_dispatch():  # real memory also where somebody traces with fake tensors
            values = torch.empty(shape, dtype=dtype)
            self.store.unpack(self.token, values.data_ptr())
        return values


class PackedParameter(CountsAssignments, torch.Tensor):
    """See the module's description. Not thread-safe beyond what a Parameter is."""

    assignments = assignments
    _source: Source | None
    _values: nn.Parameter | None
    _is_param = True  # isinstance(p, nn.Parameter)

    @staticmethod
    def of(parameter: torch.Tensor, source: Source) -> PackedParameter:
        packed: PackedParameter = torch.Tensor._make_wrapper_subclass(
            PackedParameter,
            parameter.shape,
            dtype=parameter.dtype,
            requires_grad=parameter.requires_grad,
        )
        packed._source = source
        packed._values = None
        return packed

    @property
    def token(self) -> int | None:
        """What stands for the values in the store; None once they are an ordinary tensor."""
        return None if self._source is None else self._source.token

    def values(self) -> nn.Parameter:
        """The ordinary parameter that this is from now on."""
        if self._values is None:
            assert self._source is not None
            with torch._C.DisableTorchFunctionSubclass():
                shape, dtype, needs_gradient = self.shape, self.dtype, self.requires_grad
            self._values = nn.Parameter(
                self._source.unpack(shape, dtype), requires_grad=needs_gradient
            )
            self._source = None
        return self._values

    def stand_in(self) -> nn.Parameter:
        """An ordinary parameter to look at, with values only if they are unpacked anyway."""
        if self._values is not None:
            return self._values
        # Never written, so no memory is behind it.
        empty = torch.empty(tuple(self.shape), dtype=self.dtype)
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(empty, requires_grad=self.requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _QUESTIONS and isinstance(first, PackedParameter) and first._values is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_plain(args), **_plain(kwargs or {}))

    # These two look past both protocols.
    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values().untyped_storage()

    def data_ptr(self) -> int:
        return self.values().data_ptr()

    def __repr__(self, **_: Any) -> str:
        if self._values is not None:
            return repr(self._values)
        return f"PackedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.values().__deepcopy__(memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)


def _plain(tree: Any) -> Any:
    return pytree.tree_map_only(PackedParameter, PackedParameter.values, tree)


class Releases:
    """Gives back the memory of parameters that were packed: the objects become PackedParameters.

    Their pages go in groups, beside what else happens; `finish` waits for the last. Not
    thread-safe.
    """

    _GROUP_BYTES = 16 << 20

    def __init__(self, store: Any) -> None:
        self._store = store
        self._dropper = _core.PageDropper()
        self._bytes = 0
        # Of the group: address, bytes, whether it is freed next; and who has that memory.
        self._memory: list[tuple[int, int, bool]] = []
        self._owners: list[torch.Tensor] = []

    def release(self, parameter: torch.Tensor) -> bool:
        """False, and nothing happens, if it must stay: the store holds it not exactly once, or
        somebody holds it in a way that a change of what it is would not reach."""
        if type(parameter) is not nn.Parameter or not parameter.is_contiguous():
            return False
        memory = (parameter.data_ptr(), parameter.numel() * parameter.element_size())
        packed = self._packed(parameter, *memory)
        # Tensors of a mapped checkpoint share one mapping, which stays as long as one of them does.
        # A page that comes back is read from the file.
        owner = parameter if packed is None else packed
        owns = packed is not None and packed.untyped_storage().resizable()  # torch allocated it
        self._memory.append((*memory, owns))
        self._owners.append(owner)
        self._bytes += memory[1]
        if self._bytes > self._GROUP_BYTES:
            self._end_group()
        return packed is not None

    def finish(self) -> None:
        self._end_group()
        self._dropper.wait()

    def _end_group(self) -> None:
        self._dropper.drop(self._memory, self._owners)
        self._memory, self._owners, self._bytes = [], [], 0

    def _packed(self, parameter: nn.Parameter, place: int, size: int) -> torch.Tensor | None:
        """Makes it a PackedParameter, and returns an object that is what it was."""
        if (
            parameter.grad is not None
            or parameter._backward_hooks
            or weakref.getweakrefs(parameter)
        ):
            return None
        storage = parameter.untyped_storage()
        if storage.nbytes() != size:
            return None  # a part of something larger: freeing it would free nothing
        if torch._C._storage_Use_Count(storage._cdata) > 2:
            return None  # another tensor shares the values, and may write them
        del storage
        token = self._store.release(place)
        if not token:
            return None
        packed = PackedParameter.of(parameter, Source(self._store, token))
        try:
            torch.utils.swap_tensors(parameter, packed)
        except RuntimeError:
            return None  # the token goes, and with it the store's copy; the program keeps its own
        return packed


def address(tensor: torch.Tensor) -> int:
    """Where the core finds a tensor's values: memory, or a token of its store."""
    if isinstance(tensor, PackedParameter) and tensor.token is not None:
        return tensor.token
    return tensor.data_ptr()


def unpack_all(model: nn.Module) -> None:
    """Makes ordinary parameters of all that are packed."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, PackedParameter):
                module._parameters[name] = parameter.values()


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """While capture looks at the model, ordinary parameters in place of packed ones. Yields the
    packed ones by the id of their stand-in."""
    replaced: list[tuple[nn.Module, str, PackedParameter]] = []
    made: dict[int, nn.Parameter] = {}
    packed: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, PackedParameter):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = parameter.stand_in()
                packed[id(made[id(parameter)])] = parameter
            replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = made[id(parameter)]
    try:
        yield packed
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
