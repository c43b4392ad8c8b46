"""./dev campaign models [NAME ...]: every architecture through llm.optimize and torch.compile.

One row each: is it right (error against fp64 next to eager's own, the same greedy tokens), how much
of it runs in our kernels, and what does not and why. A row is measured in a process of its own with
a time limit, so a crash costs one row. Rows are merged into perf/results/models.json; those of
--others into models-others.json.

    ./dev campaign models                  the architectures of the project's goals
    ./dev campaign models llama gpt2       some of them
    ./dev campaign models --others         every other causal language model of transformers
    ./dev campaign models --summary        the recorded rows as a table, nothing runs

Tested by running it; the exit code is 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, Architecture, build, inputs_for, others, prompt
from torch.overrides import TorchFunctionMode

import tilewright
from tilewright import core

RESULTS = Path(__file__).resolve().parents[2] / "perf" / "results"
LENGTHS = (1, 7, 33, 130)
NEW_TOKENS = 64
BOUND = 1.25  # of our error to eager's own
# Prompts whose errors are pooled: the ratio of a single one lies anywhere from 0.8 to 1.4.
DRAWS = 6


class InDouble(TorchFunctionMode):
    """What a model computes in fp32 on purpose (norms, softmax), in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [raised(a) for a in args]
        return func(*args, **{k: raised(v) for k, v in (kwargs or {}).items()})


@contextmanager
def computing(dtype: torch.dtype) -> Iterator[None]:
    if dtype != torch.float64:
        yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def outputs_of(
    architecture: Architecture, model: Any, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What is compared, of all draws: [numbers], fp64."""
    return torch.cat([_outputs_of_draw(architecture, model, dtype, k) for k in range(DRAWS)])


def _outputs_of_draw(
    architecture: Architecture, model: Any, dtype: torch.dtype, draw: int
) -> torch.Tensor:
    """A prefill and a step with its cache, or the result of one call."""
    given = inputs_for(architecture, model, 3, 33, draw)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.inference_mode(), computing(dtype):
        if architecture.kind == "sequence":
            given["decoder_input_ids"] = prompt(3, 9, draw=draw)["input_ids"]
        result = model(**given)
        if architecture.kind != "causal":
            main = getattr(result, "logits", None)
            main = result.last_hidden_state if main is None else main
            if "attention_mask" in given and architecture.kind == "other":
                main = main[given["attention_mask"].bool()]
            return main.double().flatten()
        kept = given["attention_mask"].bool()
        parts = [result.logits[kept].double().flatten()]
        if getattr(result, "past_key_values", None) is not None:
            mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
            positions = (mask.cumsum(-1) - 1)[:, -1:]
            step = {"attention_mask": mask, "past_key_values": result.past_key_values}
            # What torch.compile returns has a forward that takes anything.
            plain = getattr(model, "_orig_mod", model)
            if "position_ids" in inspect.signature(plain.forward).parameters:
                step["position_ids"] = positions
            result = model(input_ids=prompt(3, 1, draw=draw)["input_ids"], **step)
            parts.append(result.logits.double().flatten())
        return torch.cat(parts)


def error(a: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    difference = a - exact
    return {
        "rms": float(difference.square().mean().sqrt()),
        "max": float(difference.abs().max()),
    }


def exact_outputs(architecture: Architecture, model: Any) -> torch.Tensor | None:
    try:
        return outputs_of(architecture, copy.deepcopy(model).double(), torch.float64)
    except (RuntimeError, ValueError, TypeError) as problem:
        print(f"  no fp64 reference: {problem}".splitlines()[0], file=sys.stderr)
        return None


def generate(model: Any, given: dict[str, Any], count: int, **more: Any) -> Any:
    return model.generate(
        **given,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **more,
    )


def token_differences(
    architecture: Architecture, eager: Any, ours: Any, eager_error: float, quick: bool
) -> list[str]:
    """One line per sequence that differs where eager was sure."""
    differences = []
    for tokens in LENGTHS[1:3] if quick else LENGTHS:
        for batch in (1, 3):
            given = inputs_for(architecture, eager, batch, tokens)
            count = 16 if quick else NEW_TOKENS
            expected = generate(
                eager, given, count, return_dict_in_generate=True, output_logits=True
            )
            # A dictionary from both: without one, some models leave out the first tokens.
            got = generate(ours, given, count, return_dict_in_generate=True)
            start = expected.sequences.shape[1] - count
            for row in range(batch):
                unequal = (expected.sequences[row] != got.sequences[row]).nonzero()
                if not len(unequal):
                    continue
                step = int(unequal[0]) - start
                best = expected.logits[step][row].double().topk(2).values
                if float(best[0] - best[1]) > eager_error:
                    differences.append(f"{tokens} tokens x {batch}, row {row}: new token {step}")
    return differences


def compare(
    architecture: Architecture,
    eager: Any,
    ours: Any,
    exact: torch.Tensor | None,
    tokens: str,
) -> dict[str, Any]:
    """`tokens`: "all", "few" or "none" of the generated ones are compared."""
    expected = outputs_of(architecture, eager)
    got = outputs_of(architecture, ours)
    scale = float(expected.square().mean().sqrt()) or 1.0
    row: dict[str, Any] = {"finite": bool(got.isfinite().all())}
    if exact is not None:
        eager_error, our_error = error(expected, exact), error(got, exact)
        floor = 1e-9 * scale
        row["error_ratio"] = max(our_error["rms"], floor) / max(eager_error["rms"], floor)
        row["eager_rms_error"] = eager_error["rms"] / scale
        sure = eager_error["max"]
    else:
        row["difference"] = error(got, expected)["rms"] / scale
        sure = 1e-4 * scale
    if tokens != "none" and architecture.kind != "other":
        row["different_tokens"] = token_differences(
            architecture, eager, ours, sure, quick=tokens == "few"
        )
    row["right"] = (
        row["finite"]
        and row.get("error_ratio", 0.0) <= BOUND
        and row.get("difference", 0.0) <= 1e-4
        and not row.get("different_tokens")
    )
    return row


def coverage(model: Any) -> dict[str, Any]:
    explanation = tilewright.explain(model)
    reasons: dict[str, int] = {}
    for region in explanation.regions:
        if region["fallback"]:
            key = f"{region['name']}: {region['reason']}"
            reasons[key] = reasons.get(key, 0) + 1
    return {
        "own_flops_share": explanation.own_flops_share,
        "phases": {
            name: {
                key: phase[key] for key in ("runs", "own_flops_share", "fallback_calls", "steps")
            }
            for name, phase in explanation.phases.items()
        },
        "calls_in_pytorch": explanation.fallbacks,
        "fallbacks": reasons,
    }


def measure_optimize(architecture: Architecture) -> dict[str, Any]:
    eager = build(architecture)
    exact = exact_outputs(architecture, eager)
    ours = tilewright.llm.optimize(eager)
    row = compare(architecture, eager, ours, exact, "all")
    row.update(coverage(ours))
    narrow = build(architecture).to(torch.bfloat16)
    narrow_exact = exact_outputs(architecture, narrow)
    if narrow_exact is not None:
        expected = error(outputs_of(architecture, narrow, torch.bfloat16), narrow_exact)
        optimized = tilewright.llm.optimize(narrow)
        got = error(outputs_of(architecture, optimized, torch.bfloat16), narrow_exact)
        row["bf16_error_ratio"] = got["rms"] / max(expected["rms"], 1e-12)
        row["right"] = row["right"] and row["bf16_error_ratio"] <= BOUND
    return row


def measure_compile(architecture: Architecture) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    eager = build(architecture)
    exact = exact_outputs(architecture, eager)
    counters.clear()
    compiled = torch.compile(copy.deepcopy(eager), backend="tilewright")
    row = compare(architecture, eager, compiled, exact, "few")
    row.update(coverage(compiled))
    row["graphs"] = counters["stats"]["unique_graphs"]
    row["breaks"] = {k.splitlines()[0]: v for k, v in counters["graph_break"].items()}
    return row


MODES = {"optimize": measure_optimize, "compile": measure_compile}


def measure(architecture: Architecture, mode: str, seconds: float) -> dict[str, Any]:
    """In a child process; a crash or a time-out becomes a row."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(architecture, mode, sender))
    started = time.monotonic()
    child.start()
    sender.close()
    row: dict[str, Any] = {"right": False}
    try:
        if receiver.poll(seconds):
            row = receiver.recv()
        else:
            row["problem"] = f"not done after {seconds:.0f} s"
            child.kill()
    except EOFError:
        child.join()
        row["problem"] = f"the process ended with code {child.exitcode}"
    child.join()
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _child(architecture: Architecture, mode: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    row: dict[str, Any]
    try:
        given_eager = build(architecture)
        outputs_of(architecture, given_eager)
        if architecture.kind == "causal":
            generate(given_eager, prompt(1, 3), 2)
    except Exception as problem:
        row = {"right": True, "skipped": f"eager: {type(problem).__name__}: {problem}"[:300]}
        sender.send(row)
        return
    try:
        row = MODES[mode](architecture)
    except Exception as problem:
        if os.environ.get("TILEWRIGHT_VERBOSE"):
            traceback.print_exc()
        row = {"right": False, "problem": f"{type(problem).__name__}: {problem}"[:500]}
    sender.send(row)


def describe(name: str, mode: str, row: dict[str, Any]) -> str:
    verdict = "skipped" if "skipped" in row else "right" if row["right"] else "WRONG"
    ratio = row.get("error_ratio", float("nan"))
    calls = sum(phase["fallback_calls"] for phase in row.get("phases", {}).values())
    parts = [
        f"{name:24s} {mode:8s} {verdict:7s}",
        f"own {phase_shares(row):14s}",
        f"error {ratio:5.2f} bf16 {row.get('bf16_error_ratio', float('nan')):5.2f}",
        f"fallback calls {calls:5d}  {row['seconds']:5.1f} s",
    ]
    if "graphs" in row:
        parts.append(f"graphs {row['graphs']} breaks {sum(row['breaks'].values())}")
    text = "  ".join(parts)
    for key in ("skipped", "problem"):
        if row.get(key):
            text += f"\n    {key}: {row[key]}"
    if row.get("difference", 0) > 1e-4:
        text += f"\n    differs from eager by {row['difference']:.2g}"
    for line in row.get("different_tokens", [])[:3]:
        text += f"\n    tokens differ: {line}"
    for reason, count in row.get("calls_in_pytorch", {}).items():
        text += f"\n    in PyTorch x {count}: {reason}"
    for reason, count in list(row.get("fallbacks", {}).items())[:12]:
        text += f"\n    fallback x {count}: {reason}"
    return text


def commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()


def phase_shares(row: dict[str, Any]) -> str:
    """Our share of the flops in prefill and decode, in percent."""
    phases = row.get("phases", {})
    ran = [phases[name] for name in ("prefill", "decode") if phases.get(name, {}).get("runs")]
    return " / ".join(f"{100 * phase['own_flops_share']:.1f}" for phase in ran) or "-"


def recorded(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    return found


def calls_in_pytorch(row: dict[str, Any]) -> int:
    """Of single ops within our programs, of whole graphs, and of whole forwards."""
    within = sum(phase["fallback_calls"] for phase in row["phases"].values())
    return int(within + sum(row.get("calls_in_pytorch", {}).values()))


def summary(file: Path) -> str:
    """A Markdown table of the recorded rows, one per architecture that could be built."""
    lines = [
        "| architecture | own flops %, optimize | own flops %, compile | in PyTorch | error |",
        "|---|---|---|---|---|",
    ]
    for name, modes in recorded(file)["rows"].items():
        rows = [modes.get("optimize", {}), modes.get("compile", {})]
        if any("skipped" in row for row in rows):
            continue
        verdict = "" if all(row.get("right", True) for row in rows) else "**WRONG** "
        calls = [str(calls_in_pytorch(row)) if row.get("phases") else "-" for row in rows]
        ratio = rows[0].get("error_ratio", rows[1].get("error_ratio"))
        lines.append(
            f"| {name} | {phase_shares(rows[0])} | {phase_shares(rows[1])} | {', '.join(calls)} "
            f"| {verdict}{'-' if ratio is None else f'{ratio:.2f}x'} |"
        )
    return "\n".join(lines)


def record(file: Path, rows: dict[str, dict[str, Any]], origin: dict[str, str]) -> None:
    """Merges rows into the file of results; `origin`: the machine and commit they came from."""
    results = recorded(file)
    results["date"] = datetime.date.today().isoformat()
    results["torch"] = torch.__version__
    results["transformers"] = transformers.__version__
    merged = results["rows"]
    for name, row in rows.items():
        stamped = {mode: {**measured, **origin} for mode, measured in row.items()}
        merged.setdefault(name, {}).update(stamped)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows; default: all")
    parser.add_argument("--others", action="store_true", help="the models that have no row")
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--seconds", type=float, default=240, help="limit of a row")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--summary", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    file = RESULTS / ("models-others.json" if options.others else "models.json")
    if options.summary:
        print(summary(file))
        return 0
    # Read when the core is first used.
    cache = tempfile.TemporaryDirectory(prefix="tilewright-campaign-")
    os.environ.setdefault("TILEWRIGHT_CACHE_DIR", os.path.join(cache.name, "cache"))
    target = core.engine().target()
    # Asked once: recording makes the tree dirty.
    origin = {"machine": f"{target['model_name']}, {target['isa']}", "commit": commit()}
    table = {**others(), **ARCHITECTURES}
    listed = others() if options.others else ARCHITECTURES
    wrong = 0
    for name in options.names or listed:
        rows = {}
        for mode in MODES if options.mode == "both" else (options.mode,):
            rows[mode] = measure(table[name], mode, options.seconds)
            print(describe(name, mode, rows[mode]), flush=True)
            wrong += not rows[mode]["right"]
        if not options.no_record:
            record(file, {name: rows}, origin)
    print(f"{wrong} wrong")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())
