"""`tilewright prewarm` and `tilewright cache ...`: fill the cache, look at it, move it.

A place is a directory or a pack (FILE or FILE@sha256:DIGEST); without one, the directory of this
environment.

Tested by tests/python/test_prewarm.py, tests/python/test_cache_commands.py.
"""

from __future__ import annotations

import collections
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tilewright.cli_output import DataType, Json, err, fail, out, show

app = typer.Typer(help="The kernel cache on disk.", no_args_is_help=True)

Shapes = Annotated[
    str,
    typer.Argument(
        help="A model's directory, its config.json alone, a .gguf file, a name that is on this "
        "disk already, an exported program (.pt2), or a plan in a cache directory (.plan)."
    ),
]
Isas = Annotated[
    str,
    typer.Option(
        help="Instruction sets separated by commas, as avx2,avx512_bf16 or oneDNN's "
        "avx512_core_amx; this CPU's if not given."
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Processes at once; each captures the model.")]
Timeout = Annotated[
    float,
    typer.Option(
        min=1, help="Seconds without progress after which a process is ended; a tenth for a kernel."
    ),
]
Place = Annotated[str, typer.Option("--at", help="A directory or a pack, FILE[@sha256:DIGEST].")]


@contextmanager
def progress_bar() -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[kernels]} kernels, {task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("graphs", total=None, kernels=0, rate=0.0)

        def update(done: int, total: int, kernels: int) -> None:
            elapsed = progress.tasks[task].elapsed or 0.0
            rate = kernels / elapsed if elapsed else 0.0
            progress.update(task, completed=done, total=total, kernels=kernels, rate=rate)

        yield update


def checked_cache_dtype(dtype: str | None) -> str | None:
    if dtype not in (None, "auto", "int8"):
        raise typer.BadParameter(f"'{dtype}' is not one of auto, int8")
    return dtype


def checked_dtype(dtype: str | None) -> str | None:
    from tilewright.shapes import TYPE_NAMES

    if dtype is not None and dtype not in TYPE_NAMES:
        raise typer.BadParameter(f"'{dtype}' is not one of {', '.join(TYPE_NAMES)}")
    return dtype


def prewarm(
    model: Shapes,
    dtype: DataType = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes, separated by commas; kernels serve every size.")
    ] = "1",
    max_seq_len: Annotated[
        int, typer.Option(min=1, help="The longest sequence; kernels serve every length.")
    ] = 2048,
    isa: Isas = "",
    jobs: Jobs = 1,
    timeout: Timeout = 600,
    pack: Annotated[
        str | None, typer.Option(help="Also write all kernels into this file, a sealed pack.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of keys and values, as of llm.optimize: int8, or auto, the model's own."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fill the cache for a model, so that no process has to capture it or to emit its kernels.

    Weights are not read: kernels of every storage that they could have are made. For the fastest
    start, `tilewright cache weights MODEL` also keeps them packed. Nothing is
    executed, so any instruction set will do. Kernels that are there are not made again. Exit code
    1 if anything could not be made; all else is there.
    """
    from tilewright import prewarm as prewarming
    from tilewright.core import CoreError
    from tilewright.recorded import SUFFIX

    if not all(part.strip().isdigit() and int(part) > 0 for part in batch.split(",")):
        raise typer.BadParameter(f"'{batch}' is not a list of batch sizes")
    dtype = checked_dtype(dtype)
    try:
        with progress_bar() as progress:
            result = prewarming.prewarm(
                model,
                dtype,
                split(isa),
                jobs,
                timeout,
                pack,
                progress,
                checked_cache_dtype(kv_cache_dtype),
            )
    except (CoreError, prewarming.NotPrewarmedError, OSError) as error:
        fail(str(error))
    text = (
        f"{result['emitted']} kernels emitted, {result['loaded']} were there already, "
        f"and {result['plans']} plans, for {', '.join(result['isa'])}, in {result['seconds']:.2f} s"
    )
    text += f": {result['directory']}" if result["directory"] else ""
    if pack is not None:
        made = result["pack"]
        text += (
            f"\n{made['kernels']} kernels, {made['bytes']} bytes in a pack:"
            f"\nTILEWRIGHT_CACHE_PACK={made['file']}@sha256:{made['sha256']}"
        )
    has_weights = not model.endswith((".json", ".pt2", SUFFIX))
    if not result["plans"] and not model.endswith(".pt2"):
        text += "\nno plan: each process captures the model (tilewright.stats() says why)"
    elif result["directory"] and has_weights:
        text += "\nstarts still pack the weights, unless: tilewright cache weights MODEL"
    show(result, as_json, text)
    report_failures(result["failed"])


def report_failures(failed: list[dict[str, Any]]) -> None:
    for failure in failed:
        more = f" (and {failure['count'] - 1} more)" if failure["count"] > 1 else ""
        err.print(f"tilewright: {failure['what']}{more}: {failure['reason']}", markup=False)
    if failed:
        raise typer.Exit(1)


def split(isa: str) -> list[str]:
    return [part.strip() for part in isa.split(",") if part.strip()] or [""]


def own_directory() -> str:
    """The directory of this environment, used or not."""
    from tilewright import core

    try:
        state = core.engine().cache_state()
    except core.CoreError as error:
        fail(str(error))
    if state["problem"]:
        err.print(f"tilewright: {state['problem']}", markup=False)
    return str(state["directory"])


def entries_of(place: str) -> tuple[str, list[dict[str, Any]]]:
    """The place's name and its entries."""
    from tilewright import _core

    name = place or own_directory()
    if not place and not Path(name).exists():
        return name, []
    try:
        return name, _core.cache_entries(name)
    except _core.CoreError as error:
        fail(str(error))


@app.command("ls")
def ls(at: Place = "", as_json: Json = False) -> None:
    """List kernels and plans, of all builds, and count packed weights."""
    from tilewright import core

    place, entries = entries_of(at)
    table = Table(box=None, header_style="bold")
    for column in ("key", "name", "isa", "code", "made by"):
        table.add_column(column, justify="right" if column == "code" else "left")
    for entry in entries:
        made = entry["problem"] or ("this build" if entry["current"] else "another build")
        table.add_row(entry["id"][:12], entry["name"], entry["isa"], str(entry["code_bytes"]), made)
    total = sum(entry["bytes"] for entry in entries)
    kinds = collections.Counter(entry["kind"] for entry in entries)
    table.caption = f"{kinds['kernel']} kernels, {kinds['plan']} plans, {total} bytes in {place}"
    weights = [] if at else core.engine().weight_files(False)
    if weights:
        total = sum(weight["bytes"] for weight in weights)
        table.caption += f"\n{len(weights)} packed weights, {total} bytes"
    rejects = dict(collections.Counter(e["problem"] for e in entries if e["problem"]))
    if rejects:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(rejects.items()))
        table.caption += f"\nnot used: {reasons}"
    data = {"directory": place, "rejects": rejects, "entries": entries, "weights": weights}
    show(data, as_json, table)


def chosen(entries: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The entry whose key begins so."""
    found = [entry for entry in entries if entry["id"].startswith(key.lower())]
    if len(found) != 1:
        fail(f"{len(found)} entries have a key that begins with {key}; see tilewright cache ls")
    return found[0]


def contents(place: str, entry: dict[str, Any]) -> dict[str, Any]:
    from tilewright import _core

    if entry["problem"]:
        fail(f"{entry['file']}: {entry['problem']}")
    try:
        return _core.cache_entry(place, entry["generator"], entry["key"])
    except _core.CoreError as error:
        fail(str(error))


@app.command("show")
def show_entry(
    key: Annotated[str, typer.Argument(help="The first digits of a key, as `ls` shows them.")],
    at: Place = "",
    as_json: Json = False,
) -> None:
    """Show one kernel or plan: its full key, and the VIR text that its code was emitted from, or
    the graph."""
    place, entries = entries_of(at)
    entry = chosen(entries, key)
    inside = contents(place, entry)
    data = entry | {"recipe": inside["recipe"], "code": inside["code"].hex()}
    text = "\n".join(
        [
            f"{entry['name']}  {entry['id']}",
            f"code: {entry['code_bytes']} bytes, {entry['isa']}",
            f"made by: {'this build' if entry['current'] else entry['generator']}",
            f"key: {entry['key'].strip()}",
            "",
            inside["recipe"].rstrip(),
        ]
    )
    if as_json:
        show(data, True, "")
    else:
        out.print(text, markup=False)


@app.command("diff")
def diff(
    first: Annotated[str, typer.Argument(help="The first digits of a key.")],
    second: Annotated[str, typer.Argument(help="Of another.")],
    at: Place = "",
    as_json: Json = False,
) -> None:
    """Compare two kernels: key, VIR text, code. Exit code 1 if they differ."""
    place, entries = entries_of(at)
    pair = [chosen(entries, key) for key in (first, second)]
    insides = [contents(place, entry) for entry in pair]
    texts = [
        [*entry["key"].splitlines(), "", *inside["recipe"].splitlines()]
        for entry, inside in zip(pair, insides, strict=True)
    ]
    names = [f"{entry['name']}.{entry['id'][:8]}" for entry in pair]
    lines = list(difflib.unified_diff(texts[0], texts[1], names[0], names[1], lineterm=""))
    same_code = insides[0]["code"] == insides[1]["code"]
    code = "the same" if same_code else "different"
    sizes = " and ".join(str(entry["code_bytes"]) for entry in pair)
    data = {"diff": lines, "same_code": same_code}
    if as_json:
        show(data, True, "")
    else:
        out.print("\n".join([*lines, f"code: {code} ({sizes} bytes)"]), markup=False)
    if lines or not same_code:
        raise typer.Exit(1)


@app.command()
def verify(
    place: Annotated[
        str, typer.Argument(help="A directory or a pack; the directory of this environment.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Verify every entry of a directory, or a pack, and this environment's packed weights.

    Exit code 1 if one would not be used.
    """
    from tilewright import core

    name, entries = entries_of(place)
    bad = [entry for entry in entries if entry["problem"]]
    others = sum(not entry["current"] for entry in entries if not entry["problem"])
    total, wrong = (collections.Counter(e["kind"] for e in rows) for rows in (entries, bad))
    kinds = [f"{total[k] - wrong[k]} of {total[k]} {k}s" for k in ("kernel", "plan")]
    text = f"{' and '.join(kinds)} are good ({others} of other builds)"
    if not place:
        weights = core.engine().weight_files(True)
        bad += [weight for weight in weights if weight["problem"]]
        text += f", {sum(not weight['problem'] for weight in weights)} of {len(weights)} weights"
    data = {"place": name, "entries": len(entries), "other_builds": others, "bad": bad}
    show(data, as_json, f"{text}: {name}")
    for entry in bad:
        err.print(f"tilewright: {entry['file']}: {entry['problem']}", markup=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def check(
    model: Shapes,
    dtype: DataType = None,
    isa: Isas = "",
    jobs: Jobs = 1,
    timeout: Timeout = 600,
    as_json: Json = False,
) -> None:
    """Whether the cache and packs of this environment have all kernels and plans of a model.

    Exit code 1 if one would have to be made.
    """
    from tilewright import prewarm as prewarming
    from tilewright.core import CoreError

    dtype = checked_dtype(dtype)
    try:
        with progress_bar() as progress:
            result = prewarming.check(model, dtype, split(isa), jobs, timeout, progress)
    except (CoreError, prewarming.NotPrewarmedError, OSError) as error:
        fail(str(error))
    missing = result["missing"]
    plans, no_plans = result["plans"], result["missing_plans"]
    text = (
        f"{result['kernels'] - len(missing)} of {result['kernels']} kernels and "
        f"{plans - len(no_plans)} of {plans} plans are there"
    )
    show(result, as_json, f"{text}, for {', '.join(result['isa'])}")
    if not as_json:
        for kernel in missing:
            out.print(f"missing: {kernel['name']}: {kernel['key'].splitlines()[0]}", markup=False)
        for key in no_plans:
            out.print(f"missing: plan: {key.splitlines()[2]}", markup=False)
    report_failures(result["failed"])
    if missing or no_plans:
        raise typer.Exit(1)


@app.command()
def gc(
    max_size: Annotated[
        str, typer.Option(help="Bytes, with K, M or G; TILEWRIGHT_CACHE_MAX_SIZE if not given.")
    ] = "",
    at: Place = "",
    as_json: Json = False,
) -> None:
    """Remove the oldest entries beyond a size, and what killed writers left behind."""
    from tilewright import _core, core

    limit = max_size or next(
        row["value"] or row["default"]
        for row in core.variables()
        if row["name"] == "TILEWRIGHT_CACHE_MAX_SIZE"
    )
    directory = at or own_directory()
    try:
        removed = _core.prune(directory, byte_count(limit))
    except _core.CoreError as error:
        fail(str(error))
    data = {"directory": directory, "removed": removed}
    show(data, as_json, f"{removed} entries removed from {directory}")


def byte_count(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30}
    digits, shift = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 0)
    if not digits.isdigit():
        raise typer.BadParameter(f"'{text}' is not a size in bytes, as 512M")
    return int(digits) << shift


@app.command("export")
def export_pack(
    file: Annotated[str, typer.Argument(help="The pack to write.")],
    at: Place = "",
    as_json: Json = False,
) -> None:
    """Write all good kernels and plans of this build into a sealed pack."""
    from tilewright import _core
    from tilewright.prewarm import write_pack

    place = at or own_directory()
    try:
        made = write_pack(Path(file), _core.encode_pack([place]))
        inside = _core.cache_entries(f"{file}@sha256:{made['sha256']}")
        kernels = sum(entry["kind"] == "kernel" for entry in inside)
    except (_core.CoreError, OSError) as error:
        fail(str(error))
    text = (
        f"{kernels} kernels and {len(inside) - kernels} plans, {made['bytes']} bytes:"
        f"\nTILEWRIGHT_CACHE_PACK={made['file']}@sha256:{made['sha256']}"
    )
    show(made | {"kernels": kernels}, as_json, text)


@app.command("import")
def import_pack(
    pack: Annotated[str, typer.Argument(help="The pack, FILE or FILE@sha256:DIGEST.")],
    at: Annotated[str, typer.Option("--at", help="The directory to fill.")] = "",
    as_json: Json = False,
) -> None:
    """Copy the kernels and plans of a pack into the cache directory."""
    from tilewright import _core

    directory = at or own_directory()
    try:
        result = _core.import_pack(pack, directory)
    except _core.CoreError as error:
        fail(str(error))
    text = f"{result['written']} of {result['entries']} entries were new: {directory}"
    show(result | {"directory": directory}, as_json, text)
    if not result["current"]:
        err.print("tilewright: they are of another build, which alone uses them")
    if result["failed"]:
        fail(f"{result['failed']} entries could not be written")
