"""prewarm: fills the kernel cache for a model ahead of time, for this machine or another.

The same capture and compilation as at run time; then every kernel that any number of rows could
need is emitted and stored. Nothing is executed, so the instruction set need not be this machine's.

Tested by tests/python/test_cli.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilewright import _core, core
from tilewright.decoder import decoder_of
from tilewright.graph_text import DTYPE_NAMES, UnsupportedError
from tilewright.model_capture import capture_model


class NotPrewarmedError(Exception):
    """The model has no programs; the message says why."""


def prewarm(
    model: Any, isa: str = "", progress: Callable[[int, int], Any] = lambda done, total: None
) -> dict[str, Any]:
    """Kernels of an optimised model, for this machine or for a rung ("avx512_bf16").

    Returns counts. Raises NotPrewarmedError, or CoreError for an unknown rung.
    """
    decoder = decoder_of(model)
    assert decoder is not None, "llm.optimize comes first"
    engine = core.engine_for(isa) if isa else core.engine()
    if problem := engine.cache_state()["problem"]:
        raise NotPrewarmedError(f"the kernel cache cannot be filled: {problem}")
    if not engine.cache_state()["writable"]:
        raise NotPrewarmedError("the kernel cache cannot be filled: TILEWRIGHT_CACHE is not rw")
    keeps = (1, 0)
    for done, keep in enumerate(keeps):
        progress(done, len(keeps))
        try:
            lowered = capture_model(model, decoder.original, keep).lowered
        except UnsupportedError as error:
            raise NotPrewarmedError(f"{type(model).__name__} has no programs: {error}") from None
        constants = {name: tensor.contiguous() for name, tensor in lowered.constants.items()}
        program = engine.compile(
            lowered.text,
            {
                name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in constants.items()
            },
            _core.WeightStore(),
        )
        program.prepare()
    progress(len(keeps), len(keeps))
    counters = engine.kernel_counters()
    return {
        "emitted": counters["emitted"],
        "loaded": counters["loaded"],
        "code_bytes": counters["code_bytes"],
        "isa": engine.target()["isa"],
        "directory": engine.cache_state()["directory"],
    }
