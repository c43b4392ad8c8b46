"""How long kernels take to be had: emitted, loaded from a directory, loaded from a pack.

One kernel: perf/cache_load, many times in one process. A model's kernels: each time in a process of
its own (cache_child.py), the kinds in turns, the page cache warm. Weights are not read: kernels
depend on shapes only. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_models import models, places

# What each kind sets, with the directory and the pack of a prewarm.
KINDS: dict[str, Callable[[Path], dict[str, str]]] = {
    "emitted": lambda _: {"TILEWRIGHT_CACHE": "off"},
    "directory": lambda place: {"TILEWRIGHT_CACHE_DIR": str(place / "cache")},
    "pack": lambda place: {
        "TILEWRIGHT_CACHE": "off",
        "TILEWRIGHT_CACHE_PACK": str(place / "kernels.pack"),
    },
}
GOALS = {"emitted": 100.0, "directory": 20.0, "pack": 20.0}  # milliseconds of a model's kernels


def one_kernel() -> dict[str, Any]:
    """Microseconds of a hit, a miss and a write."""
    done = subprocess.run([str(_cache_load())], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _cache_load() -> Path:
    """perf/cache_load by the target that ctest builds and runs: a list of its sources here went
    stale unseen."""
    tools = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ.get('PATH', '')}"}  # the venv's
    built = places.REPOSITORY / "build" / "cache_load"  # CMake refuses another checkout's
    kind = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTILEWRIGHT_BUILD_LIBTORCH=OFF")
    for command in (
        ["cmake", "-S", str(places.REPOSITORY), "-B", str(built), "--log-level=WARNING", *kind],
        ["cmake", "--build", str(built), "--target", "cache_load"],
    ):
        subprocess.run(command, env=tools, stdout=subprocess.DEVNULL, check=True)
    return built / "perf" / "cache_load" / "cache_load"


def model_kernels(
    model: str, dtype: str, rounds: int, place: Path, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """What each kind of process counted. RuntimeError with its last lines if one fails."""
    config = place / "model"
    models.configuration(models.MODELS[model]).save_pretrained(config)
    say(f"{model} {dtype}: prewarming")
    pack = str(place / "kernels.pack")
    prewarm = ["-m", "tilewright.cli", "prewarm", str(config), "--dtype", dtype, "--pack", pack]
    _run(prewarm, KINDS["directory"](place))
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, settings in KINDS.items():
            say(f"{model} {dtype}: {kind}, {number + 1} of {rounds}")
            child = ["-m", "bench_models.cache_child", str(config), dtype]
            counted = json.loads(_run(child, settings(place)).splitlines()[-1])
            if (counted["emitted"] == 0) != (kind != "emitted"):
                raise RuntimeError(f"{kind}: {counted['emitted']} kernels were emitted")
            found[kind].append(counted)
    return found


def _run(arguments: list[str], settings: dict[str, str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(places.PERF), "TILEWRIGHT_CACHE": "rw"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-5:]))
    return done.stdout


def rows(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, int, float, float]]:
    """(kind, kernels, milliseconds to open the cache, milliseconds of the kernels): medians."""
    return [
        (
            kind,
            int(counts[0]["emitted"] + counts[0]["loaded"]),
            statistics.median(count["open_ms"] for count in counts),
            statistics.median(count["kernels_ms"] for count in counts),
        )
        for kind, counts in found.items()
    ]
