"""prewarm: fills the kernel cache for a model ahead of time, for this machine or others.

The same capture and compilation as at run time, over a model of the right shapes (shapes.py); then
every kernel that any number of rows and any storage of the weights could need is emitted and
stored. Nothing is executed, so the instruction set need not be this machine's.

Work is cut into units (a graph, an instruction set, a storage of weights), which worker processes
go through (prewarm_worker.py). A worker that crashes, or reports no progress, is replaced by one
that leaves out what it was at: a kernel, else a unit. What is in the cache already is not made
again, so a prewarm that was interrupted goes on where it was.

Tested by tests/python/test_prewarm.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright import _core, core, prewarm_worker, recorded

# (type that fp32 weights fit, whether bf16 ones fit 12 bits, whether they are read in place): see
# WeightStore in ops/weights.h, Program::reads_in_place(). A program whose weights differ in it
# needs no kernel that none of these has.
FORMS = (
    ("f32", False, False),
    ("bf16", False, False),
    ("f16", False, False),
    ("bf16", True, False),
    ("f32", False, True),
)
KEEPS = (1, 0)  # logits of the last token (decode, generate), of all tokens

_WORKER = "from tilewright.prewarm_worker import main; main()"
SILENCE_SECONDS = 120  # no beat for so long: the process is stopped or stuck inside the interpreter


class NotPrewarmedError(Exception):
    """Nothing could be done; the message says why."""


@dataclass(frozen=True)
class Unit:
    index: int
    keep: int
    isa: str
    form: tuple[str, bool, bool]

    def __str__(self) -> str:
        graph = "last logits" if self.keep else "all logits"
        fits, twelve_bits, in_place = self.form
        storage = "in place" if in_place else "12 bits" if twelve_bits else fits
        return f"{graph}, {self.isa or 'this CPU'}, weights {storage}"


@dataclass
class Outcome:
    """Guarded by a lock of the prewarm while it runs."""

    keys: set[str] = field(default_factory=set)  # every kernel that the units need
    fresh: set[str] = field(default_factory=set)  # not in the cache before; in a check, missing
    plans: dict[str, bool] = field(default_factory=dict)  # keys; whether one was there
    names: dict[str, str] = field(default_factory=dict)  # of the fresh ones
    poison: set[str] = field(default_factory=set)  # kernels that a worker did not survive
    failed: list[dict[str, Any]] = field(default_factory=list)  # what (first), reason, count
    units_done: int = 0


def prewarm(
    model: str,
    dtype: str | None = None,
    isas: Sequence[str] = ("",),
    jobs: int = 1,
    timeout: float = 600,
    pack: str | None = None,
    progress: Callable[[int, int, int], Any] = lambda done, total, kernels: None,
    kv_cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Emits and stores the kernels of a model (shapes.py says what `model` may be, or a .pt2 file,
    or a plan of the cache).

    isas: rungs, "" for this CPU. jobs: processes at once. timeout: seconds without progress after
    which a worker is ended; a tenth of it for one kernel. pack: also write all kernels into this
    file, and into it alone if the cache is off. progress: called with units done, units, kernels
    emitted. kv_cache_dtype: as of `llm.optimize`.

    Returns counts; `failed` lists what could not be made, with reasons. Raises NotPrewarmedError,
    or CoreError for an unknown rung.
    """
    start = time.perf_counter()
    state = core.engine().cache_state()
    usable = state["writable"] and not state["problem"]
    if not usable and pack is None:
        why = state["problem"] or "TILEWRIGHT_CACHE is not rw"
        raise NotPrewarmedError(f"the kernel cache cannot be filled: {why}")
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if kv_cache_dtype is not None:
            environment["TILEWRIGHT_KV_CACHE"] = kv_cache_dtype
        directory = state["directory"]
        if not usable:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tilewright-"))
            environment |= {"TILEWRIGHT_CACHE": "rw", "TILEWRIGHT_CACHE_DIR": directory}
        outcome = _run(model, dtype, isas, jobs, timeout, False, environment, progress)
        if not outcome.keys:
            raise NotPrewarmedError("{what}: {reason}".format(**outcome.failed[0]))
        result = {
            "kernels": len(outcome.keys),
            "emitted": len(outcome.fresh & outcome.keys),
            "loaded": len(outcome.keys - outcome.fresh),
            "plans": len(outcome.plans),
            "isa": [_isa_name(isa) for isa in isas],
            "directory": directory if usable else "",
            "failed": outcome.failed,
        }
        if pack is not None:
            packs = [row["name"] for row in state["packs"] if not row["problem"]]
            data = _core.encode_pack(
                [directory, *packs], sorted(outcome.keys | outcome.plans.keys())
            )
            result["pack"] = write_pack(Path(pack), data) | {"kernels": len(outcome.keys)}
    result["seconds"] = time.perf_counter() - start
    return result


def check(
    model: str,
    dtype: str | None = None,
    isas: Sequence[str] = ("",),
    jobs: int = 1,
    timeout: float = 600,
    progress: Callable[[int, int, int], Any] = lambda done, total, kernels: None,
) -> dict[str, Any]:
    """Which of a model's kernels the cache and the packs of the environment do not have."""
    environment = dict(os.environ)
    if environment.get("TILEWRIGHT_CACHE", "rw") == "rw":
        environment["TILEWRIGHT_CACHE"] = "ro"
    outcome = _run(model, dtype, isas, jobs, timeout, True, environment, progress)
    return {
        "kernels": len(outcome.keys),
        "missing": [{"name": outcome.names[key], "key": key} for key in sorted(outcome.fresh)],
        "plans": len(outcome.plans),
        "missing_plans": sorted(key for key, there in outcome.plans.items() if not there),
        "isa": [_isa_name(isa) for isa in isas],
        "failed": outcome.failed,
    }


def write_pack(path: Path, data: bytes) -> dict[str, Any]:
    """Puts a sealed pack in place, whole or not at all, read-only."""
    path = path.absolute()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
        try:
            file.write(data)
            os.fchmod(file.fileno(), 0o444)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return {
        "file": str(path),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _isa_name(isa: str) -> str:
    return isa or str(core.engine().target()["isa"])


def _run(
    model: str,
    dtype: str | None,
    isas: Sequence[str],
    jobs: int,
    timeout: float,
    checking: bool,
    environment: dict[str, str],
    progress: Callable[[int, int, int], Any],
) -> Outcome:
    for isa in isas:
        if isa:
            core.engine_for(isa)  # CoreError for an unknown one
    keeps = KEEPS[:1] if model.endswith((".pt2", recorded.SUFFIX)) else KEEPS
    every = [(keep, isa, form) for keep in keeps for isa in isas for form in FORMS]
    units = [Unit(i, *what) for i, what in enumerate(every)]
    jobs = max(1, min(jobs, len(units)))
    run = _Prewarm(model, dtype, timeout, checking, environment, len(units), progress)
    shares = [units[i * len(units) // jobs : (i + 1) * len(units) // jobs] for i in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run.finish, share) for share in shares]
        try:
            for future in futures:
                future.result()
        except BaseException:
            run.stop.set()
            raise
    return run.outcome


@dataclass
class _At:
    """What a worker was doing when it was last heard of."""

    stage: str = "load"
    unit: int | None = None
    kernel: str | None = None


class _Prewarm:
    def __init__(
        self,
        model: str,
        dtype: str | None,
        timeout: float,
        checking: bool,
        environment: dict[str, str],
        total: int,
        progress: Callable[[int, int, int], Any],
    ) -> None:
        self.outcome = Outcome()
        self.stop = threading.Event()
        self._job = {"model": model, "dtype": dtype, "check": checking}
        self._timeout = timeout
        self._environment = environment
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()
        progress(0, total, 0)

    def finish(self, units: Sequence[Unit]) -> None:
        """Goes through units, with as many workers as it takes, one after the other."""
        left = {unit.index: unit for unit in units}
        while left and not self.stop.is_set():
            at = _At()
            end = self._worker(left, at)
            if left and not self.stop.is_set():
                self._give_up(left, at, end)

    def _give_up(self, left: dict[int, Unit], at: _At, end: str) -> None:
        """A worker ended before its units: what it was at is left out from now on."""
        with self._lock:
            if at.kernel is not None:
                self.outcome.poison.add(at.kernel)
                what = f"kernel {self.outcome.names[at.kernel]} ({_first_line(at.kernel)})"
                self._fail(what, end)
                return
            if at.unit is None or at.stage == "load":
                lost = list(left.values())
                what = str(self._job["model"])
            elif at.stage == "capture":
                keep = left[at.unit].keep
                lost = [unit for unit in left.values() if unit.keep == keep]
                what = f"capture of {'the last' if keep else 'all'} logits"
            else:
                lost = [left[at.unit]]
                what = str(left[at.unit])
            self._fail(what, end)
            for unit in lost:
                self._finished(left, unit.index)

    def _fail(self, what: str, reason: str) -> None:
        """Units that fail for one reason are one failure."""
        for known in self.outcome.failed:
            if known["reason"] == reason:
                known["count"] += 1
                return
        self.outcome.failed.append({"what": what, "reason": reason, "count": 1})

    def _finished(self, left: dict[int, Unit], index: int) -> None:
        del left[index]
        self.outcome.units_done += 1
        self._progress(self.outcome.units_done, self._total, len(self.outcome.fresh))

    def _worker(self, left: dict[int, Unit], at: _At) -> str:
        """One worker over what is left. Returns how it ended."""
        with self._lock:
            poison = sorted(self.outcome.poison)
        units = [dataclasses.asdict(unit) for unit in left.values()]
        job = self._job | {"units": units, "poison": poison}
        receive, send = os.pipe()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(send)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=(send,),
                env=self._environment,
            )
            os.close(send)
            assert process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                    stdin.write(json.dumps(job).encode())
                for message in self._messages(receive, at):
                    self._take(message, left, at)
                process.wait(SILENCE_SECONDS)
                return _ending(process.returncode, errors)
            except (TimeoutError, subprocess.TimeoutExpired) as error:
                return str(error)
            finally:
                process.kill()
                process.wait()

    def _take(self, message: dict[str, Any], left: dict[int, Unit], at: _At) -> None:
        with self._lock:
            if "at" in message:
                at.stage, at.unit, at.kernel = message["at"], message["unit"], None
            elif "kernel" in message:
                key = message["kernel"]
                at.kernel = None if self._job["check"] else key
                self.outcome.fresh.add(key)
                self.outcome.names[key] = message["name"]
                self._progress(self.outcome.units_done, self._total, len(self.outcome.fresh))
            elif "plan" in message:
                self.outcome.plans.setdefault(message["plan"], message["there"])
            elif "done" in message:
                self.outcome.keys.update(message["keys"])
                at.kernel = at.unit = None
                at.stage = "unit"
                self._finished(left, message["done"])
            elif "failed" in message:
                self._fail(str(left[message["failed"]]), message["reason"])
                at.kernel = None
                self._finished(left, message["failed"])

    def _messages(self, receive: int, at: _At) -> Iterator[dict[str, Any]]:
        """Until the worker closes its end. TimeoutError if it does not get on."""
        lines: queue.Queue[bytes | None] = queue.Queue()

        def read() -> None:
            with os.fdopen(receive, "rb") as file:
                for line in file:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        # Seconds are counted in what was seen, so that a machine that was suspended ages nobody.
        silent, beats = 0, 0
        while not self.stop.is_set():
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                silent += 1
                if silent >= SILENCE_SECONDS:
                    raise TimeoutError(f"not heard of for {silent} s") from None
                continue
            silent = 0
            if line is None:
                return
            message = json.loads(line)
            if "beat" not in message:
                beats = 0
                yield message
                continue
            beats += 1
            limit = self._timeout if at.kernel is None else self._timeout / 10
            if beats * prewarm_worker.BEAT_SECONDS > limit:
                raise TimeoutError(f"no progress in {limit:g} s")


def _ending(code: int, errors: Any) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"ended with exit code {code}"


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
