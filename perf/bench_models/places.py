"""Where things lie: environments, made models, caches and results; and what is being measured.

Everything big is outside the repository, below $BENCH_HOME or the user's cache.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PERF = Path(__file__).resolve().parent.parent
REPOSITORY = PERF.parent
RESULTS = PERF / "results"


def home() -> Path:
    """The directory of everything that is not committed."""
    given = os.environ.get("BENCH_HOME")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tilewright-bench"


def python_of(environment: str) -> Path:
    """The interpreter of an environment; "project" is the one that runs this."""
    if environment == "project":
        return Path(sys.executable)
    return home() / "venvs" / environment / "bin" / "python"


def commit() -> str:
    """The commit, with + when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The CPU's brand, family, model and stepping: a brand alone may be masked."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = [found.get(key, "?") for key in ("cpu family", "model", "stepping")]
    return f"{found.get('model name', platform.processor())} ({'/'.join(numbers)})"


def machine() -> dict[str, Any]:
    """What a reader must know about the machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "kernel": platform.release(),
    }


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
