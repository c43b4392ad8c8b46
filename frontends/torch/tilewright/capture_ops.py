"""Marker operators: what a captured model records instead of cache updates, attention and layers.

They only exist while a model is captured, over fake tensors; their shapes matter, their values
never do. transformers' own extension points put them into the graph: a Cache whose layers record
`kv_append`, an attention function that records `attention`, and decoder layers whose `forward`
records where they begin and end.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tilewright.graph_text import UnsupportedError

ATTENTION = "tilewright"  # the name in transformers' attention registries
# Arguments of attention functions that change nothing here.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "position_embeddings",
        "past_key_values",
        "layer_idx",
        "logits_to_keep",
        "return_dict",
    }
)


@functools.cache
def ops() -> Any:
    """The operators, registered at first use: `torch.ops.tilewright_capture`."""
    library = torch.library.Library("tilewright_capture", "DEF")
    library.define("kv_append(Tensor k, Tensor v, Tensor all, int layer) -> (Tensor, Tensor)")
    library.define("attention(Tensor q, Tensor k, Tensor v, float scale, int layer) -> Tensor")
    library.define("layer_begin(Tensor[] inputs, int layer) -> Tensor[]")
    library.define("layer_end(Tensor[] outputs, int layer) -> Tensor[]")
    library.define("layer(Tensor[] inputs, Tensor[] like, int layer) -> Tensor[]")

    def kv_append(k: Any, v: Any, all_: Any, layer: int) -> Any:
        length = all_.shape[0]
        return k.new_empty((*k.shape[:2], length, k.shape[3])), v.new_empty(
            (*v.shape[:2], length, v.shape[3])
        )

    library.impl("kv_append", kv_append, "Meta")
    library.impl(
        "attention",
        lambda q, k, v, scale, layer: q.new_empty((*q.shape[:3], v.shape[3])),
        "Meta",
    )
    same = lambda tensors, layer: [torch.empty_like(x) for x in tensors]  # noqa: E731
    library.impl("layer_begin", same, "Meta")
    library.impl("layer_end", same, "Meta")
    library.impl("layer", lambda inputs, like, layer: [torch.empty_like(x) for x in like], "Meta")
    _keep_alive.append(library)
    return torch.ops.tilewright_capture


_keep_alive: list[Any] = []


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function; q, k, v: [b, heads, s, d], the result [b, s, heads, d]."""
    if attention_mask is not None:
        raise UnsupportedError("attention with a mask of the model's own")
    if dropout:
        raise UnsupportedError("attention with dropout")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedError("attention that is not causal")
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS:
            raise UnsupportedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = int(getattr(module, "layer_idx", -1))
    result = ops().attention(query, key, value, scale, layer)
    return result.transpose(1, 2).contiguous(), None


def no_mask(*_: Any, **__: Any) -> None:
    """transformers' mask function: the attention op is causal, padding is the cache's affair."""
    return None


@contextmanager
def recording_attention(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's attention goes through `attention`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {
        key: config._attn_implementation_internal
        for key, config in configs.items()
        if hasattr(config, "_attn_implementation_internal")
    }
    if not before:
        raise UnsupportedError("the model does not use transformers' attention interface")
    try:
        for key in before:
            configs[key]._attn_implementation_internal = ATTENTION
        yield
    finally:
        for key, value in before.items():
            configs[key]._attn_implementation_internal = value


def recording_cache(config: Any, past: int, tokens: int) -> Any:
    """A Cache that records appends; it claims `past` earlier tokens. Call under the fake mode."""
    from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

    class RecordingLayer(CacheLayerMixin):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index
            self.is_initialized = True

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            pass

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            length = torch.empty(past + tokens, dtype=torch.uint8)
            return ops().kv_append(key_states, value_states, length, self.index)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return past + query_length, 0

        def get_seq_length(self) -> int:
            return past

        def get_max_length(self) -> int:
            return -1

    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) is not DynamicLayer:
            raise UnsupportedError(f"a cache with {type(layer).__name__}")
    cache.layers = [RecordingLayer(i) for i in range(len(cache.layers))]
    return cache


def is_opaque(node: Any) -> bool:
    """Not to be taken apart when arguments are flattened."""
    from transformers.cache_utils import Cache

    return isinstance(node, Cache)


def tensors_of(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
