"""One model in one dtype: load every system, measure its cells in rounds, check the answers.

A worker's load is its cold start when its caches are fresh directories; afterwards a second process
with the same caches is the warm start. A system that fails anywhere becomes a row with the reason.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

from bench_models import accuracy, models, places, text
from bench_models.cells import WEIGHT_BYTES, Cell, Roof, limit_of
from bench_models.client import Worker, WorkerError
from bench_models.intervals import bootstrap, paired_ratio
from bench_models.rounds import Blocks, Probe, Rounds, Sample, run_rounds
from bench_models.systems import SYSTEMS

ACCURACY_TOKENS = 128
CONVERTING = ("openvino", "llama_cpp", "onnxruntime")  # engines with a form of their own
LARGEST_FP64 = 4e8  # parameters; larger models are compared with eager fp32


@dataclass
class Plan:
    """How much to do."""

    systems: list[str]
    threads: int
    rounds: int = 7
    retries: int = 3
    load_seconds: float = 900  # a system that loads longer is a row that says so
    starts: bool = True
    accuracy: bool = True
    without_logits: tuple[str, ...] = ()  # systems that are judged by their tokens only
    # Kept between runs if given; else fresh, so that every first start is a cold one.
    kept_caches: Path | None = None
    caches: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="bench-caches-")))
    logs: Path = field(default_factory=lambda: places.home() / "logs")
    say: Callable[[str], None] = print
    out_of_time: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.kept_caches is not None:
            shutil.rmtree(self.caches, ignore_errors=True)
            self.caches = self.kept_caches


@dataclass
class Row:
    """One system in one model and dtype."""

    name: str
    worker: Worker | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    start: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        return self.worker is not None and not self.reason

    def fail(self, error: Exception) -> None:
        """Keeps the reason and ends the process."""
        self.reason = str(error) or type(error).__name__
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _load_request(cell: Cell, name: str, directory: Path, prompts: Any) -> dict[str, Any]:
    converted = places.home() / "converted" / f"{cell.model}-{SYSTEMS[name].engine}-{cell.dtype}"
    if SYSTEMS[name].engine == "llama_cpp":
        converted = converted.with_name(f"{cell.model}-{cell.dtype}.gguf")
    return {
        "do": "load",
        "mode": SYSTEMS[name].mode,
        "model": str(directory),
        "converted": str(converted),
        "dtype": cell.dtype,
        "prompts": prompts,
        "new": cell.new,
        "longest": cell.prompt + cell.new + ACCURACY_TOKENS,
    }


def _convert(plan: Plan, name: str, request: dict[str, Any]) -> None:
    """Makes the system's own form of the model, once."""
    target = Path(request["converted"])
    if SYSTEMS[name].engine not in CONVERTING or target.exists():
        return
    plan.say(f"converting for {name} (once) ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    if SYSTEMS[name].engine == "llama_cpp":
        from bench_models import gguf_file

        gguf_file.write(Path(request["model"]), target, request["dtype"])
        return
    worker = Worker(name, plan.threads, plan.caches / "convert", plan.logs / f"{name}.log")
    try:
        worker.ask({**request, "do": "convert"})
    finally:
        worker.close()


def start(plan: Plan, name: str, cell: Cell, directory: Path, prompts: Any) -> Row:
    """A loaded worker, or the reason why not."""
    row = Row(name)
    if cell.dtype not in SYSTEMS[name].dtypes:
        row.reason = f"does not run {cell.dtype} in this harness"
        return row
    try:
        request = _load_request(cell, name, directory, prompts)
        _convert(plan, name, request)
        plan.say(f"loading {name} ...")
        caches = plan.caches / f"{places.slug(name)}-{cell.model}-{cell.dtype}"
        kind = "warm" if caches.exists() else "cold"
        row.worker = Worker(name, plan.threads, caches, plan.logs / f"{places.slug(name)}.log")
        row.loaded = row.worker.ask(request, plan.load_seconds)
        row.start[kind] = {**row.loaded["start"], "details": row.loaded["start_details"]}
    except (WorkerError, OSError, ValueError, KeyError) as error:
        row.fail(error)
    return row


def warm_start(plan: Plan, row: Row, cell: Cell, directory: Path, prompts: Any) -> None:
    """A fresh process with the caches of the first."""
    caches = plan.caches / f"{places.slug(row.name)}-{cell.model}-{cell.dtype}"
    try:
        worker = Worker(row.name, plan.threads, caches, plan.logs / f"{places.slug(row.name)}.log")
        request = _load_request(cell, row.name, directory, prompts)
        loaded = worker.ask(request, plan.load_seconds)
        row.start["warm"] = {**loaded["start"], "details": loaded["start_details"]}
        worker.close()
    except WorkerError as error:
        row.start["warm"] = {"reason": str(error)}


def _accuracy(plan: Plan, rows: list[Row], cell: Cell, directory: Path) -> None:
    """Fills in every running system's accuracy; a system without logits says so."""
    tokens = text.accuracy_tokens(cell, directory, ACCURACY_TOKENS)
    dtype = "fp64" if cell.shape.parameters <= LARGEST_FP64 else "fp32"
    plan.say(f"logits against eager {dtype} ...")
    reference = Worker(
        "eager", plan.threads, plan.caches / "reference", plan.logs / "reference.log"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npy"
        request = _load_request(cell, "eager", directory, [tokens[:2]])
        reference.ask({**request, "dtype": dtype, "new": 1})
        reference.ask({"do": "logits", "tokens": tokens, "path": str(path)})
        reference.close()
        wanted = numpy.load(path)
        for row in rows:
            if row.worker is None:
                continue
            if row.name in plan.without_logits:
                row.accuracy = {"reason": "only its tokens are compared"}
                continue
            own = Path(folder) / "own.npy"
            try:
                row.worker.ask({"do": "logits", "tokens": tokens, "path": str(own)})
                found = accuracy.compare(numpy.load(own), wanted, tokens)
                row.accuracy = {
                    **found.to_dict(),
                    "reference": f"eager {dtype}",
                    "wrong": accuracy.is_wrong(found, cell.dtype),
                }
            except (WorkerError, ValueError, OSError) as error:
                row.accuracy = {"reason": str(error)}


def _compare_tokens(entries: list[dict[str, Any]], tokens: dict[str, list[list[int]]]) -> None:
    """With eager's, also those of systems that were measured before eager was."""
    wanted = tokens.get("eager")
    for entry in entries:
        own = tokens.get(entry["system"])
        if wanted is not None and own is not None:
            entry["tokens"] = accuracy.agreement(own, wanted)


def _measure_cell(
    plan: Plan, rows: list[Row], cell: Cell, prompts: Any, probe: Probe, roof: Roof
) -> tuple[Rounds, dict[str, list[list[int]]], dict[str, dict[str, float]]]:
    """Rounds over the running systems, their tokens and their memory."""
    tokens: dict[str, list[list[int]]] = {}
    for row in rows:
        if row.worker is None:
            continue
        try:  # twice: caches of other shapes, lazily compiled graphs
            row.worker.ask({"do": "generate", "prompts": prompts, "new": cell.new})
            answer = row.worker.ask({"do": "generate", "prompts": prompts, "new": cell.new})
            tokens[row.name] = answer["tokens"]
        except WorkerError as error:
            row.fail(error)
    running = {row.name: row for row in rows if row.worker is not None}

    def measure(name: str) -> Sample | None:
        row = running[name]
        if row.worker is None:
            return None
        try:
            answer = row.worker.ask({"do": "generate", "prompts": prompts, "new": cell.new})
        except WorkerError as error:
            row.fail(error)
            return None
        return Sample(answer["first_seconds"], answer["decode_seconds"])

    def limits(found: Mapping[str, float]) -> Mapping[str, float]:
        limit = limit_of(cell, roof.beside([found]))
        return {"prefill": limit.prefill_seconds, "decode": limit.decode_seconds}

    rounds = run_rounds(
        list(running), measure, probe, plan.rounds, plan.retries, plan.out_of_time, limits
    )
    memory = {
        name: row.worker.ask({"do": "memory"})
        for name, row in running.items()
        if row.worker is not None
    }
    return rounds, tokens, memory


def note_of(name: str) -> str:
    """What the table of systems says, and what setting it up met."""
    met = places.home() / "venvs" / SYSTEMS[name].environment / "bench-note.txt"
    parts = [SYSTEMS[name].note, met.read_text() if met.exists() else ""]
    return "; ".join(part for part in parts if part)


def _system_record(
    row: Row,
    cell: Cell,
    rounds: Rounds,
    baseline: str,
    memory: dict[str, float],
    limit: Any,
) -> dict[str, Any]:
    """One row of the results."""
    record: dict[str, Any] = {"system": row.name, "note": note_of(row.name)}
    blocks = rounds.blocks.get(row.name, Blocks())
    if row.reason:
        return {**record, "status": "failed", "reason": row.reason}
    record |= {
        "precision": row.loaded["precision"],
        "versions": row.loaded["versions"],
        "tokens": "not compared",
        "memory": {**memory, "imported_mb": row.loaded["memory_imported"]["resident_mb"]},
        "start": row.start,
        "accuracy": row.accuracy,
        "kept": blocks.kept,
        "dropped": blocks.dropped,
    }
    if not blocks.kept:
        reason = "the machine never held still: every block was dropped"
        pairs = [[asdict(own), asdict(beside)] for own, beside in blocks.unsteady]
        return {**record, "status": "unsteady", "reason": reason, "unsteady_samples": pairs}
    prefill = [sample.prefill for sample in blocks.own]
    decode = [sample.decode for sample in blocks.own]
    record |= {
        "status": "ok",
        "prefill_seconds": bootstrap(prefill).to_dict(),
        "decode_seconds_per_token": bootstrap(decode).to_dict(),
        "decode_tokens_per_second": cell.batch / statistics.median(decode),
        "share_of_prefill_limit": limit.prefill_seconds / statistics.median(prefill),
        "share_of_decode_limit": limit.decode_seconds / statistics.median(decode),
        "samples": {
            "prefill": prefill,
            "decode": decode,
            "baseline_prefill": [sample.prefill for sample in blocks.baseline],
            "baseline_decode": [sample.decode for sample in blocks.baseline],
        },
    }
    if baseline in rounds.blocks:
        record["ratio"] = {  # above 1: the baseline is faster
            part: paired_ratio(
                record["samples"][part], record["samples"][f"baseline_{part}"]
            ).to_dict()
            for part in ("prefill", "decode")
        }
    return record


def groups_that_fit(needed: dict[str, float], available: float) -> list[list[str]]:
    """The systems in groups whose models fit in memory together; the first one is in each group."""
    first, *others = needed
    groups = [[first]]
    used = needed[first]
    for name in others:
        if len(groups[-1]) > 1 and used + needed[name] > available:
            groups.append([first])
            used = needed[first]
        groups[-1].append(name)
        used += needed[name]
    return groups


def available_bytes() -> float:
    """Memory that new processes may use."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024.0
    return 0.0


@contextmanager
def _running(rows: list[Row]) -> Iterator[None]:
    try:
        yield
    finally:
        for row in rows:
            if row.worker is not None:
                row.worker.close()


def run_session(
    plan: Plan, cells: list[Cell], probe: Probe, roof: Roof
) -> Iterator[list[dict[str, Any]]]:
    """All cells of one model and dtype, as far as they are: after each cell of a group of systems,
    and after its warm starts. The first system is the baseline of the ratios."""
    first = cells[0]
    directory = models.directory_of(first.model)
    weights = first.shape.parameters * WEIGHT_BYTES[first.dtype]
    records: list[dict[str, Any]] = [
        {
            "model": cell.model,
            "dtype": cell.dtype,
            "prompt": cell.prompt,
            "new": cell.new,
            "batch": cell.batch,
            "baseline": plan.systems[0],
            "systems": [],
        }
        for cell in cells
    ]
    found_tokens: dict[str, dict[str, list[list[int]]]] = {cell.name: {} for cell in cells}
    absent = [
        name
        for name in plan.systems[1:]
        if first.dtype not in SYSTEMS[name].dtypes
        or not places.python_of(SYSTEMS[name].environment).exists()
    ]
    present = [name for name in plan.systems if name not in absent]
    needed = {name: weights * SYSTEMS[name].copies + 0.5e9 for name in present}
    groups = groups_that_fit(needed, 0.85 * available_bytes())
    groups[0] = [*groups[0], *absent]  # rows with reasons; they need no memory
    for group in groups:
        prompts = text.prompts_of(first, directory)
        rows: list[Row] = []
        with _running(rows):
            for name in group:
                rows.append(start(plan, name, first, directory, prompts))
                if rows[-1].reason:
                    plan.say(f"{name}: {rows[-1].reason}")
            if plan.accuracy:
                try:
                    _accuracy(plan, rows, first, directory)
                except WorkerError as error:
                    plan.say(f"no accuracy: the reference failed: {error}")
                    for row in rows:
                        row.accuracy = {"reason": f"the reference failed: {error}"}
            for cell, record in zip(cells, records, strict=True):
                plan.say(f"measuring {cell.name} ...")
                prompts = text.prompts_of(cell, directory)
                rounds, tokens, memory = _measure_cell(plan, rows, cell, prompts, probe, roof)
                for name, values in tokens.items():
                    found_tokens[cell.name].setdefault(name, values)
                bandwidths = [found["read_gb_per_second"] for found in rounds.probes]
                limit = limit_of(cell, roof.beside(rounds.probes))
                record["limit"] = limit.to_dict()
                record.setdefault("rounds", []).append(
                    {
                        "systems": list(rounds.blocks),
                        "movements": rounds.movements,
                        "read_gb_per_second": bandwidths,
                        "fma_gflops": [found["fma_gflops"] for found in rounds.probes],
                    }
                )
                known = {entry["system"] for entry in record["systems"]}
                for row in rows:
                    if row.name in known:
                        continue
                    record["systems"].append(
                        _system_record(
                            row, cell, rounds, plan.systems[0], memory.get(row.name, {}), limit
                        )
                    )
                _compare_tokens(record["systems"], found_tokens[cell.name])
                yield records
            for row in rows:
                if row.worker is not None:
                    row.worker.close()
            if plan.starts:
                for row in rows:
                    if row.worker is not None and not row.reason:
                        plan.say(f"warm start of {row.name} ...")
                        warm_start(plan, row, first, directory, text.prompts_of(first, directory))
        yield records
    if plan.kept_caches is None:
        shutil.rmtree(plan.caches, ignore_errors=True)
