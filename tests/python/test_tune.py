"""Choices of speed: what `tilewright tune` measures, believes and writes, and who reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")

from typer.testing import CliRunner

from tilewright import _core, cli, core, tuning


def outcome(candidate: Any, overall: Sequence[float], *shapes: Sequence[float]) -> tuning.Outcome:
    by_shape = {str(i): tuning.Interval(*shape) for i, shape in enumerate(shapes)}
    return tuning.Outcome("prefetch", 1024, candidate, by_shape, tuning.Interval(*overall))


BETTER, BEST, SAME = (1.05, 1.02, 1.08), (1.2, 1.1, 1.3), (1.01, 0.99, 1.03)
WORSE = (0.9, 0.85, 0.95)


def test_an_interval_holds_the_median_of_any_distribution() -> None:
    assert tuning.interval([3.0, 1.0, 2.0]) == tuning.Interval(2.0, 1.0, 3.0)
    values = [float(i) for i in range(1, 16)]
    # P(the median lies outside the 4th to the 12th of 15) = 0.035
    assert tuning.interval(values[::-1]) == tuning.Interval(8.0, 4.0, 12.0)


def test_a_win_is_beyond_the_noise_and_hurts_no_shape() -> None:
    assert outcome(512, BETTER, BEST, SAME).wins
    assert not outcome(512, SAME, SAME).wins
    assert not outcome(512, BETTER, BEST, WORSE).wins


def tuned(*rows: list[tuning.Outcome]) -> tuning.Tuning:
    """Of one choice, whose measurements give these rows, one after the other."""
    given = iter(rows)

    def measured(*_: Any) -> list[tuning.Outcome]:
        return next(given)

    shape = tuning.Layers(1, 64, 32, torch.float32)
    return tuning.tune([tuning.Experiment("prefetch", [512, 2048], [shape])], 6, measured=measured)


def test_the_best_must_win_twice() -> None:
    first = [outcome(512, BETTER), outcome(2048, BEST)]
    assert tuned(first, [outcome(2048, BETTER)]).choices == {"prefetch": 2048}
    assert tuned(first, [outcome(2048, SAME)]).choices == {}
    assert tuned([outcome(512, SAME), outcome(2048, WORSE)]).choices == {}


@pytest.mark.parametrize("lanes", [8, 16])
def test_every_candidate_is_a_valid_choice(lanes: int) -> None:
    for experiment in tuning.experiments(lanes, tiles=True):
        names = [str(shape) for shape in experiment.shapes]
        assert len(set(names)) == len(names), "results are found by name"
        for candidate in experiment.candidates:
            core.engine_for("", json.dumps({experiment.choice: candidate}))


@torch.inference_mode()
def test_every_shape_runs_in_our_kernels() -> None:
    for experiment in tuning.experiments(8, tiles=True):
        for shape in experiment.shapes:
            if isinstance(shape, tuning.Layers):
                shape = dataclasses.replace(shape, k=64, n=32, values=4096)
            candidate = experiment.candidates[0]
            runs = tuning.Runs(shape, experiment.choice, [candidate])
            (ratio,) = runs.ratios()
            assert ratio > 0
            for program in runs.programs:
                assert not any(region["fallback"] for region in program.report()["regions"])


@torch.inference_mode()
def test_measure_pairs_each_candidate_with_the_shipped_choice() -> None:
    shape = tuning.Layers(2, 64, 32, torch.float32, values=4096)
    experiment = tuning.Experiment(
        "prefetch", [0, 512], [shape, dataclasses.replace(shape, rows=3)]
    )
    first, second = tuning.measure(experiment, [0, 512], 1024, 6)
    assert (first.candidate, second.candidate) == (0, 512)
    assert first.by_shape.keys() == {"2 x 64 x 32 f32 of 0 M", "3 x 64 x 32 f32 of 0 M"}
    assert first.overall.low <= first.overall.median <= first.overall.high


def test_weights_that_fit_twelve_bits_only_in_part() -> None:
    """What decides twelve_bits_percent: 81 and 87.5 % of the size in 16 bits."""
    for wide, fits in ((4, 82), (2, 88)):
        shape = tuning.Layers(1, 512, 512, torch.bfloat16, 1, tuning.COMPACT, wide, False)
        for percent, expected in ((fits - 1, False), (fits, True)):
            runs = tuning.Runs(shape, "twelve_bits_percent", [percent])
            (region,) = (r for r in runs.programs[1].report()["regions"] if r["weight_bytes"])
            assert ("twelve_bits" in region["kernel"]) == expected, (wide, percent, region)


# --- processes


def env_of(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "env", "--json"],
        env={**os.environ, "TILEWRIGHT_CACHE": "off", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def values(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {
        row["name"]: json.loads(row["value"])
        for row in json.loads(done.stdout)["choices"]["values"]
    }


def source(done: subprocess.CompletedProcess[str]) -> str:
    return json.loads(done.stdout)["choices"]["source"]


def test_two_starts_choose_alike(tmp_path: Path) -> None:
    first, second = (env_of(XDG_CONFIG_HOME=str(tmp_path)) for _ in range(2))
    assert first.stdout == second.stdout
    assert source(first).startswith(("row ", "rule "))
    assert values(first)["few_queries"] == 16


@pytest.fixture
def own_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process writes the user's profile."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setitem(core.settings(), "machine_profile", "")
    return tmp_path / "tilewright" / "profile.json"


def test_a_profile_is_private_read_and_named(own_profile: Path) -> None:
    assert tuning.profile_path() == own_profile
    for few in (33, 34):  # the second replaces the first
        tuning.write_profile(own_profile, tuning.Tuning(choices={"few_queries": few}))
    assert stat.S_IMODE(own_profile.stat().st_mode) == 0o600
    assert stat.S_IMODE(own_profile.parent.stat().st_mode) == 0o700
    assert [file.name for file in own_profile.parent.iterdir()] == ["profile.json"]
    done = env_of()
    assert values(done)["few_queries"] == 34
    assert source(done) == f"profile {own_profile}"


def test_a_profile_of_another_cpu_is_a_warning(own_profile: Path) -> None:
    tuning.write_profile(own_profile, tuning.Tuning(choices={"few_queries": 34}))
    of_another = json.loads(own_profile.read_text()) | {"cpu": "GenuineIntel 6/143/8"}
    moved = own_profile.rename(own_profile.with_name("elsewhere.json"))
    moved.write_text(json.dumps(of_another))
    done = env_of(TILEWRIGHT_PROFILE=str(moved))
    assert "another CPU: GenuineIntel 6/143/8" in json.loads(done.stdout)["choices"]["problem"]
    assert "another CPU" in done.stderr
    assert values(done)["few_queries"] == 16


def test_a_profile_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(_core.CoreError, match="nonsense"):
        tuning.write_profile(tmp_path / "profile.json", tuning.Tuning(choices={"nonsense": 1}))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tuning.write_profile(tmp_path / "file" / "profile.json", tuning.Tuning())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command(own_profile: Path) -> None:
    """On one choice; whatever it finds, what it prints and what it writes agree."""
    command = CliRunner()
    done = command.invoke(cli.app, ["tune", "--only", "pack_panels", "--json", "--rounds", "6"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {row["choice"] for row in result["outcomes"]} == {"pack_panels"}
    assert own_profile.exists() == bool(result["choices"]) == (result["profile"] is not None)
    assert command.invoke(cli.app, ["tune", "--only", "nonsense"]).exit_code == 2
