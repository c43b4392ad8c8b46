"""What a token costs beside its kernels, and how long a prefill keeps other Python threads waiting.

Overhead: the wall time of decode steps of a model so small that little else is left, less what its
regions took by the core's own clock; microseconds a step, for the loop of `generate`, for calls of
the model with a cache, and for calls of the compiled model. Waiting: a thread that sleeps for a
millisecond at a time notes how late it comes back, alone and beside prefills.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench_models import text
from bench_models.generation import DTYPES

TICK = 1e-3  # seconds


def optimized(directory: Path, dtype: str) -> Any:
    """The model, in place."""
    import transformers

    import tilewright

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
    return tilewright.llm.optimize(model, inplace=True)


def own_seconds(model: Any) -> float:
    """What the core's regions took so far."""
    import tilewright

    return sum(phase["own_seconds"] for phase in tilewright.explain(model).phases.values())


def step_overhead(directory: Path, dtype: str, steps: int, rounds: int) -> dict[str, float]:
    """Microseconds a step by way; medians of `rounds`."""
    model = optimized(directory, dtype)
    compiled = torch.compile(model, backend="tilewright", fullgraph=True)
    prompt = torch.tensor([text.random_tokens(model.config.vocab_size, 16, seed=1)])

    def generate(new: int) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
        )

    def calls(called: Callable[..., Any], new: int) -> None:
        output = called(input_ids=prompt, use_cache=True)
        for _ in range(new - 1):
            token = output.logits[:, -1:].argmax(-1)
            output = called(input_ids=token, past_key_values=output.past_key_values)

    ways: dict[str, Callable[[int], None]] = {
        "generate": generate,
        "model(input_ids, past_key_values)": lambda new: calls(model, new),
        "compiled(input_ids, past_key_values)": lambda new: calls(compiled, new),
    }

    def beside_kernels(way: Callable[[int], None], new: int) -> float:
        own, begin = own_seconds(model), time.perf_counter()
        way(new)
        spent = time.perf_counter() - begin
        return spent - (own_seconds(model) - own)

    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for way in ways.values():
            way(4)
        for _ in range(rounds):
            for name, way in ways.items():
                longer, shorter = beside_kernels(way, steps + 2), beside_kernels(way, 2)
                found[name].append(1e6 * (longer - shorter) / steps)
    return {name: statistics.median(values) for name, values in found.items()}


def waiting(directory: Path, dtype: str, prompt: int, prefills: int) -> dict[str, dict[str, float]]:
    """Milliseconds that the thread came back late: the most, and of 99 in 100 times."""
    model = optimized(directory, dtype)
    ids = torch.tensor([text.random_tokens(model.config.vocab_size, prompt, seed=1)])

    def beside(work: Callable[[], None]) -> dict[str, float]:
        late: list[float] = []
        done = threading.Event()

        def tick() -> None:
            while not done.is_set():
                begin = time.perf_counter()
                time.sleep(TICK)
                late.append(1e3 * (time.perf_counter() - begin - TICK))

        thread = threading.Thread(target=tick)
        thread.start()
        work()
        done.set()
        thread.join()
        late.sort()
        return {"most": late[-1], "p99": late[len(late) * 99 // 100], "ticks": float(len(late))}

    def prefill() -> None:
        with torch.inference_mode():
            for _ in range(prefills):
                model(input_ids=ids, logits_to_keep=1)

    prefill()
    return {"alone": beside(lambda: time.sleep(2.0)), f"{prefills} prefills": beside(prefill)}
