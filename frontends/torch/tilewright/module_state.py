"""ModuleState: what a captured program took from its model besides the values of weights.

A program is right as long as the model is what it was: the same modules, parameters and buffers,
and the same attributes and configuration, which decide what `forward` does (an adapter's name, an
activation, a scale). A snapshot keeps all of them, and every call compares: by identity, in the
core (binding_snapshot.cpp), which takes some nanoseconds a module where dicts have versions; what
is not the same there may still be equal. Hooks on inner modules must see values that a program
never makes: such a model is not for a program at all.

Not thread-safe by itself: a Decoder compares under its lock. Tested by
tests/python/test_module_state.py, test_optimize.py, test_adapters.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewright import _core

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What nn.Module keeps in every instance; registries and hooks are looked at by name.
_OWN = frozenset(nn.Module().__dict__) - {"training"}
# What transformers' continuous batching sets while it runs: which attention function the model's
# own forward calls, and itself; and what torch.compile leaves in a module. A program has no use for
# any of it.
_IRRELEVANT = (
    "_attn_implementation_internal",
    "_cached_continuous_batching_manager",
    "_is_torch_compile",
)


class ModuleState:
    """A snapshot of a model. It keeps what it saw alive until it is dropped."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self._hooks = [
            (name, module.__dict__[hooks]) for name, module in named[1:] for hooks in _HOOKS
        ]
        self._look_at_hooks()
        watched: list[Any] = []
        configurations: dict[int, Any] = {}
        for _, module in named:
            watched.append(module.__dict__)
            watched += [module.__dict__[registry] for registry in _REGISTRIES]
            watched += [
                value
                for name, value in module.__dict__.items()
                if name not in _OWN and isinstance(value, list | dict | set)
            ]
            configuration = module.__dict__.get("config")
            if hasattr(configuration, "__dict__"):
                configurations[id(configuration)] = configuration
        watched += [configuration.__dict__ for configuration in configurations.values()]
        self._watched = _Containers(watched)

    def is_current(self) -> bool:
        """Whether the model is still what it was."""
        return self._watched.are_equal()

    def is_untouched(self) -> bool:
        """Whether it is current, nothing was even replaced by an equal value, and no inner module
        has hooks. Cheaper than to ask for each, and false more often."""
        return (
            not self._hooked
            and self._watched.are_untouched()
            and self._watched_hooks.are_untouched()
        )

    def hooked(self) -> str:
        """The name of an inner module with forward hooks, or "". The model's own hooks run around a
        program as they do around its forward."""
        if not self._watched_hooks.are_equal():
            self._look_at_hooks()
        return self._hooked

    def _look_at_hooks(self) -> None:
        self._watched_hooks = _Containers([hooks for _, hooks in self._hooks])
        self._hooked = next((name for name, hooks in self._hooks if hooks), "")


class _Containers:
    """Dicts, lists and sets, and what they held: the same or equal values."""

    def __init__(self, containers: list[Any]) -> None:
        self._now = containers
        self._then = [container.copy() for container in containers]
        self._snapshot = _core.Snapshot(self._now, self._then)

    def are_untouched(self) -> bool:
        return not self._snapshot.moved()

    def are_equal(self) -> bool:
        """Whether they hold it still."""
        try:
            for place in self._snapshot.moved():
                now = self._now[place].copy()
                if not _alike(now, self._then[place]):
                    return False
                self._then[place] = now  # so that the next comparison finds the same
        except (RuntimeError, ValueError, TypeError):
            return False  # tensors or arrays that are not the same object have no truth value
        return True


def _alike(now: Any, then: Any) -> bool:
    if now == then:
        return True
    return isinstance(now, dict) and _relevant(now) == _relevant(then)


def _relevant(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _IRRELEVANT}
