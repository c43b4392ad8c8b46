"""stats: what this process did so far, over all its models. Cheap enough to poll.

Tested by tests/python/test_explain.py.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

from tilewright import core


def stats() -> dict[str, Any]:
    """Counters of this process. `explain(model)` tells more about one model.

    problem: why everything runs in PyTorch, "" if it does not.
    tokens: computed by programs of optimised models (prompts included). fallbacks: calls that ran
    in PyTorch, by reason. plans: models captured, loaded from plans in the cache, and why some
    have none (plans.counters). weights: how many were packed, or mapped from files. weight_bytes,
    cache_bytes: packed weights, and keys and values, that are alive now.
    """
    fallbacks: collections.Counter[str] = collections.Counter()
    tokens = calls = 0
    decoders = sys.modules.get("tilewright.decoder")
    for decoder in list(decoders.decoders) if decoders is not None else []:
        fallbacks.update(decoder.fallbacks)
        tokens += decoder.tokens
        calls += decoder.calls
    backends = sys.modules.get("tilewright.backend")
    for graph in list(backends.graphs) if backends is not None else []:
        calls += graph.calls - graph.fallback_calls
        if graph.fallback_calls:
            fallbacks[graph.reason] += graph.fallback_calls
    programs = sys.modules.get("tilewright.program")
    caches = sys.modules.get("tilewright.cache")
    plans = sys.modules.get("tilewright.plans")
    return {
        "problem": core.unavailable(),
        "tokens": tokens,
        "calls": calls,
        "fallbacks": dict(fallbacks),
        "kernels": core.counters(),
        "kernel_cache": dict(core.engine().cache_state()),
        "plans": plans.counters() if plans is not None else {},
        "weights": core.weight_counters(),
        "weight_bytes": programs.weight_bytes() if programs is not None else 0,
        "cache_bytes": caches.bytes_in_use() if caches is not None else 0,
    }
