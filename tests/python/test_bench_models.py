"""The benchmark of models, judged by systems with a clock of their own. No test asserts a time."""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench_models import __main__ as commands
from bench_models import (
    accuracy,
    cells,
    compare,
    decode,
    encoders,
    figures,
    generation,
    gguf_file,
    intervals,
    latest,
    models,
    overhead,
    places,
    readme,
    report,
    results,
    rounds,
    session,
    setup,
    systems,
    table,
    text,
)
from bench_models.client import Worker, WorkerError

HERE = Path(__file__).parent


class StillMachine:
    """A probe that never moves."""

    def read(self) -> Mapping[str, float]:
        return {"read_gb_per_second": 25.0, "fma_gflops": 200.0}


class MovingMachine:
    """A probe that gives what a list says."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def read(self) -> Mapping[str, float]:
        return {"read_gb_per_second": self.values.pop(0)}


def fake(mode: str = "right", environment: str = "project") -> systems.System:
    return systems.System("tests.bench_fake_engine", environment, mode)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Systems that are fakes, a home that is empty."""
    package = tmp_path / "path" / "tests"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bench_fake_engine.py").write_text((HERE / "bench_fake_engine.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(models, "directory_of", lambda name: tmp_path)
    for name, system in {
        "tilewright": fake(),
        "eager": fake(),
        "ipex": fake("erroneous"),
        "vllm": fake("broken"),
        "zentorch": fake("right", "zentorch"),
    }.items():
        monkeypatch.setitem(systems.SYSTEMS, name, system)
    return tmp_path


def test_a_against_a_is_one_within_its_interval() -> None:
    generator = random.Random(3)
    clock = [0.0]

    def measure(name: str) -> rounds.Sample:
        clock[0] += 1  # the machine becomes slower and slower, by half over the run
        seconds = (1 + clock[0] / 60) * generator.uniform(0.95, 1.05)
        return rounds.Sample(seconds, seconds)

    found = rounds.run_rounds(("a", "b"), measure, StillMachine(), 9)
    blocks = found.blocks["b"]
    ratio = intervals.paired_ratio(
        [sample.decode for sample in blocks.own], [sample.decode for sample in blocks.baseline]
    )
    assert ratio.low <= 1.0 <= ratio.high
    assert ratio.high - ratio.low < 0.12
    assert not any(verdict.slower or verdict.faster for verdict in compare.judge([blocks], "x"))


def test_processes_of_one_build_that_differ_are_no_verdict() -> None:
    def pair(ratio: float) -> rounds.Blocks:
        one, other = rounds.Sample(1.0, 1.0), rounds.Sample(ratio, ratio)
        return rounds.Blocks([other] * 3, [one] * 3)

    placed = [pair(ratio) for ratio in (0.89, 1.05, 0.96, 1.1, 1.0, 1.04)]
    for verdict in compare.judge([*placed, rounds.Blocks()], "x"):
        assert not verdict.slower and not verdict.faster
        assert verdict.ratio.count == 6


def test_tokens_of_systems_before_eager_are_compared_too() -> None:
    entries: list[dict[str, Any]] = [
        {"system": name, "tokens": "not compared"} for name in ("tilewright", "eager", "ipex")
    ]
    tokens = {"tilewright": [[1, 2]], "ipex": [[1, 3]]}
    session._compare_tokens(entries, tokens)
    assert [entry["tokens"] for entry in entries] == ["not compared"] * 3
    session._compare_tokens(entries, tokens | {"eager": [[1, 2]]})
    assert [entry["tokens"] for entry in entries] == ["identical", "identical", "first 1 of 2"]


def test_other_tokens_than_eager_are_wrong_unless_the_logits_say_otherwise() -> None:
    differs = {"tokens": "first 0 of 9"}
    assert latest.is_wrong({**differs, "accuracy": {}}, "fp32")
    assert not latest.is_wrong({**differs, "accuracy": {}}, "bf16")
    assert not latest.is_wrong({**differs, "accuracy": {"wrong": False}}, "fp32")
    assert latest.is_wrong({"tokens": "identical", "accuracy": {"wrong": True}}, "bf16")
    assert not latest.is_wrong({"tokens": "not compared", "accuracy": {}}, "fp32")


def test_a_later_run_without_warm_starts_keeps_the_earlier_ones() -> None:
    def record(commit: str, **start: float) -> dict[str, Any]:
        row = {"system": "eager", "status": "ok", "start": start}
        cell = {"model": "m", "dtype": "fp32", "prompt": 1, "batch": 1, "systems": [row]}
        machine = {"cpu": "x", "isa": ["avx2"]}
        return {"commit": commit, "machine": machine, "cells": [{**cell, "limit": None}]}

    records = [record("a", cold=1.0, warm=2.0), record("b", cold=3.0)]
    ((_, cells),) = latest.latest_cells(records).items()
    (row,) = cells[0]["systems"]
    assert row["start"] == {"cold": 3.0, "warm": 2.0} and row["commit"] == "b"


def test_rounds_alternate_and_measure_each_system_twice() -> None:
    asked: list[str] = []

    def measure(name: str) -> rounds.Sample:
        asked.append(name)
        return rounds.Sample(1.0, 1.0)

    rounds.run_rounds(("a", "b", "c"), measure, StillMachine(), 2)
    assert "".join(asked) == "abbaaccabaabcaac"
    asked.clear()
    rounds.run_rounds(("a",), measure, StillMachine(), 1)
    assert "".join(asked) == "aaaa"


def constant(_name: str) -> rounds.Sample:
    return rounds.Sample(1, 1)


def test_blocks_in_which_the_machine_moved_are_dropped_and_retried() -> None:
    values = [10, 10.5, 12.6, 10, 10]  # moved by 5 %, 20 %, 21 %, 0 %
    found = rounds.run_rounds(("a",), constant, MovingMachine(values), 2, retries=3)
    assert (found.blocks["a"].kept, found.blocks["a"].dropped) == (2, 2)
    assert found.blocks["a"].unsteady == [(rounds.Sample(1, 1), rounds.Sample(1, 1))] * 2
    never = MovingMachine([10, 20] * 9)
    found = rounds.run_rounds(("a", "b", "c"), constant, never, 2, retries=3)
    assert {name: (b.kept, b.dropped) for name, b in found.blocks.items()} == {
        "a": (0, 10),
        "b": (0, 5),
        "c": (0, 5),
    }


def test_memory_that_moves_while_arithmetic_is_the_limit_drops_no_block() -> None:
    def slower_of_two(found: Mapping[str, float]) -> Mapping[str, float]:
        return {"decode": max(100 / found["read_gb_per_second"], 6.0)}

    probe = MovingMachine([20, 40, 20, 10])  # limits: 6, 6, 6, 10 seconds
    found = rounds.run_rounds(("a",), constant, probe, 3, retries=0, limits=slower_of_two)
    assert (found.blocks["a"].kept, found.blocks["a"].dropped) == (2, 1)


def test_a_moved_block_costs_only_its_own_system_a_block() -> None:
    found = rounds.run_rounds(("a", "b", "c"), constant, MovingMachine([10, 10, 20, 20]), 1, 0)
    assert {name: (b.kept, b.dropped) for name, b in found.blocks.items()} == {
        "a": (1, 1),
        "b": (1, 0),
        "c": (0, 1),
    }


def test_after_the_time_is_up_only_systems_without_a_block_are_measured() -> None:
    values = [10, 10, 20, 20]
    found = rounds.run_rounds(
        ("a", "b", "c"), constant, MovingMachine(values), 5, out_of_time=lambda: True
    )
    assert (found.blocks["b"].kept, found.blocks["c"].kept) == (1, 1)


def test_a_system_that_dies_in_a_round_is_left_out_from_there_on() -> None:
    asked: list[str] = []

    def measure(name: str) -> rounds.Sample | None:
        asked.append(name)
        return None if name == "b" and asked.count("b") > 2 else rounds.Sample(1, 1)

    found = rounds.run_rounds(("a", "b", "c"), measure, StillMachine(), 3)
    assert (found.blocks["b"].kept, found.blocks["c"].kept) == (1, 3)
    assert asked.count("b") == 3
    assert rounds.run_rounds(("a", "b"), lambda _: None, StillMachine(), 3).blocks["b"].kept == 0
    assert rounds.run_rounds((), constant, StillMachine(), 3).blocks == {}


def test_intervals_of_few_values_are_their_range() -> None:
    assert intervals.bootstrap([1.0, 3.0, 2.0]) == intervals.Interval(2.0, 1.0, 3.0, 3)
    wide = intervals.bootstrap([1.0] * 5 + [2.0] * 6)
    assert wide.median == 2.0 and wide.low == 1.0
    with pytest.raises(ValueError, match="no values"):
        intervals.bootstrap([])


def test_a_session_measures_marks_and_explains(bench: Path) -> None:
    plan = session.Plan(
        ["tilewright", "eager", "ipex", "vllm", "zentorch"],
        threads=1,
        rounds=6,
        caches=bench / "caches",
        logs=bench / "logs",
        say=lambda _: None,
    )
    cell = cells.Cell("tiny", "fp32", 8, 5, 2)
    before, after = session.run_session(
        plan, [cell], StillMachine(), cells.Roof(20.0, 100.0, 200.0)
    )
    assert before is after, "one list, completed by the warm starts"
    (record,) = after
    rows = {row["system"]: row for row in record["systems"]}
    assert list(rows) == plan.systems
    eager = rows["eager"]
    decode = eager["ratio"]["decode"]  # two processes of one engine; each sleeps its own way
    assert decode["low"] <= 1.03 and decode["high"] >= 0.97
    assert eager["tokens"] == "identical"
    assert not eager["accuracy"]["wrong"]
    assert rows["ipex"]["accuracy"]["wrong"], "a planted numerical error must be flagged"
    assert rows["vllm"]["reason"].startswith("OSError: libmissing.so"), "the cause comes first"
    assert "this one cannot load" in rows["vllm"]["reason"]
    assert "bench setup zentorch" in rows["zentorch"]["reason"]
    for kind in ("cold", "warm"):
        assert {"process", "import", "load", "first_token"} <= set(eager["start"][kind])
    assert eager["memory"]["peak_mb"] > 0
    assert record["limit"]["read_gb_per_second"] == 25.0
    check_readers(bench, record)


def check_readers(bench: Path, cell: dict[str, Any]) -> None:
    """The file, the README table and the page of one record."""
    roof = {"isa": ["avx2"], "read": [], "arithmetic": []}
    record = results.new_record("models", roof, 1) | {"cells": [cell], "read_gb_per_second": 20.0}
    results.write(record, bench / "results" / "models-x.json")
    (read,) = results.read_all("models", bench / "results")
    ((_, found),) = latest.latest_cells([read]).items()
    assert [row["system"] for row in found[0]["systems"]] == [r["system"] for r in cell["systems"]]
    page = bench / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    assert readme.rewrite(page, bench / "results")
    assert not readme.rewrite(page, bench / "results")
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n")
    assert "identical, WRONG" in written and "libmissing.so" in written
    assert "libmissing.so" in report.cell_table(found[0])
    console = Console(file=io.StringIO(), width=250)
    table.print_record(record, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "WRONG" in printed and "libmissing.so" in printed
    # Wrong systems are no peers to be ahead of.
    peer = report.best_peer(found[0], "decode")
    assert peer is not None and peer["system"] == "eager"
    assert report.summary(found, "decode")[0].endswith("of 1")
    phases = figures.start_phases(found[0]["systems"][1]["start"]["cold"])
    total = found[0]["systems"][1]["start"]["cold"]["total"]
    assert sum(phases.values()) == pytest.approx(total, rel=0.2, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "--systems", "tilewrong"], "there are tilewright"),
        (["models", "--models", "gpt5"], "there are smollm2-135m"),
        (["ops", "--set", "matmull"], "there are attention"),
        (["encoder", "--systems", "inducter"], "there are tilewright"),
        (["compare", "no-such", "no-such"], "neither a directory"),
    ],
)
def test_commands_say_what_they_do_not_know(arguments: list[str], message: str) -> None:
    outcome = CliRunner().invoke(commands.app, arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.stderr.split())


def build_with(folder: Path, factor: float) -> Path:
    """A build whose engine is slower by this factor."""
    (folder / "tilewright").mkdir(parents=True)
    (folder / "tilewright" / "__init__.py").touch()
    (folder / "planted_slowdown.py").write_text(f"FACTOR = {factor}\n")
    return folder


@pytest.mark.parametrize(("factor", "slower"), [(1.0, False), (1.1, True)])
def test_compare_flags_a_planted_slowdown(bench: Path, factor: float, slower: bool) -> None:
    builds = [build_with(bench / "old", 1.0), build_with(bench / "new", factor)]
    cell = cells.Cell("tiny", "fp32", 8, 5, 1)
    verdicts, problems = compare.run_compare(
        builds, [cell], StillMachine(), 3, 3, 1, compare.MARGIN, "optimize", lambda _: None
    )
    assert [verdict.slower for verdict in verdicts] == [slower, slower]
    assert not problems
    assert ("SLOWER" in str(verdicts[0])) == slower


def test_an_encoder_is_measured_and_checked() -> None:
    tiny = encoders.Encoder(batch=3, tokens=16, layers=1, hidden=64)
    names = ["tilewright", "eager"]
    record = encoders.run_encoder(tiny, names, StillMachine(), 2, 100.0, lambda _: None)
    rows = record["implementations"]
    for row in rows.values():
        assert row["status"] == "ok" and row["relative_error"] < 1e-5 and row["kept"] == 2
    assert rows["tilewright"]["own_flops_share"] > 0.95
    with pytest.raises(ValueError, match="one use of each compiler"):
        encoders.check_names(["inductor", "inductor:freezing"])
    console = Console(file=io.StringIO(), width=150)
    table.print_encoder({"machine": {"cpu": "x"}, "cases": [record]}, console)
    assert "tilewright ahead" in console.file.getvalue()  # type: ignore[attr-defined]


def test_ways_to_generate_are_measured_and_checked(model_directory: Path) -> None:
    tiny = generation.requests_case(model_directory, "fp32", 3, 4, StillMachine(), 1)
    lookup = generation.lookup_case(model_directory, "fp32", True, 4, StillMachine(), 1)
    for case in (tiny, lookup):
        assert all(row["alike"] == case["requests"] for row in case["ways"].values()), case
        first, *others = case["ways"].values()
        assert "ratio" not in first and first["tokens_per_second"] > 0
        assert all(row["ratio"]["median"] > 0 and row["kept"] == 1 for row in others)
    console = Console(file=io.StringIO(), width=150)
    table.print_ways(tiny, console)
    assert "tilewright ahead" in console.file.getvalue()  # type: ignore[attr-defined]


def test_decode_is_measured_token_by_token(model_directory: Path) -> None:
    memory = iter([10e9] * 6 + [20e9] * 40)  # a token between both does not count
    case = decode.Case("fp32", 8, 6, batch=2, padding=3)
    record = decode.measured(model_directory, case, lambda: next(memory))
    slow, fast = record["phases"]
    assert (record["tokens"], slow["tokens"], fast["tokens"]) == (6, 1, 4)
    assert slow["read_gb_per_second"] == 10 and fast["read_gb_per_second"] == 20
    assert all(phase["share"] > 0 and phase["milliseconds"] > 0 for phase in record["phases"])
    console = Console(file=io.StringIO(), width=150)
    table.print_decode([record, {"case": "none", "tokens": 3, "phases": []}], console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of them padding" in printed and "never held still" in printed


def test_a_step_reads_weights_and_keys() -> None:
    config = SimpleNamespace(num_key_value_heads=3, num_hidden_layers=30, head_dim=64)
    plain = decode.Case("bf16", 100, 1, batch=4)
    assert decode.bytes_of(config, 1000, plain, 10) == 2000 + 4 * 10 * 2 * 30 * 3 * 128
    eight = decode.Case("bf16", 100, 1, cache="int8")
    assert decode.bytes_of(config, 1000, eight, 10) == 2000 + 10 * 2 * 30 * 3 * 68


def test_overheads_are_measured(model_directory: Path) -> None:
    steps = overhead.step_overhead(model_directory, "fp32", 8, 2)
    # Differences of two times: a busy machine may make one negative.
    assert len(steps) == 3 and all(math.isfinite(value) for value in steps.values())
    late = overhead.waiting(model_directory, "fp32", 16, 2)
    assert len(late) == 2
    assert all(0 <= v["p99"] <= v["most"] and v["ticks"] > 0 for v in late.values())


def test_compare_refuses_what_is_no_build(bench: Path) -> None:
    with pytest.raises(ValueError, match="neither a directory"):
        compare.build_of("no-such-revision", lambda _: None)
    assert compare.build_of(str(build_with(bench / "b", 1.0)), print) == bench / "b"


def test_a_process_that_dies_leaves_its_last_words(bench: Path) -> None:
    log = bench / "worker.log"
    worker = Worker("eager", 1, bench / "caches", log)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(WorkerError, match="SIGKILL"):
        worker.ask({"do": "memory"})


def test_accuracy_tells_rounding_from_errors() -> None:
    generator = numpy.random.default_rng(1)
    reference = generator.normal(size=(20, 100)).astype("float32")
    tokens = [int(t) for t in generator.integers(0, 100, 20)]
    rounding = reference + 1e-6 * generator.normal(size=reference.shape).astype("float32")
    found = accuracy.compare(rounding, reference, tokens)
    assert not accuracy.is_wrong(found, "fp32")
    assert found.same_top == 1.0
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-4)
    planted = reference.copy()
    planted[:, 7] += 0.1
    assert accuracy.is_wrong(accuracy.compare(planted, reference, tokens), "fp32")
    planted[0, 0] = numpy.nan
    assert accuracy.is_wrong(accuracy.compare(planted, reference, tokens), "int4")
    with pytest.raises(ValueError, match="shape"):
        accuracy.compare(reference[:5], reference, tokens)


def test_agreement_of_tokens_in_words() -> None:
    assert accuracy.agreement([[1, 2]], [[1, 2]]) == "identical"
    assert accuracy.agreement([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == "first 1 of 3"


@pytest.mark.parametrize(
    ("model", "read", "prefill"),
    [("smollm2-135m", 134.5e6, 118e9), ("llama-1b", 1236e6, 1014e9), ("llama-8b", 7505e6, 7217e9)],
)
def test_limits_agree_with_those_computed_by_hand(model: str, read: float, prefill: float) -> None:
    """The figures are those of the methodology's table; its prefill has a few per cent more."""
    assert models.MODELS[model].read_per_token == pytest.approx(read, rel=1e-2)
    limit = cells.limit_of(cells.Cell(model, "bf16", 512, 33, 1), cells.Roof(25.0, 200.0, 200.0))
    assert limit.prefill_flops == pytest.approx(prefill, rel=0.03)
    assert limit.decode_seconds == pytest.approx(2 * read / 25e9, rel=0.1)


def test_each_group_of_cells_has_the_same_share_of_the_time() -> None:
    assert cells.share_of_time(10.0, 40.0, 2) == 25.0
    assert cells.share_of_time(30.0, 40.0, 1) == 40.0
    assert cells.share_of_time(50.0, 40.0, 1) == 50.0


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="there are smollm2-135m"):
        cells.make_cells(["gpt5"], ["fp32"], [1], 2, [1])
    with pytest.raises(ValueError, match="there are fp32"):
        cells.make_cells(["tiny"], ["fp3"], [1], 2, [1])
    with pytest.raises(ValueError, match="there are tilewright"):
        systems.chosen(["tilewrong"])


def test_systems_that_do_not_fit_in_memory_run_in_groups_with_the_baseline() -> None:
    needed = {"a": 1.0, "b": 1.0, "c": 0.5}
    assert session.groups_that_fit(needed, 2.5) == [["a", "b", "c"]]
    assert session.groups_that_fit(needed, 2.4) == [["a", "b"], ["a", "c"]]
    assert session.groups_that_fit(needed, 0.1) == [["a", "b"], ["a", "c"]]
    assert session.groups_that_fit({"a": 1.0}, 0.1) == [["a"]]


def test_every_system_has_an_engine_and_an_environment() -> None:
    for name, system in systems.SYSTEMS.items():
        path = Path(places.PERF, *system.module.split(".")).with_suffix(".py")
        assert path.exists(), name
        assert system.environment in {"project", *systems.ENVIRONMENTS}, name
    for name in systems.QUICK_SYSTEMS:
        assert name in systems.SYSTEMS
    pinned = systems.ENVIRONMENTS["openvino"]
    assert "torch==2.13.0" in setup.stamp_of(pinned)


def test_prompts_differ_and_are_the_same_every_time(tmp_path: Path) -> None:
    cell = cells.Cell("tiny", "fp32", 8, 5, 3)
    prompts = text.prompts_of(cell, tmp_path)
    assert prompts == text.prompts_of(cell, tmp_path)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert {len(prompt) for prompt in prompts} == {8}
    assert len(text.reference_text()) > 100_000


def test_names_of_parameters_in_gguf_files() -> None:
    names = {
        "model.layers.3.self_attn.q_proj.weight": "blk.3.attn_q.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
        "model.embed_tokens.weight": "token_embd.weight",
        "model.rotary.inv_freq": None,
    }
    assert {name: gguf_file.gguf_name(name) for name in names} == names
    rows = numpy.arange(8).reshape(8, 1)
    assert gguf_file.permuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_committed_results_can_be_read() -> None:
    for path in places.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        if record.get("schema") == results.SCHEMA:
            assert results.read(path)["machine"]["cpu"]


def test_a_start_is_split_without_a_rest(tmp_path: Path) -> None:
    """One real start of a tiny model: the parts are the total, and the weights were kept."""
    from bench_models import start
    from tiny_models import tiny_llama

    tiny_llama(1).save_pretrained(tmp_path / "model")
    settings = {"TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache"), "TILEWRIGHT_CACHE_WEIGHTS": "on"}
    made = start.run_start(tmp_path / "model", "fp32", 4, 1, settings)
    assert sum(made["parts"].values()) == pytest.approx(made["total"])
    assert all(made["parts"][name] > 0 for name in ("imports", "hash weights", "write weights"))
    assert made["packed"] > 0 and made["mapped"] == 0 and made["captured"] == 1

    assert made["next"]["total"] > 0 and made["next"]["pack weights"] == 0

    rows = dict(start.rows({"packed": [made, made], "mapped": [made]}))
    assert rows["the next call"] == [made["next"]["total"]] * 2
    assert rows["total"] == [made["total"]] * 2
    assert rows["total - sum"] == pytest.approx([0.0, 0.0], abs=1e-6)
    given = sum(made["parts"][name] for name in ("interpreter", "imports", "read checkpoint"))
    beyond = rows["beyond imports and reading"]
    assert beyond == pytest.approx([made["total"] - given] * 2) and given > 0


def test_pages_are_read_or_dropped_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench_models import start

    (tmp_path / "inner").mkdir()
    for name in ("config.json", "inner/weights"):
        (tmp_path / name).write_bytes(b"1" * (3 << 20))
    dropped: set[int] = set()

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.add(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    start.drop_pages(tmp_path)
    assert dropped == {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}

    def read_so_far() -> int:
        (line,) = (x for x in Path("/proc/self/io").read_text().splitlines() if "rchar" in x)
        return int(line.split()[1])

    before = read_so_far()
    start.read_pages(tmp_path)
    assert read_so_far() - before >= 6 << 20


def test_starts_of_others_stand_beside_ours(bench: Path) -> None:
    from bench_models import start

    cell = cells.Cell("tiny", "fp32", 8, 1, 1)
    said: list[str] = []
    others = start.peers(["eager", "zentorch"], cell, 2, 1, bench / "others", said.append)
    assert "bench setup zentorch" in others["zentorch"]["reason"]
    assert len(others["eager"]["warm"]) == 2
    ours = {"captured, in place": [{"total": 3000.0}], "planned, mapped": [{"total": 2000.0}]}
    tilewright, eager, zentorch = start.beside(ours, others)
    assert tilewright == ("tilewright", 3.0, 2.0)
    assert eager[1] == others["eager"]["cold"]["total"] and eager[2]
    assert zentorch == ("zentorch", None, None)


def test_a_checkout_builds_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """CMake refuses a directory that was made for another checkout."""
    from bench_models import kernel_cache

    commands: list[list[str]] = []
    monkeypatch.setattr(
        kernel_cache.subprocess, "run", lambda command, **_: commands.append(command)
    )
    program = kernel_cache._cache_load()
    assert program.is_relative_to(places.REPOSITORY)
    assert all(str(places.REPOSITORY) in " ".join(command) for command in commands)


def test_the_kernels_of_a_model_are_counted_and_their_time_is_kept(tmp_path: Path) -> None:
    """One real process that emits a tiny model's kernels."""
    from bench_models import kernel_cache
    from tiny_models import llama_config

    llama_config(1).save_pretrained(tmp_path / "model")
    child = ["-m", "bench_models.cache_child", str(tmp_path / "model"), "fp32"]
    said = kernel_cache._run(child, kernel_cache.KINDS["emitted"](tmp_path))
    made = json.loads(said.splitlines()[-1])
    assert made["emitted"] > 10 and made["loaded"] == 0 and made["kernels_ms"] > 0
    ((kind, kernels, opening, passed),) = kernel_cache.rows({"emitted": [made, made]})
    assert (kind, kernels) == ("emitted", made["emitted"])
    assert (opening, passed) == (made["open_ms"], made["kernels_ms"])
