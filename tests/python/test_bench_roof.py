"""The probe of the machine's limits builds, and says what it measured. No test asserts a rate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench_models import cells, gate

READ = [
    {"bytes": 1024, "threads": 2, "pattern": "plain", "gb_per_second": 200.0},
    {"bytes": 4096, "threads": 2, "pattern": "plain", "gb_per_second": 20.0},
    {"bytes": 4096, "threads": 2, "pattern": "2 streams", "gb_per_second": 25.0},
    {"bytes": 4096, "threads": 1, "pattern": "plain", "gb_per_second": 99.0},
]


def test_the_best_read_is_from_memory_with_all_threads() -> None:
    assert gate.best_read({"read": READ}, 2) == 25.0


def test_the_peak_of_a_dtype_counts_the_units_that_it_may_use() -> None:
    rows = [
        {"name": "fma", "type": "fp32", "threads": 2, "gflops": 200.0},
        {"name": "amx", "type": "bf16", "threads": 2, "gflops": 6000.0},
        {"name": "amx, fed", "type": "bf16 fed", "threads": 2, "gflops": 9000.0},
        {"name": "vnni", "type": "int8", "threads": 2, "gflops": 800.0},
    ]
    assert cells.peak_for("fp32", rows, 2) == 200.0
    assert cells.peak_for("bf16", rows, 2) == 6000.0
    assert cells.peak_for("int4", rows[:1] + rows[3:], 2) == 800.0


def test_a_roof_is_what_the_machine_did_beside_the_rounds() -> None:
    before = cells.Roof(read_gb_per_second=30.0, peak_gflops=6000.0, fma_gflops=400.0)
    assert before.beside([]) == before
    probes = [{"read_gb_per_second": read, "fma_gflops": 360.0} for read in (33.0, 31.0, 20.0)]
    assert before.beside(probes) == cells.Roof(31.0, 5400.0, 360.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_the_gate_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BENCH_HOME", str(tmp_path))
    flags = tuple(flag.replace("-O3", "-O1") for flag in gate.FLAGS)
    monkeypatch.setattr(gate, "FLAGS", flags)  # compiles faster
    probe = gate.Gate(1)
    answers = [probe.read(), probe.read()]
    probe.close()
    for answer in answers:
        assert set(answer) == {"read_gb_per_second", "fma_gflops"}
        assert all(value > 0 for value in answer.values())
