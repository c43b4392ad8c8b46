"""Makes `torch.compile(model, backend="tilewright").generate(...)` run compiled code.

Plain PyTorch forwards `generate` to the original module, whose steps are then eager: nothing would
be compiled, silently. For modules compiled with our backend, and only for those, attribute access
to `generate` returns a function that routes the original module's calls through the compiled one
while it runs. Nothing else of torch is changed.

This is the only file that touches torch's internals; it checks that they are what it expects.
Tested by tests/python/test_generate.py, which counts compiled steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tilewright import core

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
        if name in _ROUTED and callable(value) and is_ours(self):
            return routed(self, value)
        return value

    OptimizedModule.__getattr__ = __getattr__


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


def routed(module: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of the original module, with the module's own calls compiled meanwhile."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        original = module._orig_mod
        if not hasattr(torch.nn.Module, "_compiled_call_impl"):
            core.say_once("this torch has no compiled call: generate() runs without torch.compile")
            return function(*args, **kwargs)
        if original._compiled_call_impl is not None:  # nested, or model.compile() came before
            return function(*args, **kwargs)
        original._compiled_call_impl = module.dynamo_ctx(original._call_impl)
        try:
            return function(*args, **kwargs)
        finally:
            original._compiled_call_impl = None

    return run
