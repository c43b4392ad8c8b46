"""Marker operators: what a captured model records instead of cache updates, attention and layers.

They only exist while a model is captured, over fake tensors; their shapes matter, their values
never do. transformers' own extension points put them into the graph: a Cache whose layers record
`kv_append`, an attention function that records `attention`, and decoder layers whose `forward`
records where they begin and end.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tilewright.graph_text import UnsupportedError

OTHER_MASK = -1
ATTENTION = "tilewright"  # the name in transformers' registries of attention and experts
# Arguments of attention functions that change nothing here. The mask says what the window is.
_HARMLESS = frozenset(
    {
        "sliding_window",
        "output_router_logits",
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
    library.define(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, "
        "float softcap) -> Tensor"
    )
    # Of causal attention; window 0: a query sees all keys before it; OTHER_MASK: another mask.
    # `padding` is what the model made for a mask that it was not given.
    library.define("mask(Tensor like, Tensor? padding, int window) -> Tensor")
    library.define(
        "expert_linear(Tensor x, Tensor weights, Tensor indices, Tensor? bias, bool transposed) "
        "-> Tensor"
    )
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
        lambda q, k, v, *_: q.new_empty((*q.shape[:3], v.shape[3])),
        "Meta",
    )
    library.impl("mask", lambda like, padding, window: torch.empty_like(like), "Meta")
    library.impl(
        "expert_linear",
        lambda x, weights, indices, bias, transposed: x.new_empty(
            indices.numel(), weights.shape[2 if transposed else 1]
        ),
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
    if dropout:
        raise UnsupportedError("attention with dropout")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and attention_mask is None:
        raise UnsupportedError("attention that is not causal")
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if attention_mask is None and kwargs.get("sliding_window") is not None:
        raise UnsupportedError("attention with a window but without a mask")
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _HARMLESS:
            raise UnsupportedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    result = ops().attention(query, key, value, attention_mask, sinks, scale, float(softcap or 0.0))
    return result.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *_: Any,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **__: Any,
) -> torch.Tensor:
    """transformers' mask function: a marker with the structure. Padding is the cache's affair."""
    window = 0
    if mask_function is not None:
        try:
            window = window_of(mask_function, local_size)
        except UnsupportedError:
            window = OTHER_MASK  # of no consequence if nothing uses it: decoders without an encoder
    like = torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype)
    return ops().mask(like, attention_mask, window)


def window_of(mask_function: Any, local_size: int | None) -> int:
    """The window of a causal mask, 0 for none; UnsupportedError if it is another kind of mask.

    The function says for each pair (query, key) whether it takes part; it is asked about pairs
    around the edges that causality and a window have, and some in between.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    size = int(local_size or 0)
    near = (0, 1, 2, 5, 17, size // 2, size - 2, size - 1, size, size + 1, 2 * size)
    queries = (*range(9), *(size + i for i in range(-2, 3)), 2 * size + 3, 4 * size + 40, 1000)
    pairs = [
        (q, k)
        for q, distance in itertools.product(queries, near)
        for k in (q - distance, q + distance)
        if q >= 0 and k >= 0
    ]
    try:
        with _disable_current_modes():
            q, k = (torch.tensor(column) for column in zip(*pairs, strict=True))
            zero = torch.zeros_like(q)
            allowed = mask_function(zero, zero, q, k)
            causal = k <= q
            for window in (0, size):
                expected = causal & (k > q - window) if window else causal
                if bool((allowed == expected).all()):
                    return window
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"a mask that cannot be evaluated: {error}") from error
    raise UnsupportedError("a mask that is neither causal nor a window")


def experts(
    module: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: hidden [r, h]; indices and weights [r, c]."""
    if module._is_expert_parallel or module.has_post_expert_norm:
        raise UnsupportedError("experts in parallel, or with a norm of their own")
    linear, turned, has_bias = ops().expert_linear, module.is_transposed, module.has_bias
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def bias_of(name: str) -> torch.Tensor | None:
        return getattr(module, name + "_bias") if has_bias else None

    rows = linear(hidden, getattr(module, first), indices, bias_of(first), turned)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    each = indices.reshape(-1, 1)
    rows = linear(rows, module.down_proj, each, bias_of("down_proj"), turned)
    # Summed in fp32, in the order of the choices.
    weighted = rows.float() * weights.reshape(-1, 1).float()
    parts = weighted.view(*indices.shape, -1).unbind(1)
    return functools.reduce(torch.add, parts).to(hidden.dtype)


@contextmanager
def recording_experts(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's experts go through `experts`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(ATTENTION, experts)
    with _replaced(model, "_experts_implementation_internal"):
        yield


@contextmanager
def _replaced(model: nn.Module, attribute: str) -> Iterator[int]:
    """Our name in this attribute of the model's configurations. Yields how many have it."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {
        key: getattr(config, attribute)
        for key, config in configs.items()
        if hasattr(config, attribute)
    }
    try:
        for key in before:
            setattr(configs[key], attribute, ATTENTION)
        yield len(before)
    finally:
        for key, value in before.items():
            setattr(configs[key], attribute, value)


@contextmanager
def recording_attention(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's attention goes through `attention`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, mask)
    with _replaced(model, "_attn_implementation_internal") as count:
        if count == 0:
            raise UnsupportedError("the model does not use transformers' attention interface")
        yield


def other_cache_layer(config: Any) -> str:
    """The kind of a layer whose cache holds something else than keys and values; "" if none."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # it makes its caches itself, or none
        return f"layers that transformers does not know ({type(error).__name__}: {error})"
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return type(layer).__name__
    return ""


def recording_cache(config: Any, past: int, tokens: int) -> Any:
    """A Cache that records appends; it claims `past` earlier tokens. Call under the fake mode."""
    from transformers.cache_utils import CacheLayerMixin, DynamicCache

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

    if other := other_cache_layer(config):
        raise UnsupportedError(f"a cache with {other}")
    cache = DynamicCache(config=config)
    cache.layers = [RecordingLayer(i) for i in range(len(cache.layers))]
    return cache


def is_opaque(node: Any) -> bool:
    """Not to be taken apart when arguments are flattened."""
    from transformers.cache_utils import Cache

    return isinstance(node, Cache)


def tensors_of(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
