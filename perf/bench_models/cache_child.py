"""A model's kernels in this fresh process: emitted, or loaded from what the environment names.

    python -m bench_models.cache_child CONFIG DTYPE

Prints one line of JSON: how many were emitted and loaded, how long that took, and how long the
engine took to open the cache and to verify packs. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import sys
import time


def main(config: str, dtype: str) -> None:
    from tilewright import _core, core
    from tilewright.graph_text import DTYPE_NAMES
    from tilewright.model_capture import capture_model
    from tilewright.shapes import model_of_shapes

    model = model_of_shapes(config, dtype)
    lowered = capture_model(model, model.forward, 1).lowered
    constants = {name: tensor.contiguous() for name, tensor in lowered.constants.items()}
    start = time.perf_counter()
    engine = core.engine()
    opened = time.perf_counter() - start
    program = engine.compile(
        lowered.text,
        {
            name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in constants.items()
        },
        _core.WeightStore("bf16", True),  # as of checkpoints in bf16 beyond 32 M values
    )
    program.prepare()
    counters = engine.kernel_counters()
    print(
        json.dumps(
            {
                "emitted": counters["emitted"],
                "loaded": counters["loaded"],
                "open_ms": 1e3 * opened,
                "kernels_ms": 1e3 * (counters["emit_seconds"] + counters["load_seconds"]),
                "code_bytes": counters["code_bytes"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
