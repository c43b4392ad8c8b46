"""BlockLayer: a layer of a transformers Cache whose keys and values live in the core's blocks.

`adopt` swaps the layers inside a DynamicCache or StaticCache, so that `generate`, beam search and
user code keep the object they know. `keys` and `values` materialise tensors; whatever changes them
(reorder, crop, batch selection, plain assignment) is done on the blocks.

Blocks of int8 materialise in the model's type, and what is assigned is rounded to 8 bits. Rows that
were of that type once come and go without further loss (jit/base/eight_bits.h).

Not thread-safe, as any Cache. Tested by tests/python/test_generate.py.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from tilewright import core
from tilewright.assignments import Assignments, CountsAssignments
from tilewright.graph_text import DTYPE_NAMES

# As long as nobody made one to a BlockLayer, the layers of a cache are as a step left them. What
# tokens they hold, their blocks say.
assignments = Assignments()

layers_alive: weakref.WeakSet[BlockLayer] = weakref.WeakSet()


def bytes_in_use() -> int:
    """Of the keys and values in all living caches."""
    return sum(int(layer.blocks.bytes) for layer in list(layers_alive) if layer.blocks is not None)


class BlockLayer(CountsAssignments, CacheLayerMixin):
    """See the module's description."""

    assignments = assignments

    is_compileable = False  # a compiled step would want static tensors; programs do not
    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int = -1, stored: torch.dtype | None = None) -> None:
        """stored: the type of the blocks; None: that of keys and values."""
        self._assigned: dict[str, torch.Tensor] = {}
        self.blocks: Any = None  # core.KvCache
        self.stored = stored
        self.first_keys: list[int] = []
        self.max_length = max_length
        layers_alive.add(self)
        super().__init__()

    # Copies and pickles hold the contents: a prefix may be reused, each time by a copy.

    def __getstate__(self) -> dict[str, Any]:
        contents = None if self.blocks is None else self.read()
        return {
            "max_length": self.max_length,
            "stored": self.stored,
            "first_keys": self.first_keys,
            "contents": contents,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        BlockLayer.__init__(self, state["max_length"], state["stored"])
        if state["contents"] is not None:
            self.write(*state["contents"])
            if state["first_keys"]:
                self.set_first_keys(list(state["first_keys"]))

    # --- what the program uses

    def prepare(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
    ) -> None:
        """Makes the blocks of an empty layer, or others of one whose type is not `stored`."""
        self.stored = stored or self.stored
        name = DTYPE_NAMES[self.stored or dtype]
        if self.blocks is None:
            self.blocks = core.KvCache(batch, kv_heads, head_dim, name)
            self.dtype, self.device = dtype, torch.device("cpu")
            self.first_keys = []
            self.is_initialized = True
        elif self.blocks.dtype != name and self.dtype == dtype:
            keys, values = self.read()
            self.blocks = None
            self.write(keys, values)

    def set_first_keys(self, first_keys: list[int]) -> None:
        if first_keys != self.first_keys:
            self.blocks.set_first_keys(first_keys)
            self.first_keys = first_keys

    # --- tensors

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [batch, heads, length, head_dim]."""
        blocks = self.blocks
        shape = (blocks.batch, blocks.kv_heads, blocks.length, blocks.head_dim)
        keys, values = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
        if keys.numel():
            blocks.read(DTYPE_NAMES[self.dtype], keys.data_ptr(), values.data_ptr())
        return keys, values

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replaces the contents."""
        batch, heads, length, head_dim = keys.shape
        blocks = self.blocks
        if blocks is None or (batch, heads, head_dim) != (
            blocks.batch,
            blocks.kv_heads,
            blocks.head_dim,
        ):
            self.blocks = None
            self.prepare(batch, heads, head_dim, keys.dtype)
        keys, values = self._as_taken(keys), self._as_taken(values)
        self.blocks.write(length, DTYPE_NAMES[self.dtype], keys.data_ptr(), values.data_ptr())

    def _as_taken(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).contiguous()

    def _get(self, index: int) -> torch.Tensor | None:
        if self.blocks is None:
            return None
        return self.read()[index]

    def _set(self, name: str, tensor: torch.Tensor | None) -> None:
        """Code outside assigns keys, then values: they are written when both fit together."""
        if tensor is None:
            self._assigned.clear()
            self.blocks = None
            return
        self._assigned[name] = tensor
        if len(self._assigned) == 2 and (
            self._assigned["keys"].shape == self._assigned["values"].shape
        ):
            self.write(self._assigned["keys"], self._assigned["values"])
            self._assigned.clear()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._get(0)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._set("keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        return self._get(1)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._set("values", tensor)

    # --- the interface of a cache layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        self.prepare(batch, heads, head_dim, key_states.dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For steps that the original forward runs."""
        if self.blocks is None:
            self.lazy_initialization(key_states, value_states)
        before = self.read()
        new = [self._as_taken(states.detach()) for states in (key_states, value_states)]
        shape = (self.blocks.batch, self.blocks.kv_heads, new[0].shape[2], self.blocks.head_dim)
        if any(tuple(states.shape) != shape for states in new):
            raise ValueError(f"keys and values {tuple(new[0].shape)} for a cache of {shape}")
        addresses = [states.data_ptr() for states in new]
        self.blocks.append(shape[2], DTYPE_NAMES[self.dtype], *addresses)
        is_rounded = self.blocks.dtype != DTYPE_NAMES[self.dtype]
        if is_rounded and not key_states.requires_grad:
            return self.read()  # as every other step sees them
        keys, values = (
            torch.cat([old, states], dim=-2)
            for old, states in zip(before, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.blocks is None else int(self.blocks.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    @property
    def batch_size(self) -> int:
        return -1 if self.blocks is None else int(self.blocks.batch)

    def offload(self) -> None:
        """The blocks are in main memory already."""

    def prefetch(self) -> None:
        """As offload."""

    def reset(self) -> None:
        self.blocks = None
        self.first_keys = []
        self.is_initialized = False

    def _reorder(self, indices: list[int]) -> None:
        if self.blocks is not None:
            self.blocks.reorder(indices)
            self.first_keys = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.blocks is not None:
            self._reorder([i for i in range(self.blocks.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._reorder(indices.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer: a negative count of tokens to remove from the end."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"Calling `crop` with a positive value (`{tokens_to_remove}`) is not supported. "
                "Please use a negative integer to remove that number of tokens from the cache."
            )
        if tokens_to_remove and self.blocks is not None:
            self.blocks.truncate(max(0, self.blocks.length + tokens_to_remove))


# A window is the attention's affair: blocks keep all tokens, and a query reads those in its window.
_WINDOWED = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


def adopt(cache: Any, layers: int, stored: torch.dtype | None = None) -> str:
    """Puts BlockLayers into `cache`, with its contents. stored: the type of their blocks; None:
    that of the contents. Returns why it cannot, or ""."""
    if type(cache) not in (Cache, DynamicCache, StaticCache):
        return f"a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    if len(cache.layers) > layers:
        return "a cache with more layers than the model"
    for layer in cache.layers:
        if type(layer) not in (BlockLayer, DynamicLayer, StaticLayer, *_WINDOWED):
            return f"a cache with {type(layer).__name__}"
        if isinstance(layer, BlockLayer) or layer.keys is None or layer.values is None:
            continue
        if type(layer) in _WINDOWED and int(layer.get_seq_length()):
            return "a cache that has dropped tokens outside of its window, or may have"
        if layer.keys.numel() and layer.keys.shape != layer.values.shape:
            return "a cache whose keys and values differ in shape"
    adopted = [
        layer if isinstance(layer, BlockLayer) else _converted(layer, stored)
        for layer in cache.layers
    ]
    adopted += [BlockLayer(stored=stored) for _ in range(layers - len(adopted))]
    cache.layers = adopted
    cache.layer_class_to_replicate = None
    return ""


def _converted(layer: Any, stored: torch.dtype | None) -> BlockLayer:
    # Blocks keep what a window would drop.
    block_layer = BlockLayer(-1 if type(layer) in _WINDOWED else layer.get_max_length(), stored)
    length = int(layer.get_seq_length())
    if length:
        block_layer.write(layer.keys[:, :, :length], layer.values[:, :, :length])
    return block_layer
