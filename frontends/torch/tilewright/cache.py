"""BlockLayer: a layer of a transformers Cache whose keys and values live in the core's blocks.

`adopt` swaps the layers inside a DynamicCache or StaticCache, so that `generate`, beam search and
user code keep the object they know. `keys` and `values` materialise tensors; whatever changes them
(reorder, crop, batch selection, plain assignment) is done on the blocks.

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
from tilewright.graph_text import DTYPE_NAMES

layers_alive: weakref.WeakSet[BlockLayer] = weakref.WeakSet()


def bytes_in_use() -> int:
    """Of the keys and values in all living caches."""
    return sum(int(layer.blocks.bytes) for layer in list(layers_alive) if layer.blocks is not None)


class BlockLayer(CacheLayerMixin):
    """See the module's description."""

    is_compileable = False  # a compiled step would want static tensors; programs do not
    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int = -1) -> None:
        self._assigned: dict[str, torch.Tensor] = {}
        self.blocks: Any = None  # core.KvCache
        self.first_keys: list[int] = []
        self.max_length = max_length
        layers_alive.add(self)
        super().__init__()

    # Copies and pickles hold the contents: a prefix may be reused, each time by a copy.

    def __getstate__(self) -> dict[str, Any]:
        contents = None if self.blocks is None else self.read()
        return {
            "max_length": self.max_length,
            "first_keys": self.first_keys,
            "contents": contents,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        BlockLayer.__init__(self, state["max_length"])
        if state["contents"] is not None:
            self.write(*state["contents"])
            if state["first_keys"]:
                self.set_first_keys(list(state["first_keys"]))

    # --- what the program uses

    def prepare(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Makes the blocks of an empty layer."""
        if self.blocks is None:
            self.blocks = core.KvCache(batch, kv_heads, head_dim, DTYPE_NAMES[dtype])
            self.dtype, self.device = dtype, torch.device("cpu")
            self.first_keys = []
            self.is_initialized = True

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
            blocks.read(keys.data_ptr(), values.data_ptr())
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
        keys, values = keys.to(self.dtype).contiguous(), values.to(self.dtype).contiguous()
        self.blocks.write(keys.data_ptr(), values.data_ptr(), length)

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
        """For steps that the original forward runs: appends by rewriting."""
        if self.blocks is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.read()
        keys = torch.cat([keys, key_states], dim=-2)
        values = torch.cat([values, value_states], dim=-2)
        self.write(keys.detach(), values.detach())
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


def adopt(cache: Any, layers: int) -> str:
    """Puts BlockLayers into `cache`, with its contents. Returns why it cannot, or ""."""
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
        layer if isinstance(layer, BlockLayer) else _converted(layer) for layer in cache.layers
    ]
    adopted += [BlockLayer() for _ in range(layers - len(adopted))]
    cache.layers = adopted
    cache.layer_class_to_replicate = None
    return ""


def _converted(layer: Any) -> BlockLayer:
    # Blocks keep what a window would drop.
    block_layer = BlockLayer(-1 if type(layer) in _WINDOWED else layer.get_max_length())
    length = int(layer.get_seq_length())
    if length:
        block_layer.write(layer.keys[:, :, :length], layer.values[:, :, :length])
    return block_layer
