"""What capture reads of a model, as a digest: two models with one digest give the same graph.

A digest covers the modules (names, classes, attributes, sharing), types and shapes of parameters,
the contents of buffers and of other small things that Python code may read as numbers, the
configuration, and the code: the bytecode of every function that can be reached from the modules'
classes through globals, closures and attributes of imported modules, as it is in memory, so that
a function that was replaced at run time counts as what it is. torch, the standard library and
what transformers needs only to load and to generate are covered by their versions.

What has no certain description (an object of a C type, a hook, code that reads the environment)
raises UncertainError: such a model has no digest, and is captured each time.

Not thread-safe. Tested by tests/python/test_plans.py.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Known by their versions: their functions are named, not looked into.
_BY_VERSION = frozenset(
    {
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "tilewright",
        "accelerate",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "packaging",
        "typing_extensions",
    }
)
# What forward methods call of transformers; the rest of it loads, generates and trains, or holds
# caches, in whose place capture has its own.
_TRANSFORMERS = re.compile(
    r"transformers\.(models\.(?!auto\b)|activations|masking_utils|modeling_layers"
    r"|modeling_outputs|modeling_rope_utils|pytorch_utils|integrations\.moe)"
)
# Objects that code names and whose state says nothing that a trace would show, or what a version
# says: loggers, registries (capture is in those of attention and experts), no_grad.
_BY_TYPE = re.compile(
    r"transformers\.|logging\.|torch\.autograd\.grad_mode\.|dataclasses\.Field$"
    r"|contextlib\._GeneratorContextManager$|inspect\.Signature$"
)
# Attributes that say where a model came from, not what it computes.
_IRRELEVANT = frozenset(
    {
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "architectures",
        "generation_config",
        "warnings_issued",
        "_is_hf_initialized",
        # Set by from_pretrained; kernels of the hub show in the modules that they replace.
        "_weight_conversions",
        "_use_kernels",
        "smart_apply",  # of the class, by whoever initialised a model first
        # Set by tilewright, or while transformers' continuous batching runs.
        "generate",
        "_cached_continuous_batching_manager",
    }
)
_OWN_OR_IRRELEVANT = frozenset(nn.Module().__dict__) - {"training"} | _IRRELEVANT
_NOT_STATE = frozenset(
    [
        "__doc__",
        "__module__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__abstractmethods__",
        "_abc_impl",
        "__orig_bases__",
        "__parameters__",
        "__match_args__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__qualname__",
        "__slots__",
        "__slotnames__",
    ]
)
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis)})
_BY_TEXT = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
    range,
    slice,
)
_NAMED = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_CONTAINERS = (list, tuple, collections.deque, dict, set, frozenset)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Code with these names may know what no digest does.
_UNCERTAIN_NAMES = frozenset({"environ", "getenv", "tolist", "data_ptr"})
_MOST_FUNCTIONS = 4000
_LRU_CACHE = type(functools.lru_cache(len))
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement (or a C module that may be)


class UncertainError(Exception):
    """Nobody can say what this model would be captured as; the message says why."""


def digest_of(model: nn.Module, forward: Callable[..., Any], *more: Any) -> str:
    """64 hexadecimal digits. `forward`: the model's own. `more`: what else decides (plain data).

    Raises UncertainError.
    """
    description = _Description(model)
    description.add(_versions(), _modes(), more)
    own = getattr(forward, "__self__", None) is model
    description.add(forward.__func__ if own else forward)  # type: ignore[attr-defined]
    description.add_model()
    description.add_code()
    return description.digest()


def _versions() -> list[str]:
    transformers = sys.modules.get("transformers")
    return [
        sys.version,
        str(torch.__version__),
        str(torch.version.git_version),
        getattr(transformers, "__version__", ""),
        package_digest(),
    ]


@functools.cache
def package_digest() -> str:
    """Of the Python sources of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _modes() -> list[Any]:
    """What torch is set to, in so far as a trace shows it."""
    from torch.nn.modules import module
    from torch.overrides import _get_current_function_mode_stack

    hooks = (module._global_forward_hooks, module._global_forward_pre_hooks)
    if any(hooks):
        raise UncertainError("forward hooks of all modules")
    if _get_current_function_mode_stack():
        raise UncertainError("a mode that changes torch's functions")
    return [torch.get_default_dtype()]


class _Description:
    """Collects lines, and what is still to be described."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lines: list[str] = []
        self._seen: dict[int, int] = {}  # id -> number
        self._containers: dict[int, str] = {}  # id -> line
        self._alive: list[Any] = []  # so that no id is used twice
        self._functions: collections.deque[types.FunctionType] = collections.deque()
        self._classes: collections.deque[type] = collections.deque()
        self._in_code = False

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self._lines).encode()).hexdigest()

    def add(self, *values: Any) -> None:
        for value in values:
            self._add(value)

    def _say(self, line: str) -> None:
        self._lines.append(line)

    def _add(self, value: Any) -> None:
        # Asks the type, not the value, which may answer as it likes and as slowly.
        kind = type(value)
        if kind in _PLAIN:
            self._say(f"{kind.__name__} {value!r}")
            return
        number = self._seen.get(id(value))
        if number is None:
            if issubclass(kind, _BY_TEXT):
                self._say(f"{kind.__name__} {value}")
                return
            if issubclass(kind, _CONTAINERS):
                self._add_container(value, kind)
                return
            number = self._remember(value)
            if issubclass(kind, type):
                self._classes.append(value)
            elif kind is types.FunctionType:
                self._functions.append(value)
            else:
                self._add_new(value, kind)
                return
        # The same line whether it is the first or not: containers of them are equal, then.
        if issubclass(kind, type):
            self._say(f"class {number} {_name(value)}")
        elif kind is types.FunctionType:
            home = value.__globals__.get("__name__", "")
            self._say(f"function {number} {home} {_name(value)}")
        else:
            self._say(f"#{number}")

    def _remember(self, value: Any) -> int:
        self._alive.append(value)
        return self._seen.setdefault(id(value), len(self._seen))

    def _add_new(self, value: Any, kind: type) -> None:
        if issubclass(kind, torch.Tensor):
            self._add_tensor(value, contents=True)
        elif issubclass(kind, _NAMED):
            self._add_named(value)
        elif issubclass(kind, types.ModuleType):
            self._say(f"module {value.__name__}")
        elif kind is types.MethodType:
            self._say("method")
            self.add(value.__func__, value.__self__)
        elif kind in (functools.partial, functools.partialmethod):
            self._say(kind.__name__)
            self.add(value.func, value.args, value.keywords)
        elif kind is _LRU_CACHE:
            self._say("lru_cache")
            self._add(value.__wrapped__)
        elif kind is property:
            self._say("property")
            self.add(value.fget, value.fset, value.fdel)
        elif kind in (staticmethod, classmethod):
            self._say(kind.__name__)
            self._add(value.__func__)
        elif kind is functools.cached_property:
            self._say("cached_property")
            self._add(value.func)
        elif kind is re.Pattern:
            self.add(value.pattern, value.flags)
        elif issubclass(kind, enum.Enum):
            self._say(f"{_name(kind)}.{value.name}")
        elif issubclass(kind, nn.Module):
            self._add_module(value)
        else:
            self._add_object(value, kind)

    def _add_container(self, value: Any, kind: type) -> None:
        """One line. Equal ones count as equal whether they are one object or several, which says
        how a model was copied or loaded."""
        if id(value) not in self._containers:
            self._containers[id(value)] = "cycle"
            self._alive.append(value)
            outside, self._lines = self._lines, []
            try:
                self._add_contents(value, kind)
                self._containers[id(value)] = f"{_name(kind)} {self.digest()}"
            finally:
                self._lines = outside
        self._say(self._containers[id(value)])

    def _add_contents(self, value: Any, kind: type) -> None:
        self._say(str(len(value)))
        if isinstance(value, dict):
            items = list(value.items())
            if self._in_code and all(type(key) is str for key in value):
                items.sort(key=lambda item: str(item[0]))  # a registry: modules filled it somehow
            for key, item in items:
                self.add(key, item)
        elif isinstance(value, set | frozenset):
            if not all(type(item) in _PLAIN for item in value):
                raise UncertainError("a set of objects")
            self.add(*sorted(value, key=repr))
        else:
            self.add(*value)
        if state := getattr(value, "__dict__", None):
            self._add_attributes(state)

    def _add_object(self, value: Any, kind: type) -> None:
        if self._in_code and _BY_TYPE.match(_name(kind)):
            self._say(f"object {_name(kind)}")
            return
        made_in_python = all(base.__flags__ & _HEAP_TYPE for base in kind.__mro__[:-1])
        slots = [name for base in kind.__mro__ for name in _slots(base)]
        if not made_in_python or not hasattr(value, "__dict__") or slots:
            raise UncertainError(f"a {_name(kind)} object")
        self._say("object")
        self._add(kind)
        self._add_attributes(value.__dict__)

    def _add_attributes(self, attributes: dict[str, Any]) -> None:
        for name, item in attributes.items():
            if name not in _IRRELEVANT:
                self._say(name)
                self._add(item)
        self._say("end")

    # --- modules and tensors

    def add_model(self) -> None:
        self._remember(self._model)
        self._add_module(self._model)

    def _add_module(self, module: nn.Module) -> None:
        state = module.__dict__
        if module is not self._model and any(state.get(hooks) for hooks in _HOOKS):
            raise UncertainError("a module with forward hooks")
        self._say("module")
        self._add(type(module))
        for name, value in state.items():
            if name in _OWN_OR_IRRELEVANT:
                continue
            if name != "forward" or module is not self._model:  # installed by us
                self._say(name)
                self._add(value)
        for name, tensor in state["_parameters"].items():
            self._say(f"parameter {name}")
            self._add_once(tensor, contents=tensor is not None and tensor.numel() == 1)
        for name, tensor in state["_buffers"].items():
            self._say(f"buffer {name} {name in state['_non_persistent_buffers_set']}")
            self._add_once(tensor, contents=True)
        for name, child in state["_modules"].items():
            self._say(f"child {name}")
            self._add(child)
        self._say("end")

    def _add_once(self, tensor: torch.Tensor | None, contents: bool) -> None:
        if tensor is None or id(tensor) in self._seen:
            self._add(tensor)
        else:
            self._remember(tensor)
            self._add_tensor(tensor, contents)

    def _add_tensor(self, tensor: torch.Tensor, contents: bool) -> None:
        kind = type(tensor)
        if kind not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise UncertainError(f"a tensor of type {_name(kind)}")
        if tensor.device.type != "cpu":
            raise UncertainError(f"a tensor on {tensor.device}")
        self._say(
            f"{kind.__name__} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} "
            f"{tensor.requires_grad} {tensor.is_inference()}"
        )
        if contents:
            data = tensor.detach().contiguous().view(-1)
            data = data.view(torch.uint8) if data.numel() else data
            self._say(hashlib.sha256(data.numpy()).hexdigest())

    # --- code

    def _add_named(self, value: Any) -> None:
        owner = getattr(value, "__self__", None)
        home = getattr(value, "__objclass__", None)
        prefix = _name(home) if isinstance(home, type) else getattr(value, "__module__", None)
        self._say(f"{type(value).__name__} {prefix} {getattr(value, '__qualname__', '')}")
        if owner is not None and not isinstance(owner, types.ModuleType | type):
            self._add(owner)

    def add_code(self) -> None:
        """The classes and functions that were named, and all that these name."""
        self._in_code = True
        known = 0
        while self._classes or self._functions:
            known += 1
            if known > _MOST_FUNCTIONS:
                raise UncertainError("its code reaches too far")
            if self._classes:
                self._add_body(self._classes.popleft())
            else:
                self._add_code(self._functions.popleft())

    def _add_body(self, kind: type) -> None:
        """All attributes of a class, and of those that it inherits from."""
        self._say(f"body {_name(kind)}")
        for base in kind.__mro__:
            if base is not kind:
                self._add(base)  # described once, for all that inherit from it
        if _is_by_version(kind.__module__):
            # Only whether its methods are its own: who replaces one does it for every module.
            if issubclass(kind, nn.Module):
                for name, value in kind.__dict__.items():
                    if isinstance(value, types.FunctionType) and name not in _IRRELEVANT:
                        self._say(name)
                        self._add(value)
            return
        for name, value in kind.__dict__.items():
            if name not in _NOT_STATE:
                self._say(name)
                self._add(value)

    def _add_code(self, function: types.FunctionType) -> None:
        self._say(f"code {function.__qualname__}")
        for cell in function.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError:  # empty
                self._say("empty")
        home = function.__globals__.get("__name__", "")
        if _is_by_version(home) and not (
            function.__name__ == "forward" and home.startswith("torch.nn.modules.")
        ):
            return
        self.add(function.__defaults__, function.__kwdefaults__)
        names: set[str] = set()
        self._add_instructions(function.__code__, names)
        if uncertain := names & _UNCERTAIN_NAMES:
            raise UncertainError(f"{_name(function)} uses {min(uncertain)}")
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            self._say(f"global {name}")
            self._add(value)
            if isinstance(value, types.ModuleType):
                self._add_members(value, names, {value.__name__})

    def _add_members(self, module: types.ModuleType, names: set[str], path: set[str]) -> None:
        """What code with these names may read of a module, or by way of it (nn.functional.silu)."""
        for name in sorted(names & module.__dict__.keys()):
            value = module.__dict__[name]
            self._say(f"member {module.__name__}.{name}")
            self._add(value)
            if isinstance(value, types.ModuleType) and value.__name__ not in path:
                path.add(value.__name__)
                self._add_members(value, names, path)

    def _add_instructions(self, code: types.CodeType, names: set[str]) -> None:
        names.update(code.co_names)
        self._say(f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}")
        self._say(f"{code.co_flags} {code.co_names} {code.co_varnames} {code.co_freevars}")
        handlers: bytes = getattr(code, "co_exceptiontable", b"")  # Python 3.11
        self._say(hashlib.sha256(code.co_code + handlers).hexdigest())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_instructions(constant, names)
            else:
                self._say(_constant(constant))


def _constant(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_constant, value))}"
    if isinstance(value, tuple):
        return f"tuple {list(map(_constant, value))}"
    return f"{type(value).__name__} {value!r}"


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.cache
def _is_by_version(module: str) -> bool:
    top = module.partition(".")[0]
    if top == "transformers":
        return _TRANSFORMERS.match(module) is None
    return top in _BY_VERSION
