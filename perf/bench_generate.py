"""Generation with a real model: eager, Inductor and Tilewright in one process, interleaved.

Timings move by 2x within minutes on shared machines, so only ratios of neighbouring runs count:
each round times every system once, in an order that alternates (A B C, C B A, ...), and the figure
is the median of the per-round ratios. Prefill is one new token; decode is the slope between that
and N tokens. Tokens are compared with eager's.

    ./dev bench generate [--rounds 7] [--tokens 64] [--no-inductor]

Writes perf/results/generate-<commit>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tilewright import demo

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit, with + when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def cpu() -> str:
    """The CPU's brand."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def systems(model: Any, inductor: bool) -> dict[str, Any]:
    """The same weights in each system."""
    import tilewright

    made: dict[str, Any] = {"eager": model}
    optimized = copy.deepcopy(model)
    made["tilewright"] = tilewright.llm.optimize(optimized, inplace=True)
    if inductor:
        compiled = copy.deepcopy(model)
        compiled.generation_config.cache_implementation = "static"
        compiled.forward = torch.compile(compiled.forward, backend="inductor", dynamic=False)
        made["inductor"] = compiled
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-inductor", action="store_true")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    directory = demo.model_directory()
    demo.prepare_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": demo.PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = systems(model, not options.no_inductor)

    def generate(name: str, count: int) -> torch.Tensor:
        return made[name].generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    wanted = generate("eager", options.tokens)
    same = {}
    for name in made:
        generate(name, 1)
        same[name] = bool(torch.equal(generate(name, options.tokens), wanted))
    prefill: dict[str, list[float]] = {name: [] for name in made}
    decode: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(options.rounds):
        for name in list(made) if turn % 2 == 0 else list(reversed(made)):
            one = timed(lambda name=name: generate(name, 1))
            whole = timed(lambda name=name: generate(name, options.tokens))
            prefill[name].append(one)
            decode[name].append((whole - one) / (options.tokens - 1))
    rows = {}
    for name in made:
        against = {
            other: {
                "prefill": statistics.median(
                    b / a for a, b in zip(prefill[name], prefill[other], strict=True)
                ),
                "decode": statistics.median(
                    b / a for a, b in zip(decode[name], decode[other], strict=True)
                ),
            }
            for other in made
            if other != name
        }
        rows[name] = {
            "identical_to_eager": same[name],
            "prefill_seconds": statistics.median(prefill[name]),
            "decode_seconds_per_token": statistics.median(decode[name]),
            "times_faster_than": against,
        }
        print(
            f"{name:12} prefill {1e3 * rows[name]['prefill_seconds']:7.1f} ms"
            f"  decode {1e3 * rows[name]['decode_seconds_per_token']:6.2f} ms/token"
            f"  {'identical' if same[name] else 'DIFFERENT'}  "
            + "  ".join(
                f"vs {other}: {ratio['prefill']:.2f}x / {ratio['decode']:.2f}x"
                for other, ratio in against.items()
            )
        )
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": "generate",
        "commit": commit(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": "SmolLM2-135M-Instruct fp32",
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "systems": rows,
    }
    path = RESULTS / f"generate-{record['commit'].rstrip('+')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
