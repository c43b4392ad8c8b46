"""Ragged steps: transformers' continuous batching (`generate_batch`) on our kernels.

transformers' scheduler decides which requests take part in a step and where their keys and values
lie; its runner calls the model with the new tokens of all of them behind one another in one row
[1, tokens], some with one token and some with a prompt. Only attention and the writing of keys and
values see requests (ops/ragged_rows.h): they work on the pages of transformers' own paged cache, so
its sharing of prefixes, forking and offloading go on as they are. What says which tokens are whose
are the arguments that the runner gives to attention functions.

Layers with a window keep a ring there, which our attention does not read: such models stay with
their own forward.

Thread-safe: a Decoder calls under its lock. Tested by tests/python/test_generate_batch.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import core
from tilewright.graph_text import DTYPE_NAMES, UnsupportedError
from tilewright.lowered import CacheShape

# The runner's, beside those of any forward.
_KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",  # of its making: each request is causal
        "position_ids",
        "use_cache",
        "logits_to_keep",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "write_index",
        "read_index",
        "logits_indices",
        "logits_processor_args",
        "cache",
        "block_table",
        "is_causal",
    }
)
_FULL = "full_attention"


@dataclass(eq=False, repr=False)
class RaggedStep:
    """A call in the form that programs take."""

    input_ids: torch.Tensor  # [1, tokens]
    position_ids: torch.Tensor  # [1, tokens]
    chosen: torch.Tensor | None  # tokens whose logits are wanted; None: all
    sequences: list[tuple[int, int, list[int]]]  # new tokens, tokens before, pages
    cache: Any

    @property
    def is_decode(self) -> bool:
        return self.input_ids.shape[1] == len(self.sequences)


def is_ragged(arguments: Mapping[str, Any]) -> bool:
    """Whether the model is called with a paged cache."""
    return arguments.get("cache") is not None


def step_of(arguments: Mapping[str, Any]) -> RaggedStep:
    """Raises UnsupportedError with the reason if no program takes these arguments."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    cache = arguments["cache"]
    if type(cache) is not PagedAttentionCache:
        raise UnsupportedError(f"the argument cache is a {type(cache).__name__}")
    for name, value in arguments.items():
        if name not in _KNOWN and value is not None and value is not False:
            raise UnsupportedError(f"the argument {name} is given")
    if list(cache.cache_allocators) != [_FULL]:
        raise UnsupportedError("a paged cache of layers with a window")
    if arguments.get("block_table") is not None:
        raise UnsupportedError("a paged cache that the attention function is to write")
    chosen = arguments.get("logits_to_keep")
    if isinstance(chosen, int) and chosen == 0:
        chosen = None
    if chosen is not None and not isinstance(chosen, torch.Tensor):
        raise UnsupportedError("logits_to_keep is not a tensor")
    return RaggedStep(
        arguments["input_ids"].to(torch.int64).contiguous(),
        arguments["position_ids"].to(torch.int64).contiguous(),
        None if chosen is None else chosen.to(torch.int64).contiguous(),
        _sequences(arguments, cache.cache_allocators[_FULL].tokens_per_page),
        cache,
    )


def _sequences(arguments: Mapping[str, Any], page_tokens: int) -> list[tuple[int, int, list[int]]]:
    """Each request's new tokens, tokens before, and where its pages begin."""
    queries = arguments["cu_seq_lens_q"].tolist()
    keys = arguments["cu_seq_lens_k"][_FULL].tolist()
    # Where each token of each request is to be read; where nothing was written before this step,
    # only where the new ones are to be written.
    (read,), (written,) = arguments["read_index"], arguments["write_index"]
    places = read if read.numel() else written
    sequences = []
    for i in range(len(queries) - 1):
        rows, tokens = queries[i + 1] - queries[i], keys[i + 1] - keys[i]
        pages = places[keys[i] : keys[i + 1] : page_tokens].tolist()
        sequences.append((rows, tokens - rows, pages))
    return sequences


class PagedCaches:
    """The core's views of transformers' paged caches, each made once."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def begin_step(self, step: RaggedStep, shapes: Sequence[CacheShape]) -> list[Any]:
        """The layers' caches, ready for this step. Raises UnsupportedError, CoreError."""
        made = self._made.get(step.cache)
        if made is None:
            made = self._made[step.cache] = _make(step.cache, shapes)
        made.begin_step(step.sequences)
        layers: list[Any] = made.layers
        return layers


def _make(cache: Any, shapes: Sequence[CacheShape]) -> Any:
    allocator = cache.cache_allocators[_FULL]
    heads, head_dim = allocator.num_key_value_heads, allocator.head_dim
    for shape in shapes:
        if (shape.kv_heads, shape.head_dim, shape.dtype) != (heads, head_dim, cache.dtype):
            raise UnsupportedError("a paged cache of other heads than the model's")
    pages = [allocator.get_cache_for_block_table(shape.layer) for shape in shapes]
    return core.PagedCaches(
        layers=[(keys.data_ptr(), values.data_ptr()) for keys, values in pages],
        page_tokens=allocator.tokens_per_page,
        memory_tokens=min(keys.shape[0] for keys, _ in pages) * allocator.tokens_per_page,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=DTYPE_NAMES[cache.dtype],
    )
