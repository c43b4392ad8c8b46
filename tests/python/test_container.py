"""The example of a prewarmed image: read-only root, no home, a user that does not exist, and not a
kernel emitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")


def test_a_prewarmed_image_emits_nothing(source_directory: Path, model_directory: Path) -> None:
    missing = [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} (util-linux) missing")
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-o", "remount,bind,ro", "/"], capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip(f"no mount namespaces here: {probe.stderr.decode().strip()}")
    binaries = Path(sys.executable).parent
    if not (binaries / "tilewright").exists():
        pytest.skip("the command tilewright is not installed")
    # pytest's directories and the weights that transformers saves are for their owner only.
    subprocess.run(["chmod", "-R", "a+rX", str(model_directory)], check=True)
    done = subprocess.run(
        [str(source_directory / "examples/container/rehearse.sh"), str(model_directory)],
        env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["emitted"] == 0
    assert found["loaded"] == found["pack_hits"] - 1 > 0  # the other one is its plan
    assert "tilewright: " not in done.stderr and "Traceback" not in done.stderr
