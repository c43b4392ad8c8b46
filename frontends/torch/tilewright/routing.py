"""Makes `torch.compile(model, backend="tilewright")` do what it says.

1. Plain PyTorch forwards `generate` to the original module, whose steps are then eager: nothing
   would be compiled, silently. For modules compiled with our backend, attribute access to
   `generate` returns a function that routes the original module's calls through the compiled one
   while it runs.
2. An optimised model (llm.optimize) is one program per step already. Dynamo has nothing to add to
   it but guards at each call, so the compiled module calls it directly; this also holds for
   fullgraph=True.

Modules compiled with other backends are left alone.

This is the only file that touches torch's internals; it checks that they are what it expects.
Thread-safe. Tested by tests/python/test_generate.py, which counts compiled steps, and
tests/python/test_conversations.py.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tilewright import core
from tilewright.installed import installed_in

_ROUTED = ("generate",)
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

    OptimizedModule.__getattr__ = __getattr__
    OptimizedModule._initialize = _initialize


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

    return forward


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
