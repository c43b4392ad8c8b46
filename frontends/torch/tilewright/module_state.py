"""ModuleState: what a captured program took from its model besides the values of weights.

A program is right as long as the model is what it was: the same modules, parameters and buffers,
and the same attributes and configuration, which decide what `forward` does (an adapter's name, an
activation, a scale). A snapshot keeps all of them; comparing takes about a microsecond per module,
so every call can afford it. Hooks on inner modules must see values that a program never makes:
such a model is not for a program at all.

Not thread-safe by itself: a Decoder compares under its lock. Tested by
tests/python/test_optimize.py, test_adapters.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What nn.Module keeps in every instance; registries and hooks are looked at by name.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
# What transformers' continuous batching sets while it runs: which attention function the model's
# own forward calls, and itself. A program has no use for either.
_IRRELEVANT = ("_attn_implementation_internal", "_cached_continuous_batching_manager")


class ModuleState:
    """A snapshot of a model. It keeps what it saw alive until it is dropped."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        modules = [module for _, module in named]
        self._hooks = [
            (name, module.__dict__[hooks]) for name, module in named[1:] for hooks in _HOOKS
        ]
        # (dictionary, its shallow copy): equal as long as each value is the same or equal.
        self._pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        for module in modules:
            self._pairs.append((module.__dict__, dict(module.__dict__)))
            for registry in _REGISTRIES:
                if module.__dict__[registry]:
                    self._pairs.append((module.__dict__[registry], dict(module.__dict__[registry])))
            for name, value in module.__dict__.items():
                if name not in _OWN and isinstance(value, list | dict | set):
                    self._containers.append((value, value.copy()))
        configurations = {
            id(module.__dict__["config"]): module.__dict__["config"]
            for module in modules
            if hasattr(module.__dict__.get("config"), "__dict__")
        }
        for configuration in configurations.values():
            self._pairs.append((configuration.__dict__, dict(configuration.__dict__)))

    def is_current(self) -> bool:
        """Whether the model is still what it was."""
        try:
            return all(
                now == then or _relevant(now) == _relevant(then) for now, then in self._pairs
            ) and all(now == then for now, then in self._containers)
        except (RuntimeError, ValueError, TypeError):
            return False  # tensors or arrays that are not the same object have no truth value

    def hooked(self) -> str:
        """The name of an inner module with forward hooks, or "". The model's own hooks run around a
        program as they do around its forward."""
        if not any(hooks for _, hooks in self._hooks):
            return ""
        return next(name for name, hooks in self._hooks if hooks)


def _relevant(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _IRRELEVANT}
