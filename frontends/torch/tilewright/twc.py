"""`twc` as an installed command: runs the packaged binary.

The binary uses the OpenMP runtime that torch ships, so that a machine without libgomp can run it.

Tested by tests/python/test_wheel.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def main() -> None:
    binary = Path(__file__).parent / "bin" / "twc"
    if not binary.exists():
        sys.exit(f"twc: {binary} is missing; install the package again")
    torch = importlib.util.find_spec("torch")  # finds it without the seconds that importing takes
    if torch is not None and torch.origin is not None:
        libraries = [str(Path(torch.origin).parent / "lib")]
        if before := os.environ.get("LD_LIBRARY_PATH"):
            libraries.append(before)
        os.environ["LD_LIBRARY_PATH"] = ":".join(libraries)
    os.execv(binary, [str(binary), *sys.argv[1:]])
