"""Parts: a model that is no single program, through torch.compile with our backend.

So that the parts that are understood are ours. Where that is of no use (a model in too many pieces,
or one that Dynamo cannot trace), there is a reason instead, and the model's own forward runs.

Not thread-safe by itself: a Decoder calls under its lock. Tested by
tests/python/test_architectures.py.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable
from typing import Any

import torch

from tilewright import core
from tilewright.installed import InstalledForward

# Compilations, and graph breaks in one call. With more of them (modules that compute in objects of
# their own, at each layer) calling the parts costs more than they save.
_MOST_COMPILATIONS = 32
_MOST_BREAKS = 4


class Parts:
    """See the module's description."""

    def __init__(self, owner: InstalledForward, fallbacks: collections.Counter[str]) -> None:
        """fallbacks: where calls that ran in PyTorch are counted by reason."""
        self._owner = owner
        self._fallbacks = fallbacks
        self.compiled: Callable[..., Any] | None = None  # once it was needed, the model's forward
        self.refused = ""  # why there is no use in that

    def refresh(self) -> None:
        """Compiles again at the next call."""
        self.compiled = None
        self.refused = ""

    def run(self, reason: str, args: Any, kwargs: Any, fall_back: Callable[[str], Any]) -> Any:
        """The call of a model of which no program can be made, for this reason. fall_back: runs the
        model's own forward, for the reason that it is given."""
        from tilewright import backend, capture_ops

        if capture_ops.other_cache_layer(self._owner.model.config):
            # States over time are loops over tokens, which Dynamo would unroll for every length.
            return fall_back(reason)
        if self.refused:
            return fall_back(self.refused)
        if self.compiled is None:
            name = type(self._owner.model).__name__
            core.say_once(f"{name} is no single program, torch.compile takes its parts: {reason}")
            # A generation has more kinds of calls than Dynamo's 8: one token or many, of one
            # sequence or many, a cache or none ... Not dynamic=True, which makes symbols of floats.
            limit: dict[str, Any] = {}
            if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
                limit = {"recompile_limit": _MOST_COMPILATIONS}
            self.compiled = torch.compile(self._owner.original, backend=backend.backend, **limit)
        length = _length_of(kwargs.get("past_key_values"))
        before, breaks = backend.calls(), _graph_breaks()
        try:
            result = self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if length != _length_of(kwargs.get("past_key_values")):
                raise  # a part of the step has run
            problem = f"{reason}; by parts: {str(error).splitlines()[0]}"
            result = fall_back(problem)
            self.refused = problem  # the model's own forward took the call
            return result
        breaks = _graph_breaks() - breaks
        if breaks > _MOST_BREAKS:
            self.refused = f"{reason}; by parts: {breaks} graph breaks"
            self.compiled = None
        elif backend.calls() == before:
            self._fallbacks[f"torch.compile made no graph of this call; {reason}"] += 1
        return result


def _graph_breaks() -> int:
    """Of this process so far."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _length_of(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
