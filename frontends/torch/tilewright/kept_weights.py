"""keep_weights: writes a model's packed weights into the cache, so that later starts map them.

The same capture and packing as at run time; nothing is executed. Files are named by the contents of
the weights (cache/README.md), so any model with the same values finds them.

Tested by tests/python/test_kept_weights.py.
"""

from __future__ import annotations

from typing import Any

from tilewright import _core, core
from tilewright.decoder import decoder_of
from tilewright.graph_text import DTYPE_NAMES, UnsupportedError
from tilewright.lowered import CapturedModel
from tilewright.plans import planned_model


class NotKeptError(Exception):
    """Nothing can be written; the message says why."""


def keep_weights(model: Any) -> dict[str, Any]:
    """Of an optimised model: how many packed weights were written and found, and what went wrong.

    Raises NotKeptError, or CoreError.
    """
    decoder = decoder_of(model)
    assert decoder is not None, "llm.optimize comes first"
    engine = core.engine()
    state = engine.cache_state()
    if state["problem"] or not state["writable"]:
        raise NotKeptError(state["problem"] or "TILEWRIGHT_CACHE is not rw")
    before = engine.weight_counters()
    try:
        planned_model(model, decoder.original, 1, _compile, stored=decoder.model_programs.stored)
    except UnsupportedError as error:
        raise NotKeptError(f"{type(model).__name__} has no program: {error}") from None
    after = engine.weight_counters()
    counts = {name: after[name] - before[name] for name in ("written", "mapped", "write_failures")}
    return counts | {"problem": after["write_problem"], "directory": state["directory"]}


def _compile(captured: CapturedModel) -> None:
    """Packs all weights, and writes them."""
    lowered = captured.lowered
    constants = {name: tensor.contiguous() for name, tensor in lowered.constants.items()}
    core.engine().compile(
        lowered.text,
        {
            name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in constants.items()
        },
        _core.WeightStore(),
        optimized=lowered.has_passed,
        keep_weights=True,
    )
