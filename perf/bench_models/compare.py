"""The regression gate: two builds of Tilewright, interleaved, and a verdict with an exit code.

A build is a directory that holds the package, or a git revision, built once into the cache.
A slowdown is flagged when the median of paired ratios new / old exceeds 1 + margin and the whole
interval lies above 1; so noise alone does not fail a build, and neither does a change too small to
state. Two processes of one build differ by up to 5 % all their lives, and why is not known
(perf/results/compare-same-build.md): so each build gets several, and a pair of processes counts as
one ratio. Wrong answers fail a build, too.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_models import models, places, text
from bench_models.cells import Cell
from bench_models.client import Worker
from bench_models.intervals import Interval, bootstrap
from bench_models.rounds import Blocks, Probe, Rounds, Sample, run_rounds

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


def judge(pairs: Sequence[Blocks], what: str, margin: float = MARGIN) -> list[Verdict]:
    """Verdicts of pairs of processes; each pair's blocks have the new build's samples as their own
    and the old one's as the baseline's."""
    kept = [blocks for blocks in pairs if blocks.kept]
    if not kept:
        return []

    def ratio(blocks: Blocks, part: str) -> float:
        return statistics.median(
            getattr(new, part) / getattr(old, part)
            for new, old in zip(blocks.own, blocks.baseline, strict=True)
        )

    return [
        Verdict(f"{what} {part}", bootstrap([ratio(blocks, part) for blocks in kept]), margin)
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
    processes: int,
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
        pairs: list[Blocks] = []
        same = True
        with tempfile.TemporaryDirectory(prefix="bench-compare-") as caches:
            for index in range(processes):
                say(f"comparing on {cell.name}, processes {index + 1} of {processes} ...")
                # Who loads first may have an advantage: take turns.
                order = ("old", "new") if index % 2 == 0 else ("new", "old")
                blocks, agreed = _compare_processes(
                    dict(zip(("old", "new"), builds, strict=True)),
                    order,
                    cell,
                    functools.partial(run_rounds, probe=probe, count=rounds),
                    threads,
                    mode,
                    Path(caches),
                )
                pairs.append(blocks)
                same = same and agreed
        if not same:
            problems.append(f"{cell.name}: other tokens than before")
        found = judge(pairs, cell.name, margin)
        if not found:
            problems.append(f"{cell.name}: the machine never held still")
        verdicts += found
    return verdicts, problems


def _compare_processes(
    builds: Mapping[str, Path],
    order: Sequence[str],
    cell: Cell,
    measured: Callable[..., Rounds],
    threads: int,
    mode: str,
    caches: Path,
) -> tuple[Blocks, bool]:
    """The blocks of one process of each build, and whether they gave the same tokens."""
    directory = models.directory_of(cell.model)
    prompts = text.prompts_of(cell, directory)
    generate = {"do": "generate", "prompts": prompts, "new": cell.new}
    workers: dict[str, Worker] = {}
    tokens: dict[str, Any] = {}
    try:
        for name in order:
            log = places.home() / "logs" / f"compare-{name}.log"
            worker = Worker("tilewright", threads, caches / name, log, builds[name])
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
            tokens[name] = worker.ask(generate)["tokens"]

        def measure(name: str) -> Sample:
            answer = workers[name].ask(generate)
            return Sample(answer["first_seconds"], answer["decode_seconds"])

        return measured(("old", "new"), measure).blocks["new"], tokens["old"] == tokens["new"]
    finally:
        for worker in workers.values():
            worker.close()
