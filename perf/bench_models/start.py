"""Starts in fresh processes, split into their parts: with plan and packed weights kept, or less.

Every start is a process of its own that reads the checkpoint, optimises it and makes one token; the
kernels in the cache are warm, and so is the page cache. Then it is asked for one more: where no
packed weights are kept, the first step reads those of the checkpoint, and packing follows. The
kinds of start take turns, so that what the machine does meanwhile meets all of them, and begin
after a pause: what a process gives back when it ends, a virtual machine's host may take away for
seconds, in the middle of the next start.

Such a host also takes away memory that nobody touched for half a minute, and a page cache that the
guest calls warm is not: the first touch of each piece then waits for the host (seen: 5 us for each
of 27,000 pieces of 1.9 GB, and a first step of 250 to 470 ms for 95). So each start comes just
after its files were read. Those of other systems, which can stand beside, follow one another and
so have it too. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_models import models, places, session, text
from bench_models.cells import Cell

# What each kind sets, and whether its cache has plans.
KINDS = {
    "captured, in place": ({"TILEWRIGHT_CACHE_WEIGHTS": "off"}, False),
    "captured, mapped": ({"TILEWRIGHT_CACHE_WEIGHTS": "auto"}, False),
    "planned, in place": ({"TILEWRIGHT_CACHE_WEIGHTS": "off"}, True),
    "planned, mapped": ({"TILEWRIGHT_CACHE_WEIGHTS": "auto"}, True),
}
_FILL = {"TILEWRIGHT_CACHE_WEIGHTS": "on"}

# What every system waits for alike; the goals of starts are beyond these.
_GIVEN = ("interpreter", "imports", "read checkpoint")


def run_start(
    directory: Path, dtype: str, prompt: int, threads: int, settings: dict[str, str]
) -> dict[str, Any]:
    """One start; see start_child. RuntimeError with its last lines if it fails."""
    command = [sys.executable, "-m", "bench_models.start_child", repr(time.monotonic())]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(places.PERF),
        **settings,
    }
    done = subprocess.run(
        [*command, str(directory), dtype, str(prompt)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-5:]))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(
    model: str,
    dtype: str,
    prompt: int,
    rounds: int,
    threads: int,
    cache: Path,
    pause: float,
    say: Callable[[str], None],
    cold_pages: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """The starts of each kind, each `pause` seconds after the one before, and of one with an empty
    cache that wrote it ("writing"). Before all others checkpoint and cache are read or, with
    cold_pages, leave the page cache; libraries stay."""
    directory = models.directory_of(model)
    base = {"TILEWRIGHT_CACHE": "rw", "TILEWRIGHT_CACHE_DIR": str(cache)}
    say(f"{model} {dtype}: filling the cache")
    found = {"writing": [run_start(directory, dtype, prompt, threads, base | _FILL)]}
    plain = cache.with_name("without-plans")
    shutil.copytree(cache, plain, copy_function=os.link, ignore=shutil.ignore_patterns("*.plan"))
    base["TILEWRIGHT_CACHE"] = "ro"
    for number in range(rounds):
        for kind, (settings, has_plans) in KINDS.items():
            say(f"{model} {dtype}: {kind}, {number + 1} of {rounds}")
            settings = settings | {"TILEWRIGHT_CACHE_DIR": str(cache if has_plans else plain)}
            time.sleep(pause)
            for place in (directory, cache):
                (drop_pages if cold_pages else read_pages)(place)
            start = run_start(directory, dtype, prompt, threads, base | settings)
            assert start["captured"] == (0 if has_plans else 1), "another plan was found"
            found.setdefault(kind, []).append(start)
    tokens = {start["token"] for starts in found.values() for start in starts}
    if len(tokens) != 1:
        raise RuntimeError(f"the first token differs: {sorted(tokens)}")
    assert not any(s["packed"] for s in found["planned, mapped"]), "a weight was not kept"
    return found


def read_pages(directory: Path) -> None:
    """Reads the files of a directory, so that the page cache has them, and the host its memory."""
    piece = bytearray(1 << 20)
    for path in files_below(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def drop_pages(directory: Path) -> None:
    """Takes the files of a directory out of the page cache. Files that are mapped stay."""
    for path in files_below(directory):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())  # what is not on the disk would stay, too
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def peers(
    systems: list[str],
    cell: Cell,
    rounds: int,
    threads: int,
    caches: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """What other systems need, from process start to the first token, in seconds: "cold" with empty
    caches, once, and "warm" after that, `rounds` times; or the "reason" why not. What a system
    converts once (models of OpenVINO and llama.cpp) is in neither."""
    directory = models.directory_of(cell.model)
    prompts = text.prompts_of(cell, directory)
    plan = session.Plan(systems, threads, kept_caches=caches, say=say)
    found: dict[str, dict[str, Any]] = {}
    for name in systems:
        row = session.start(plan, name, cell, directory, prompts)
        if row.worker is None:
            found[name] = {"reason": row.reason}
            continue
        row.worker.close()
        entry = found[name] = {"cold": row.start["cold"], "warm": []}
        for number in range(rounds):
            say(f"{cell.model} {cell.dtype}: {name}, warm, {number + 1} of {rounds}")
            session.warm_start(plan, row, cell, directory, prompts)
            entry["warm"].append(row.start["warm"])
    return found


def beside(
    found: dict[str, list[dict[str, Any]]], others: dict[str, dict[str, Any]]
) -> list[tuple[str, float | None, float | None]]:
    """(system, cold seconds, warm seconds), from process start to the first token: medians, ours
    first; None where it could not. Ours is cold without a plan and packed weights."""

    def total(starts: list[dict[str, Any]]) -> float | None:
        totals = [start["total"] for start in starts if "total" in start]
        return statistics.median(totals) if totals else None

    def ours(kind: str) -> float | None:
        milliseconds = total(found[kind])
        return None if milliseconds is None else 1e-3 * milliseconds

    return [("tilewright", ours("captured, in place"), ours("planned, mapped"))] + [
        (name, total([entry.get("cold", {})]), total(entry.get("warm", [])))
        for name, entry in others.items()
    ]


def rows(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[float]]]:
    """(part, milliseconds of each kind): medians. Medians of parts need not add up to that of the
    totals, so a row says what is left. The goals are about what is beyond imports and reading: all
    that is not the interpreter, imports or reading the checkpoint. The last rows are of the call
    after the first token."""

    names = next(iter(found.values()))[0]["parts"]
    table = [
        (name, [statistics.median(s["parts"][name] for s in starts) for starts in found.values()])
        for name in names
    ]
    totals = [statistics.median(s["total"] for s in starts) for starts in found.values()]
    sums = [sum(values[i] for _, values in table) for i in range(len(found))]
    table.append(("total", totals))
    table.append(("total - sum", [a - b for a, b in zip(totals, sums, strict=True)]))
    own = [statistics.median(map(beyond, starts)) for starts in found.values()]
    table.append(("beyond imports and reading", own))
    for name, part in {"the next call": "total", "pack weights in it": "pack weights"}.items():
        values = [statistics.median(s["next"][part] for s in each) for each in found.values()]
        table.append((name, values))
    return table


def beyond(start: dict[str, Any]) -> float:
    """Milliseconds of a start beyond imports and reading the checkpoint."""
    return float(start["total"] - sum(start["parts"][name] for name in _GIVEN))
