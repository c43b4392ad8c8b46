"""What the Python tests share: a kernel cache of their own, and fresh processes.

Tested by the tests that use it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]

# Where the package is not installed, its pure Python parts can still be tested from the sources.
if importlib.util.find_spec("tilewright") is None:
    sys.path.insert(0, str(SOURCE / "frontends" / "torch"))

# Settings are read once, when tilewright is imported: the tests' cache must be named before that.
# A cache that the caller names is used as it is.
_own_cache = tempfile.TemporaryDirectory(prefix="tilewright-tests-")
os.environ.setdefault("TILEWRIGHT_CACHE_DIR", os.path.join(_own_cache.name, "cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def source_directory() -> Path:
    """The root of the source tree."""
    return SOURCE


@pytest.fixture
def fresh_cache(tmp_path: Path) -> Path:
    """The path of a cache directory that does not exist yet."""
    return tmp_path / "kernel-cache"


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> Iterator[RunPython]:
    """Runs Python code in a new process and checks that it succeeds, unless check=False."""

    def run(
        code: str,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    yield run
