"""One start, in this fresh process: from nothing to the first token, and where the time went.

    python -m bench_models.start_child SPAWNED DIRECTORY DTYPE PROMPT

SPAWNED: what time.monotonic() said just before the process was made. Prints one line of JSON: the
parts in milliseconds, which add up to the total by construction, the token, and what the next call
took, which may have had to pack. Tested by
tests/python/test_bench_models.py.
"""

from __future__ import annotations

import time

_BEGAN = time.monotonic()  # before anything else is imported

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def main(spawned: float, directory: str, dtype: str, prompt: int) -> None:
    marks = [("interpreter", spawned), ("imports", _BEGAN)]
    import torch
    import transformers

    import tilewright
    from tilewright import core

    transformers.AutoModelForCausalLM.from_config  # noqa: B018 - a module that is made when needed
    marks.append(("read checkpoint", time.monotonic()))
    transformers.logging.disable_progress_bar()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=kind).eval()
    tokens = torch.arange(10, 10 + prompt)[None]
    marks.append(("optimize", time.monotonic()))
    model = tilewright.llm.optimize(model, inplace=True)
    marks.append(("first token", time.monotonic()))
    made = generate(model, tokens)
    end = time.monotonic()
    ends = [begin for _, begin in marks[1:]] + [end]
    parts = {name: 1e3 * (at - begin) for (name, begin), at in zip(marks, ends, strict=True)}

    # What the first token is made of; the rest is the core's compilation, giving back the weights'
    # own memory, and the way through generate.
    kernels, weights, plans = core.counters(), core.weight_counters(), tilewright.stats()["plans"]
    explanation = tilewright.explain(model)
    inner = {
        "capture": plans["capture_seconds"],
        "plan": plans["plan_seconds"],
        "hash weights": weights["hash_seconds"],
        "map weights": weights["map_seconds"],
        "pack weights": weights["pack_seconds"],
        "write weights": weights["write_seconds"],
        "emit kernels": kernels["emit_seconds"],
        "load kernels": kernels["load_seconds"],
        "compute": sum(phase["own_seconds"] for phase in explanation.phases.values()),
    }
    inner = {name: 1e3 * seconds for name, seconds in inner.items()}
    begin = time.monotonic()
    generate(model, made)
    seconds = time.monotonic() - begin
    packing = core.weight_counters()["pack_seconds"] - weights["pack_seconds"]
    parts["the rest"] = parts.pop("first token") - sum(inner.values())
    parts |= inner
    print(
        json.dumps(
            {
                "parts": parts,
                "total": 1e3 * (end - spawned),
                "captured": plans["captured"],
                "packed": weights["packed"],
                "mapped": weights["mapped"],
                "token": int(made[0, -1]),
                "next": {"total": 1e3 * seconds, "pack weights": 1e3 * packing},
            }
        )
    )


def generate(model: Any, tokens: Any) -> Any:
    """Them and the next one."""
    import torch

    with torch.inference_mode():
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False
        )


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
