"""Makes `torch.compile(model, backend="tilewright")` do what it says.

1. Plain PyTorch forwards `generate` to the original module, whose steps are then eager: nothing
   would be compiled, silently. For modules compiled with our backend, attribute access to
   `generate` returns a function that routes the original module's calls through the compiled one
   while it runs.
2. An optimised model (llm.optimize) is one program per step already. Dynamo has nothing to add to
   it but guards at each call, so the compiled module calls it directly; this also holds for
   fullgraph=True. Where Dynamo meets it in somebody's function, it is a call not to look into.

Modules compiled with other backends are left alone.

This is the only file that changes torch's own classes; it checks that they are what it expects.
Thread-safe. Tested by tests/python/test_generate.py, which counts compiled steps, and
tests/python/test_conversations.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from tilewright import core
from tilewright.installed import installed_in

_ROUTED = ("generate",)
_ORIGINAL = "_tilewright_original"  # of the functions that `direct` returns: the module
_installed = False


def install() -> None:
    """Once, when torch.compile first looks our backend up."""
    global _installed
    if _installed:
        return
    _installed = True
    from torch._dynamo.eval_frame import OptimizedModule

    original = OptimizedModule.__getattr__

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        value = original(self, name)
        optimised = installed_in(self._modules.get("_orig_mod")) is not None
        if name in _ROUTED and callable(value) and is_ours(self) and not optimised:
            return routed(self, value)
        return value

    initialize = OptimizedModule._initialize

    def _initialize(self: Any) -> None:
        initialize(self)
        if is_ours(self):
            self.forward = direct(self._orig_mod, self.forward)

    call = OptimizedModule.__call__

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        original = getattr(self.__dict__.get("forward"), _ORIGINAL, None)
        if installed_in(original) is None or _has_any_global_hook():
            return call(self, *args, **kwargs)
        # Without the word to Dynamo that it is inside of a compiled module, which it is not.
        return torch.nn.Module.__call__(self, *args, **kwargs)

    OptimizedModule.__getattr__ = __getattr__
    OptimizedModule._initialize = _initialize
    OptimizedModule.__call__ = __call__


def is_ours(module: Any) -> bool:
    """Whether an OptimizedModule was compiled with our backend."""
    from torch._dynamo.eval_frame import innermost_backend

    context = module.__dict__.get("dynamo_ctx")
    callback = getattr(context, "callback", None)
    try:
        compiler = innermost_backend(callback)
    except (AssertionError, AttributeError):
        return False
    compiler = getattr(compiler, "compiler_fn", compiler)
    return getattr(compiler, "__module__", "") == "tilewright.backend"


def direct(original: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, or the module itself while it is optimised."""

    @functools.wraps(compiled)
    def forward(*args: Any, **kwargs: Any) -> Any:
        target = compiled if installed_in(original) is None else original
        return target(*args, **kwargs)

    setattr(forward, _ORIGINAL, original)
    return forward


def opaque(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, to Dynamo a function that it must not look into, nor into what that calls.

    torch.compiler.disable says so. What it returns sets and restores Dynamo's state at each call,
    2 us, which matters only where Dynamo runs the caller.
    """
    call_apart = torch.compiler.disable(call, reason="runs as a program of tilewright")
    try:
        frames: Any = importlib.import_module("torch._C._dynamo.eval_frame")
        callback, skip = frames.get_eval_frame_callback, frames.skip_code
    except (ImportError, AttributeError):
        return call_apart

    @functools.wraps(call_apart)  # with the marks by which Dynamo knows it
    def called(*args: Any, **kwargs: Any) -> Any:
        if callback() is None:
            return call(*args, **kwargs)
        return call_apart(*args, **kwargs)

    code: Any = called
    skip(code.__code__)
    return called


def routed(module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the original module, with the module's own calls compiled meanwhile."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        original = module._orig_mod
        if installed_in(original) is not None:
            return function(*args, **kwargs)
        if not hasattr(torch.nn.Module, "_compiled_call_impl"):
            core.say_once("this torch has no compiled call: generate() runs without torch.compile")
            return function(*args, **kwargs)
        with _compiled_calls(module, original):
            return function(*args, **kwargs)

    return run


# Of each module that is routed: how many calls (of any thread, some inside others) it is for.
_callers: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
_callers_lock = threading.Lock()


@contextlib.contextmanager
def _compiled_calls(module: Any, original: Any) -> Iterator[None]:
    """The original's calls are the compiled module's until the last that asked for it is done."""
    with _callers_lock:
        callers = _callers.get(original, 0)
        routes = callers > 0 or original._compiled_call_impl is None  # else model.compile() did it
        if routes:
            _callers[original] = callers + 1
            if callers == 0:
                original._compiled_call_impl = module.dynamo_ctx(original._call_impl)
    try:
        yield
    finally:
        if routes:
            with _callers_lock:
                _callers[original] -= 1
                if _callers[original] == 0:
                    original._compiled_call_impl = None
