"""The regression gate: two builds of Tilewright, interleaved, and a verdict with an exit code.

A build is a directory that holds the package, or a git revision, built once into the cache.
A slowdown is flagged when the median of paired ratios new / old exceeds 1 + margin and the whole
interval lies above 1; so noise alone does not fail a build, and neither does a change too small to
state. Wrong answers fail it, too. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_models import models, places, text
from bench_models.cells import Cell
from bench_models.client import Worker
from bench_models.intervals import Interval, paired_ratio
from bench_models.rounds import Probe, Rounds, Sample, run_rounds

MARGIN = 0.05


@dataclass(frozen=True)
class Verdict:
    """One figure of one cell: new over old; above 1 is slower."""

    what: str
    ratio: Interval
    margin: float

    @property
    def slower(self) -> bool:
        return self.ratio.median > 1 + self.margin and self.ratio.low > 1

    @property
    def faster(self) -> bool:
        return self.ratio.median < 1 / (1 + self.margin) and self.ratio.high < 1

    def __str__(self) -> str:
        word = "SLOWER" if self.slower else "faster" if self.faster else "same"
        return f"{self.what:48} new/old {self.ratio}  {word}"


def judge(rounds: Rounds, what: str, margin: float = MARGIN) -> list[Verdict]:
    """Verdicts of the systems "old" and "new"."""
    old, new = rounds.samples["old"], rounds.samples["new"]
    if not old:
        return []
    return [
        Verdict(
            f"{what} {part}",
            paired_ratio([getattr(s, part) for s in new], [getattr(s, part) for s in old]),
            margin,
        )
        for part in ("prefill", "decode")
    ]


def build_of(given: str, say: Callable[[str], None]) -> Path:
    """The directory that holds the package; a git revision is built when it is new."""
    path = Path(given)
    if (path / "tilewright" / "__init__.py").exists():
        return path.resolve()
    command = ["git", "rev-parse", "--verify", "--quiet", f"{given}^{{commit}}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=places.REPOSITORY, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"'{given}' is neither a directory with the package nor a git revision")
    revision = done.stdout.strip()
    target = places.home() / "builds" / revision[:12]
    if (target / "tilewright" / "__init__.py").exists():
        return target
    say(f"building {revision[:12]} (once) ...")
    with tempfile.TemporaryDirectory() as folder:
        tree = str(Path(folder) / "tree")
        git = ["git", "worktree"]
        subprocess.run(
            [*git, "add", "--quiet", "--detach", tree, revision], cwd=places.REPOSITORY, check=True
        )
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            options = ["--no-build-isolation", "--target", str(target)]
            # The environment's own cmake and ninja, as ./dev setup does it.
            tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run([*pip, *options, tree], check=True, env={**os.environ, "PATH": tools})
        finally:
            subprocess.run([*git, "remove", "--force", tree], cwd=places.REPOSITORY, check=False)
    return target


def run_compare(
    builds: Sequence[Path],
    cells: Sequence[Cell],
    probe: Probe,
    rounds: int,
    threads: int,
    margin: float,
    mode: str,
    say: Callable[[str], None],
) -> tuple[list[Verdict], list[str]]:
    """Verdicts, and what makes the comparison fail whatever the speed."""
    verdicts: list[Verdict] = []
    problems: list[str] = []
    for cell in cells:
        say(f"comparing on {cell.name} ...")
        directory = models.directory_of(cell.model)
        prompts = text.prompts_of(cell, directory)
        workers: dict[str, Worker] = {}
        tokens: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="bench-compare-") as caches:
            try:
                for name, build in zip(("old", "new"), builds, strict=True):
                    log = places.home() / "logs" / f"compare-{name}.log"
                    worker = Worker("tilewright", threads, Path(caches) / name, log, build)
                    workers[name] = worker
                    worker.ask(
                        {
                            "do": "load",
                            "mode": mode,
                            "model": str(directory),
                            "dtype": cell.dtype,
                            "prompts": prompts,
                            "new": cell.new,
                        }
                    )
                    tokens[name] = worker.ask(_generate(cell, prompts))["tokens"]

                measure = functools.partial(_measure, workers, _generate(cell, prompts))
                found = run_rounds(("old", "new"), measure, probe, rounds)
            finally:
                for worker in workers.values():
                    worker.close()
        if tokens["old"] != tokens["new"]:
            problems.append(f"{cell.name}: other tokens than before")
        if not found.kept:
            problems.append(f"{cell.name}: the machine never held still")
        verdicts += judge(found, cell.name, margin)
    return verdicts, problems


def _measure(workers: dict[str, Worker], request: dict[str, Any], name: str) -> Sample:
    answer = workers[name].ask(request)
    return Sample(answer["first_seconds"], answer["decode_seconds"])


def _generate(cell: Cell, prompts: list[list[int]]) -> dict[str, Any]:
    return {"do": "generate", "prompts": prompts, "new": cell.new}
