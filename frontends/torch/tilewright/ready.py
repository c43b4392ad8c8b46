"""Ready: a cache whose layers are what a program wants, and how long that lasts.

Making one ready looks at each layer: its blocks, their type, where each sequence begins. A step of
decode finds it so again, and so does the next call by the caller's own loop; that nobody has
changed it in between is a comparison of numbers and of one list.

Where no sequence is padded, a ready cache also has its next step of one token, which differs from
the one before in its tokens and their position only: `Ready.step`.

Not thread-safe by itself: a Decoder calls under its lock. Tested by
tests/python/test_repeated_calls.py, test_conversations.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import _core
from tilewright.cache import BlockLayer, adopt, assignments
from tilewright.graph_text import DTYPES
from tilewright.lowered import CapturedModel
from tilewright.program import Executable
from tilewright.steps import NotRunnableError

_CPU = torch.device("cpu")


@dataclass(eq=False, repr=False)
class NextStep:
    """Of one token per sequence, none of them padded."""

    run: _core.ReadyStep
    symbols: dict[str, int]
    tokens_shape: tuple[int, int]
    logits_shape: tuple[int, ...]
    logits_dtype: torch.dtype

    @staticmethod
    def of(executable: Executable, batch: int, caches: list[int]) -> NextStep | None:
        made = _core.ReadyStep.make(executable.program.handle, caches, batch)
        if made is None:
            return None
        dtype, shape = made.output
        return NextStep(made, {"b": batch, "s": 1}, (batch, 1), tuple(shape), DTYPES[dtype])

    def takes(self, input_ids: Any) -> bool:
        """Whether they are in the form in which the program reads them. Anything but a plain
        tensor is somebody's who wants to see more of a step than its result."""
        return (
            type(input_ids) is torch.Tensor
            and input_ids.dtype is torch.int64
            and input_ids.shape == self.tokens_shape
            and input_ids.is_contiguous()
            and input_ids.is_cpu
        )

    def empty_logits(self) -> torch.Tensor:
        return torch.empty(self.logits_shape, dtype=self.logits_dtype, device=_CPU)


@dataclass(eq=False, repr=False)
class Ready:
    """See the module's description."""

    layers: list[BlockLayer]
    captured: CapturedModel
    batch: int
    first_keys: list[int]
    caches: list[int]  # handles of the program's
    assignments: int  # when the layers were made ready
    step: NextStep | None

    def is_still(self, cache: Any) -> bool:
        """For the program and the batch that it was made for."""
        return bool(self.assignments == assignments.made and cache.layers == self.layers)


class ReadyCaches:
    """Those of living caches."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[Any, Ready] = weakref.WeakKeyDictionary()

    def get(self, cache: Any, captured: CapturedModel, batch: int) -> Ready | None:
        """What is known of a cache, if it holds still and is for this program and batch."""
        ready = self.known(cache)
        if ready is None or ready.captured is not captured or ready.batch != batch:
            return None
        return ready if ready.is_still(cache) else None

    def known(self, cache: Any) -> Ready | None:
        """What was known of it when it was made ready."""
        try:
            return self._made.get(cache)
        except TypeError:  # of what is no cache there may be no weak reference either
            return None

    def make(
        self,
        cache: Any,
        captured: CapturedModel,
        executable: Executable,
        batch: int,
        first_keys: list[int],
    ) -> Ready:
        """REQUIRES: `cache` is what `with_our_layers` returned."""
        layers = [cache.layers[shape.layer] for shape in captured.caches]
        for layer, shape in zip(layers, captured.caches, strict=True):
            layer.prepare(batch, *shape[1:])
            layer.set_first_keys(first_keys)
        caches = [layer.blocks.handle for layer in layers]
        step = None if any(first_keys) else NextStep.of(executable, batch, caches)
        ready = Ready([*cache.layers], captured, batch, first_keys, caches, assignments.made, step)
        self._made[cache] = ready
        return ready


def with_our_layers(given: Any, batch: int, count: int, stored: torch.dtype | None) -> Any:
    """The caller's cache with our layers in it, as many as the model has, or a new one. stored: see
    `adopt`."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache() if given is None else given
    layers = getattr(cache, "layers", None)
    ready = layers is not None and len(layers) == count and isinstance(layers[0], BlockLayer)
    if not ready and (reason := adopt(cache, count, stored)):
        raise NotRunnableError(f"past_key_values is {reason}")
    held = cache.layers[0].batch_size
    if held not in (-1, batch):
        raise NotRunnableError(f"past_key_values holds {held} sequences, not {batch}")
    return cache
