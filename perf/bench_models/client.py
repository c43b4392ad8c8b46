"""A system's process, asked over pipes: one line of JSON there, one line back.

The process is stopped (SIGSTOP) whenever it is not asked, so that all systems stay loaded while no
spinning worker thread of one disturbs another. It runs on the first CPUs only.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench_models import places
from bench_models.systems import SYSTEMS


class WorkerError(Exception):
    """The system could not; the message is the reason."""


def environment_of(name: str, threads: int, caches: Path, build: Path | None) -> dict[str, str]:
    """The variables of a worker: the same for all, and the system's own. `build`: a directory that
    holds the package tilewright to use instead of the installed one."""
    system = SYSTEMS[name]
    keep = ("HOME", "PATH", "LANG", "XDG_CACHE_HOME", "BENCH_HOME", "LD_LIBRARY_PATH")
    result = {key: os.environ[key] for key in keep if key in os.environ}
    path = [str(places.PERF), *([str(build)] if build else [])]
    if system.environment == "project":
        path += [part for part in os.environ.get("PYTHONPATH", "").split(":") if part]
        result |= {k: v for k, v in os.environ.items() if k.startswith("TILEWRIGHT_")}
    result |= {
        "PYTHONPATH": ":".join(path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TILEWRIGHT_CACHE_DIR": str(caches / "tilewright"),
        "BENCH_CACHE_DIR": str(caches / "other"),
        "XDG_CACHE_HOME": str(caches / "user"),
        "BENCH_THREADS": str(threads),
    }
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    result["BENCH_CPUS"] = ",".join(map(str, cpus))
    return result | dict(system.settings)


def _prepare_child(cpus: list[int]) -> None:
    """Pins the process, and lets it die with its parent, even while it is stopped."""
    os.sched_setaffinity(0, cpus)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Worker:
    """One process of one system."""

    def __init__(
        self, name: str, threads: int, caches: Path, log: Path, build: Path | None = None
    ) -> None:
        python = places.python_of(SYSTEMS[name].environment)
        if not python.exists():
            raise WorkerError(f"not set up: run ./dev bench setup {SYSTEMS[name].environment}")
        caches.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = log
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        self._spawned = time.time()
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(python), "-m", "bench_models.worker", SYSTEMS[name].module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment_of(name, threads, caches, build),
                preexec_fn=lambda: _prepare_child(cpus),
                start_new_session=True,
            )
        self._buffer = b""

    def ask(self, request: dict[str, Any], seconds: float = 900) -> dict[str, Any]:
        """One request; the process runs only meanwhile."""
        request = {"spawned": self._spawned, **request}
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(seconds)
        except BrokenPipeError:
            line = b""
        self._signal(signal.SIGSTOP)
        if not line:
            raise WorkerError(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _read_line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                self.close()
                raise WorkerError(f"no answer within {seconds:.0f} s")
            part = os.read(file, 1 << 20)
            if not part:
                return b""
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        """To the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _epitaph(self) -> str:
        """Why a process that ended did."""
        self.close()
        code = self._process.returncode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with {how}: {lines[-1][:200] if lines else 'no message'}"

    def close(self) -> None:
        """Ends the process and what it started."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._signal(signal.SIGKILL)  # children that outlived it
