"""Where the time of all programs went: TILEWRIGHT_VERBOSE=profile prints it at exit.

The core measures each step of each run (ops/program.h, RegionTime); here they are summed by region
and kernel, and set against what the machine's memory can do. Per phase the rows add up to the time
from the first run to the end of the last, pauses of more than a second left out.

Tested by tests/python/test_profile.py.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tilewright import _core, core

PHASES = ("prefill", "decode")
_programs: list[Any] = []  # of the core; kept alive, so that what a dropped model did is shown too


@dataclass(eq=False, repr=False)
class Row:
    """What one kind of region did in a phase."""

    name: str
    kernel: str
    steps: int = 0
    seconds: float = 0.0
    bytes: float = 0.0


def watch(program: Any) -> None:
    """Called with each program that is made."""
    if not core.settings()["profile"]:
        return
    if not _programs:
        atexit.register(lambda: print(text(_programs), file=sys.stderr))
    _programs.append(program)


def rows(reports: Iterable[dict[str, Any]], phase: str) -> list[Row]:
    """The regions of a phase, and what lies between and around them; longest first."""
    found: dict[tuple[str, str], Row] = {}
    between, around = Row("the caller", "between runs"), Row("runs", "around their steps")
    for report in reports:
        between.seconds += report[phase]["between_seconds"]
        around.seconds += report[phase]["around_seconds"]
        for region in report["regions"]:
            seconds, size = region[phase]
            if not seconds:
                continue
            key = (region["name"], region["kernel"])
            row = found.setdefault(key, Row(*key))
            row.steps += 1
            row.seconds += seconds
            row.bytes += size
    return sorted([*found.values(), between, around], key=lambda row: -row.seconds)


def text(programs: Iterable[Any]) -> str:
    """The tables, with the machine's read bandwidth measured now."""
    reports = [program.report() for program in programs]
    roof = _core.read_bandwidth(core.threads())
    lines = [f"tilewright: where the time went; memory can be read at {roof / 1e9:.1f} GB/s now"]
    for phase in PHASES:
        runs = sum(report[phase]["runs"] for report in reports)
        if not runs:
            continue
        table = rows(reports, phase)
        total = sum(row.seconds for row in table)
        lines.append(f"{phase}: {runs} runs, {total / runs * 1e3:.3f} ms each")
        lines.append("  ms a run  share     MB   GB/s  of memory  steps  region")
        for row in table:
            rate = row.bytes / row.seconds if row.seconds else 0.0
            memory = f"{row.bytes / runs / 1e6:6.1f} {rate / 1e9:6.1f} {rate / roof:9.0%}"
            lines.append(
                f"  {row.seconds / runs * 1e3:8.3f} {row.seconds / total:6.1%} "
                f"{memory if row.bytes else '':24s} {row.steps or '':6} {row.name}: {row.kernel}"
            )
    return "\n".join(lines)
