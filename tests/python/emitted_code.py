"""Emitted machine code for tests: what the C++ tools emit_dump and kernel_dump write, as values.

Tested by the tests that use it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class EmittedCode:
    """One kernel's bytes and, when it is a case, the memory before and after it ran."""

    name: str
    rung: str
    isa: frozenset[str]  # the steps that the code declares to need
    code: bytes  # instructions, then padding and constants
    code_size: int
    spills: int
    input: bytes = b""
    area: bytes = b""
    output_size: int = 0
    expected_area: bytes = b""
    expected_output: bytes = b""
    float_result: bool = False


def tool(name: str) -> Path:
    """A C++ tool from TILEWRIGHT_BUILD_DIR, or from the build directory of ./dev test."""
    build = Path(os.environ.get("TILEWRIGHT_BUILD_DIR", SOURCE / "build" / "dev"))
    path = build / "tests" / name
    if not path.exists():
        pytest.skip(f"{path} is not built: run ./dev test, or name TILEWRIGHT_BUILD_DIR")
    return path


@cache
def kernel_dump() -> list[dict[str, Any]]:
    """Runs kernel_dump: whole linear kernels; its opening comment names the fields."""
    output = subprocess.run([tool("kernel_dump")], stdout=subprocess.PIPE, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def emit_dump(*arguments: str) -> Iterator[EmittedCode]:
    """Runs emit_dump."""
    output = subprocess.run(
        [tool("emit_dump"), *arguments], stdout=subprocess.PIPE, check=True
    ).stdout
    for line in output.splitlines():
        fields = json.loads(line)
        for key in ("code", "input", "area", "expected_area", "expected_output"):
            if key in fields:
                fields[key] = bytes.fromhex(fields[key])
        isa = fields.pop("isa")
        yield EmittedCode(isa=frozenset() if isa == "none" else frozenset(isa.split("+")), **fields)
