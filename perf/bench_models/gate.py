"""The probe of the machine's limits: builds perf/roof, asks it, and keeps it at hand for rounds.

Tested by tests/python/test_bench_roof.py.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from bench_models import places

SOURCE = places.PERF / "roof" / "roof.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=x86-64-v2", "-ffp-contract=off", "-fopenmp", "-pthread")


def build(name: str, source: Path) -> Path:
    """A program of the harness, built alone with g++ when its source is newer."""
    built = places.home() / name
    if built.exists() and built.stat().st_mtime >= source.stat().st_mtime:
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    partial = built.with_name(f"{name}.{os.getpid()}")
    compiler = ["ccache", "g++"] if shutil.which("ccache") else ["g++"]
    command = [*compiler, *FLAGS, str(source), "-o", str(partial)]
    subprocess.run(command, check=True)
    partial.rename(built)
    return built


def program() -> Path:
    """The probe."""
    return build("roof", SOURCE)


def measure(threads: int, full: bool = False) -> dict[str, Any]:
    """All limits, as the probe's JSON."""
    command = [str(program()), "--json", "--threads", str(threads), "--full" if full else "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def best_read(roof: dict[str, Any], threads: int) -> float:
    """GB/s from memory: the largest footprint's best pattern."""
    largest = max(row["bytes"] for row in roof["read"])
    return max(
        row["gb_per_second"]
        for row in roof["read"]
        if row["bytes"] == largest and row["threads"] == threads
    )


class Gate:
    """A probe that stays loaded and answers in about a third of a second: the median of three
    answers, because a single one varies by 8 % on a machine that holds still."""

    def __init__(self, threads: int) -> None:
        command = [str(program()), "--serve", "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> dict[str, float]:
        answers = [self._ask() for _ in range(3)]
        return {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}

    def _ask(self) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("probe\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()
