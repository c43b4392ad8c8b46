"""Result files: JSON with machine, commit, versions, roofs and every sample, one file per run.

Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench_models import places

SCHEMA = 1
METHOD = (
    "One process per system on the same CPUs, stopped while not asked; blocks A B B A of a system "
    "and the baseline; a block is dropped when the limits that read bandwidth and FMA rate set "
    "moved by more than 10 % across it; medians of paired ratios with 95 % bootstrap intervals; "
    "greedy, fixed number of tokens, no end token. Time to first token is one prefill; decode is "
    "the slope from the first to the last token."
)


def new_record(benchmark: str, roof: dict[str, Any], threads: int) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": places.commit(),
        "machine": {**places.machine(), "isa": roof["isa"], "threads": threads},
        "method": METHOD,
        "roof": roof,
    }


def default_path(record: dict[str, Any], label: str = "") -> Path:
    """perf/results/<benchmark>-<label>-<commit>-<cpu>.json"""
    isa = places.slug(record["roof"]["isa"][-1])
    commit = record["commit"].rstrip("+")
    name = "-".join(filter(None, [record["benchmark"], label, commit, isa]))
    return places.RESULTS / f"{name}.json"


def write(record: dict[str, Any], path: Path) -> None:
    """Creates the folder when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A file of this schema; ValueError says what is wrong."""
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {record.get('schema')}, expected {SCHEMA}")
    return record


def read_all(benchmark: str, folder: Path = places.RESULTS) -> list[dict[str, Any]]:
    """Every run of a benchmark, oldest first; other files are skipped."""
    found = []
    for path in sorted(folder.glob(f"{benchmark}*.json")):
        try:
            record = read(path)
        except ValueError:
            continue
        if record["benchmark"] == benchmark:
            found.append({**record, "file": path.name})
    return sorted(found, key=lambda record: str(record["date"]))


def _rounded(value: Any) -> Any:
    """Five digits are more than any timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
