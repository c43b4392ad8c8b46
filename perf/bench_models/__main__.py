"""The commands behind ./dev bench: setup, roof, models, ops, encoder, generation, decode, overhead,
start, cache, report and compare.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench_models import cells, gate, places, results, session, systems, table

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
messages = Console(stderr=True)


QUICK_MINUTES = 4.3  # the last block and the table still fit into five


def _is_past(deadline: float) -> bool:
    return time.monotonic() > deadline


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _say(text: str) -> None:
    messages.print(text, style="dim", highlight=False)


def _new_record() -> dict[str, object]:
    return {"machine": places.machine(), "commit": places.commit()}


def _keep(record: dict[str, object], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n")


@app.command("setup")
def setup_command(
    names: Annotated[list[str] | None, typer.Argument(help="environments; all if none")] = None,
) -> None:
    """Make the systems' environments (once)."""
    from bench_models import setup

    failed = setup.make_all(names or list(systems.ENVIRONMENTS), _say)
    for name, reason in failed.items():
        messages.print(f"{name}: {reason}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def roof(
    full: Annotated[bool, typer.Option(help="more footprints, more samples")] = False,
    threads: Annotated[int, typer.Option(help="threads")] = 2,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure the machine's limits."""
    found = gate.measure(threads, full)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for row in found["read"]:
        print(f"{row['bytes'] >> 10:9d} KiB {row['threads']} threads "
              f"{row['gb_per_second']:8.1f} GB/s  {row['pattern']}")  # fmt: skip
    for row in found["arithmetic"]:
        print(f"{row['name']:30} {row['threads']} threads {row['gflops']:8.1f} GFLOPS")
    print(f"barrier {found['barrier_ns']:.0f} ns, fork and join {found['fork_join_ns']:.0f} ns")


@app.command()
def models(
    quick: Annotated[bool, typer.Option(help="the set for every commit")] = False,
    names: Annotated[str, typer.Option("--systems", help="comma-separated, or all")] = "",
    model: Annotated[
        str, typer.Option("--models", "--model", help="none: the quick or the full set")
    ] = "",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32",
    prompt: Annotated[str, typer.Option("--prompts", "--prompt")] = "128",
    batch: Annotated[str, typer.Option("--batches", "--batch")] = "1",
    new: Annotated[int, typer.Option(help="new tokens")] = 33,
    rounds: Annotated[int, typer.Option(help="blocks of each system; 0: 5 if quick, else 7")] = 0,
    threads: Annotated[int, typer.Option()] = 2,
    starts: Annotated[bool, typer.Option(help="also warm starts")] = True,
    accuracy: Annotated[bool, typer.Option(help="also logits")] = True,
    minutes: Annotated[float, typer.Option(help="no new block after this; 0: 4.3 if quick")] = 0,
    load_seconds: Annotated[float, typer.Option(help="give up a system that loads longer")] = 900,
    label: Annotated[str, typer.Option(help="a part of the file's name")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Measure whole models, side by side."""
    end = time.monotonic() + 60 * (minutes or (QUICK_MINUTES if quick else 1e6))
    chosen_names = _split(names) or list(systems.QUICK_SYSTEMS if quick else systems.SYSTEMS)
    if chosen_names == ["all"]:
        chosen_names = list(systems.SYSTEMS)
    try:
        chosen = systems.chosen(chosen_names)
        wanted = cells.make_cells(
            _split(model),
            _split(dtype),
            [int(part) for part in _split(prompt)],
            new,
            [int(part) for part in _split(batch)],
        )
    except ValueError as error:
        messages.print(str(error))
        raise typer.Exit(2) from None
    _say("measuring the machine's limits ...")
    limits = gate.measure(threads)
    if not model:
        wanted = cells.quick_cells(limits["arithmetic"]) if quick else list(cells.FULL)
    record = results.new_record("models", limits, threads)
    record["read_gb_per_second"] = gate.best_read(limits, threads)
    record["cells"] = []
    path = output or results.default_path(record, label or ("quick" if quick else ""))
    if quick:  # ours starts cold every time; Inductor's compile is kept
        for old in (places.home() / "caches").glob("tilewright*"):
            shutil.rmtree(old)
    probe = gate.Gate(threads)
    try:
        groups = [
            list(group) for _, group in groupby(wanted, lambda cell: (cell.model, cell.dtype))
        ]
        for index, group in enumerate(groups):
            deadline = cells.share_of_time(time.monotonic(), end, len(groups) - index)
            kind = group[0].dtype
            plan = session.Plan(
                chosen,
                threads,
                rounds=rounds or (5 if quick else 7),
                retries=1000 if quick else 3,  # --quick has a limit of time instead
                load_seconds=load_seconds,
                starts=starts and not quick,
                kept_caches=places.home() / "caches" if quick else None,
                accuracy=accuracy,
                without_logits=systems.SLOW_LOGITS if quick else (),
                say=_say,
                out_of_time=functools.partial(_is_past, deadline),
            )
            roof = cells.roof_of(kind, limits, threads)
            before = list(record["cells"])
            for measured in session.run_session(plan, group, probe, roof):
                record["cells"] = [*before, *measured]
                results.write(record, path)  # what is measured is kept, whatever comes next
    finally:
        probe.close()
    console = Console(width=None if Console().is_terminal else 230)
    table.print_record(record, console)
    console.print(f"wrote {path}", highlight=False)


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="a directory with the package, or a git revision")],
    new: Annotated[str, typer.Argument(help="the same")],
    margin: Annotated[float, typer.Option(help="how much slower counts")] = 0.05,
    model: Annotated[str, typer.Option("--models", "--model")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    mode: Annotated[str, typer.Option(help="optimize, compile or both")] = "optimize",
    processes: Annotated[int, typer.Option(help="processes of each build")] = 6,
    rounds: Annotated[int, typer.Option(help="blocks to keep of each pair of processes")] = 2,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Is NEW slower than OLD? Exit code 1 if so, 2 if that could not be measured."""
    from bench_models import compare as comparing

    try:
        builds = [comparing.build_of(given, _say) for given in (old, new)]
        wanted = cells.make_cells(_split(model), _split(dtype), [128], 33, [1])
    except ValueError as error:
        messages.print(str(error))
        raise typer.Exit(2) from None
    probe = gate.Gate(threads)
    try:
        verdicts, problems = comparing.run_compare(
            builds, wanted, probe, processes, rounds, threads, margin, mode, _say
        )
    finally:
        probe.close()
    for line in (*verdicts, *problems):
        print(line)
    if any(verdict.slower for verdict in verdicts):
        raise typer.Exit(1)
    raise typer.Exit(2 if problems else 0)


@app.command()
def start(
    model: Annotated[str, typer.Option("--models", "--model")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    prompt: Annotated[int, typer.Option(help="tokens of the prompt")] = 16,
    rounds: Annotated[int, typer.Option(help="starts of each kind")] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    names: Annotated[str, typer.Option("--systems", help="others, beside ours")] = "",
    pause: Annotated[float, typer.Option(help="seconds before each start")] = 6.0,
    cold_pages: Annotated[
        bool, typer.Option(help="without checkpoint and cache in the page cache")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """From nothing to the first token: captured or from a plan, weights in place or mapped."""
    import tempfile

    from bench_models import cells, table
    from bench_models import start as starting

    record = _new_record()
    for name in _split(model):
        for kind in _split(dtype):
            with tempfile.TemporaryDirectory(prefix="start-", dir=places.home()) as cache:
                found = starting.measure(
                    name,
                    kind,
                    prompt,
                    rounds,
                    threads,
                    Path(cache) / "cache",
                    pause,
                    _say,
                    cold_pages,
                )
                cell = cells.Cell(name, kind, prompt, 1, 1)
                caches = Path(cache) / "others"
                others = starting.peers(_split(names), cell, rounds, threads, caches, _say)
            record[f"{name} {kind}"] = found
            record[f"{name} {kind}, others"] = others
            title = f"{name}, {kind}, {prompt} tokens, ms"
            print(title.ljust(44) + "".join(f"{k:>20}" for k in found))
            for part, values in starting.rows(found):
                print(f"  {part:42}" + "".join(f"{value:20.1f}" for value in values))
            print(f"{name}, {kind}, process start to first token, s".ljust(54) + "  cold  warm")
            for system, cold, warm in starting.beside(found, others):
                print(f"  {system:50}{table.seconds(cold):>8}{table.seconds(warm):>6}")
    _keep(record, output)


@app.command()
def cache(
    model: Annotated[str, typer.Option("--models", "--model")] = "smollm2-135m,llama-1b",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32",
    rounds: Annotated[int, typer.Option(help="processes of each kind")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Kernels emitted, loaded from a directory and from a pack: one, and all of a model."""
    import tempfile

    from bench_models import kernel_cache

    record = _new_record()
    record["one kernel"] = one = kernel_cache.one_kernel()
    print("one kernel, microseconds".ljust(42) + "       p50       p99")
    for kind, values in one.items():
        if kind != "rounds":
            print(f"  {kind:40}{values['p50']:10.1f}{values['p99']:10.1f}")
    for name in _split(model):
        for kind in _split(dtype):
            with tempfile.TemporaryDirectory(prefix="cache-", dir=places.home()) as place:
                found = kernel_cache.model_kernels(name, kind, rounds, Path(place), _say)
            record[f"{name} {kind}"] = found
            print(f"{name}, {kind}, milliseconds".ljust(42) + "   kernels   opening      all  goal")
            for what, count, opening, passed in kernel_cache.rows(found):
                goal = kernel_cache.GOALS[what]
                print(f"  {what:40}{count:10}{opening:10.2f}{passed:10.2f}{goal:6.0f}")
    _keep(record, output)


@app.command()
def generation(
    model: Annotated[str, typer.Option("--models", "--model")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    count: Annotated[int, typer.Option(help="requests")] = 16,
    new: Annotated[int, typer.Option(help="new tokens of each")] = 32,
    rounds: Annotated[int, typer.Option(help="blocks to keep of each way")] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Requests of all lengths at once, and prompt lookup: speed, and lonely tokens."""
    import torch

    from bench_models import generation as ways
    from bench_models import models as known

    torch.set_num_threads(threads)
    limits = gate.measure(threads)
    record = results.new_record("generation", limits, threads)
    record["versions"] = {"torch": torch.__version__}
    record["cases"] = []
    probe = gate.Gate(threads)
    try:
        for name, kind in ((name, kind) for name in _split(model) for kind in _split(dtype)):
            directory = known.directory_of(name)
            _say(f"{name} {kind}: requests")
            found = [ways.requests_case(directory, kind, count, new, probe, rounds)]
            for repeats in (True, False) if (directory / "tokenizer.json").exists() else ():
                _say(f"{name} {kind}: prompt lookup")
                found.append(ways.lookup_case(directory, kind, repeats, 8 * new, probe, rounds))
            for case in found:
                case["case"] = f"{name} {case['case']}"
                table.print_ways(case, Console(width=None if Console().is_terminal else 150))
                record["cases"].append(case)
    finally:
        probe.close()
    path = output or results.default_path(record)
    results.write(record, path)
    print(f"wrote {path}")


@app.command()
def decode(
    model: Annotated[str, typer.Option("--model")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    context: Annotated[str, typer.Option("--contexts", "--context")] = "512,4096,16384",
    new: Annotated[int, typer.Option(help="tokens to measure")] = 60,
    batch: Annotated[int, typer.Option()] = 1,
    padding: Annotated[int, typer.Option(help="tokens of each context that are padding")] = 0,
    cache: Annotated[str, typer.Option("--kv-cache-dtype", help="auto or int8")] = "auto",
    threads: Annotated[int, typer.Option()] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Tilewright's share of memory in decode, with memory read before and after each token."""
    import torch

    from bench_models import decode as steps
    from bench_models import models as known
    from tilewright import _core

    torch.set_num_threads(threads)
    record = results.new_record("decode", gate.measure(threads), threads)
    record["method"] = steps.METHOD
    record["versions"] = {"torch": torch.__version__}
    record["cases"] = []
    directory = known.directory_of(model)
    for kind, length in (
        (kind, int(length)) for kind in _split(dtype) for length in _split(context)
    ):
        case = steps.Case(kind, length, new, batch, padding, cache)
        _say(f"{model} {case.title}")
        found = steps.measured(directory, case, lambda: _core.read_bandwidth(threads))
        record["cases"].append({**found, "case": f"{model} {found['case']}"})
    table.print_decode(record["cases"], Console(width=None if Console().is_terminal else 150))
    path = output or results.default_path(record)
    results.write(record, path)
    print(f"wrote {path}")


@app.command()
def overhead(
    model: Annotated[str, typer.Option("--models", "--model")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    prompt: Annotated[int, typer.Option(help="tokens of a prefill")] = 512,
    rounds: Annotated[int, typer.Option(help="repetitions")] = 7,
    threads: Annotated[int, typer.Option()] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """A step beside its kernels, and how long a prefill keeps other Python threads waiting."""
    import torch

    from bench_models import models as known
    from bench_models import overhead as measuring

    torch.set_num_threads(threads)
    record = _new_record()
    for kind in _split(dtype):
        steps = measuring.step_overhead(known.directory_of("tiny"), kind, 200, rounds)
        record[f"step beside its kernels, us, tiny {kind}"] = steps
        for way, microseconds in steps.items():
            print(f"{kind} {way:40}{microseconds:8.1f} us a step")
        for name in _split(model):
            late = measuring.waiting(known.directory_of(name), kind, prompt, rounds)
            record[f"a thread's sleep of 1 ms, ms too long, {name} {kind}"] = late
            for beside, values in late.items():
                print(
                    f"{kind} {name}, a thread that sleeps 1 ms, {beside:12} "
                    f"late by {values['p99']:.2f} ms (p99), {values['most']:.2f} at most"
                )
    _keep(record, output)


@app.command()
def report(
    output: Annotated[Path | None, typer.Option(help="the page")] = None,
    readme: Annotated[bool, typer.Option(help="also rewrite the table in README.md")] = False,
) -> None:
    """Make one HTML page of all results, and the table in README."""
    import os
    import subprocess

    from bench_models import readme as readme_table

    if readme:
        changed = readme_table.rewrite(places.REPOSITORY / "README.md")
        print("README.md: " + ("rewritten" if changed else "up to date"))
    page = output or places.REPOSITORY / "build" / "bench-report.html"
    python = places.python_of("report")
    if not python.exists():
        messages.print("not set up: run ./dev bench setup report")
        raise typer.Exit(2)
    command = [str(python), "-m", "bench_models.report", str(page)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(places.PERF)}, check=False)
    raise typer.Exit(done.returncode)


@app.command()
def ops(
    wanted: Annotated[str, typer.Option("--set", help="matmul, attention, rows or all")] = "all",
    dtype: Annotated[str, typer.Option("--dtypes", "--dtype")] = "fp32,bf16",
    row: Annotated[
        str, typer.Option("--rows", "--row", help="M of each case; none: 1,4,16,128,512")
    ] = "",
    match: Annotated[str, typer.Option(help="only cases whose title contains this")] = "",
    rounds: Annotated[int, typer.Option(help="blocks to keep of each implementation")] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    label: Annotated[str, typer.Option(help="a part of the file's name")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Measure single ops against ATen and oneDNN, with cold weights."""
    import torch

    from bench_models import goals, op_cases
    from bench_models import ops as single
    from tilewright import core

    torch.set_num_threads(threads)
    isa = str(core.engine().target()["isa"])
    try:
        rows = tuple(int(part) for part in _split(row))
        cases = op_cases.read_cases(wanted, tuple(_split(dtype)), rows, isa)
    except ValueError as error:
        messages.print(str(error))
        raise typer.Exit(2) from None
    limits = gate.measure(threads)
    record = results.new_record("ops", limits, threads)
    record["read_gb_per_second"] = gate.best_read(limits, threads)
    record["versions"] = {"torch": torch.__version__}
    record["cases"] = []
    record["isa"] = isa
    probe = gate.Gate(threads)
    try:
        for case in (case for case in cases if match in case.title):
            _say(case.title)
            roof = cells.roof_of(case.dtype, limits, threads)
            record["cases"].append(single.run_case(case, probe, rounds, 3, roof))
    finally:
        probe.close()
    console = Console(width=None if Console().is_terminal else 170)
    table.print_ops(record, console)
    if wanted in ("matmul", "all"):
        table.print_goals(goals.standing(record), console)
    path = output or results.default_path(record, label or wanted)
    results.write(record, path)
    console.print(f"wrote {path}", highlight=False)


@app.command()
def encoder(
    names: Annotated[str, typer.Option("--systems", help="comma-separated")] = "",
    batch: Annotated[int, typer.Option()] = 32,
    tokens: Annotated[int, typer.Option(help="of the longest sequence")] = 128,
    layers: Annotated[int, typer.Option()] = 12,
    rounds: Annotated[int, typer.Option(help="blocks to keep of each system")] = 7,
    threads: Annotated[int, typer.Option()] = 2,
    output: Annotated[Path | None, typer.Option("--json", help="where to write")] = None,
) -> None:
    """Measure an encoder of BERT-base's shape against eager and Inductor."""
    import torch

    from bench_models import encoders

    chosen = _split(names) or list(encoders.STANDARD)
    try:
        encoders.check_names(chosen)
    except ValueError as error:
        messages.print(str(error))
        raise typer.Exit(2) from None
    torch.set_num_threads(threads)
    limits = gate.measure(threads)
    record = results.new_record("encoder", limits, threads)
    record["read_gb_per_second"] = gate.best_read(limits, threads)
    record["versions"] = {"torch": torch.__version__}
    peak = cells.peak_for("fp32", limits["arithmetic"], threads)
    probe = gate.Gate(threads)
    try:
        shape = encoders.Encoder(batch, tokens, layers)
        case = encoders.run_encoder(shape, chosen, probe, rounds, peak, _say)
        record["cases"] = [case]
    finally:
        probe.close()
    console = Console(width=None if Console().is_terminal else 150)
    table.print_encoder(record, console)
    path = output or results.default_path(record)
    results.write(record, path)
    console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    app()
