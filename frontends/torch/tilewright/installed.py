"""InstalledForward: an object in the place of a module's `forward`.

`nn.Module.__call__` finds `forward` in the instance's dictionary first, so installing is one
assignment and undoing is its removal; hooks, `generate` and signature inspection go on working. A
deep copy or an unpickled module gets an object of its own, bound to itself.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InstalledForward:
    """Subclasses define __call__."""

    def __init__(self, model: nn.Module) -> None:
        self._bind(model, model.forward)
        self.parameter_types: dict[str, torch.dtype] = {}  # before optimize(inplace=True)

    def _bind(self, model: nn.Module, original: Callable[..., Any]) -> None:
        self._model = weakref.ref(model)
        self.original = original
        self._had_instance_forward = "forward" in model.__dict__
        functools.update_wrapper(self, original)
        self.__signature__ = inspect.signature(original)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    def install(self) -> None:
        self.model.__dict__["forward"] = self

    def uninstall(self) -> None:
        if self._had_instance_forward:
            self.model.__dict__["forward"] = self.original
        else:
            del self.model.__dict__["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    # --- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> InstalledForward:
        model = memo.get(id(self.model), self.model)  # being copied, usually
        return self._for(model)

    def __reduce__(self) -> Any:
        return (_empty, (type(self),), {"model": self.model})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin_for(state["model"])

    def _for(self, model: nn.Module) -> InstalledForward:
        made = type(self).__new__(type(self))
        made._begin_for(model)
        return made

    def _begin_for(self, model: nn.Module) -> None:
        """As __init__, for a model whose dictionary may not be filled yet."""
        self.__init__(_Blank(model))  # type: ignore[misc]
        self._model = weakref.ref(model)
        self._had_instance_forward = False


class _Blank:
    """Stands for a module under construction: only its class's forward is known."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = types.MethodType(type(model).forward, model)


def _empty(kind: type[InstalledForward]) -> InstalledForward:
    return kind.__new__(kind)


def called_model(model: Any) -> Any:
    """The module whose `forward` a model's calls and its `generate` come to: that of a wrapper of
    adapters (PEFT's `get_base_model`) or of torch.compile (`_orig_mod`) is the one inside."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(type(model), "get_base_model", None)
    return model if inner is None else inner(model)


def installed_in(model: Any) -> InstalledForward | None:
    """The object installed in a model, if there is one."""
    # At once where there is no wrapper: a module says slowly that it has no such attribute.
    forward = getattr(model, "__dict__", {}).get("forward")
    if isinstance(forward, InstalledForward):
        return forward
    forward = getattr(called_model(model), "__dict__", {}).get("forward")
    return forward if isinstance(forward, InstalledForward) else None


class CompiledForward(InstalledForward):
    """For modules that are not causal language models of transformers: torch.compile, our backend.

    Dynamo captures each new combination of shapes; see backend.py.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        from tilewright.backend import backend

        self._compiled = torch.compile(self.original, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)
