"""Linear kernels of the 16-bit matrix instructions, proved from their bytes on any machine.

kernel_dump gives whole kernels (vdpbf16ps, AMX, and fp32 by AMX) with memory before and after the
VIR interpreter ran them. avx512_machine executes the bytes, which must leave the same memory; and
the products are compared with numpy's in fp64 and with PyTorch's fp32.
"""

from __future__ import annotations

import json
import struct
import subprocess
from functools import cache
from typing import Any

import numpy as np
import torch

from amx_instructions import STEPS
from avx512_machine import Machine
from emitted_code import tool

BASE, DISTANCE = 0x1000_0000, 0x100_0000


@cache
def kernels() -> list[dict[str, Any]]:
    output = subprocess.run([tool("kernel_dump")], stdout=subprocess.PIPE, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def linear_kernels() -> list[dict[str, Any]]:
    return [kernel for kernel in kernels() if "shape" in kernel]


def matrix(kernel: dict[str, Any], name: str, rows: int, columns: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(kernel[name]), np.float32).reshape(rows, columns)


def operands(kernel: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m, n, k = kernel["shape"]
    return matrix(kernel, "x", m, k), matrix(kernel, "w", n, k), matrix(kernel, "y", m, n)


def test_the_bytes_do_what_the_interpreter_does() -> None:
    steps = {"linear_avx512_bf16": 0, "linear_amx_bf16": 0, "linear_amx_fp32": 0, "tile_pack": 0}
    for kernel in kernels():
        machine = Machine(bytes.fromhex(kernel["code"]), kernel["code_size"], STEPS)
        places = [BASE + (i + 1) * DISTANCE for i in range(len(kernel["memory"]))]
        regions = [
            machine.memory.map(place, bytes.fromhex(region["before"]), writable=True)
            for place, region in zip(places, kernel["memory"], strict=True)
        ]
        args = [number if at < 0 else places[at] + number for at, number in kernel["args"]]
        machine.memory.map(BASE, struct.pack(f"<{len(args)}q", *args), writable=False)
        machine.run(BASE)
        for region, content in zip(kernel["memory"], regions, strict=True):
            assert bytes(content) == bytes.fromhex(region["after"]), kernel["name"]
        steps[kernel["name"].split(".")[0]] += 1
        assert set(kernel["isa"].split("+")) <= {"avx2", "avx512", kernel["rung"]}
    assert all(steps.values()), "each kind of kernel"


def test_the_products_are_those_of_fp64() -> None:
    for kernel in linear_kernels():
        x, w, y = operands(kernel)
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        bound = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
        assert (np.abs(y - exact) <= bound * x.shape[1] * 2.0**-24).all(), kernel["name"]


def test_fp32_by_tiles_is_as_exact_as_pytorch() -> None:
    (kernel,) = (k for k in linear_kernels() if k["name"].startswith("linear_amx_fp32"))
    x, w, y = operands(kernel)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    theirs = (torch.from_numpy(x.copy()) @ torch.from_numpy(w.copy()).T).numpy()

    def error(result: np.ndarray) -> float:
        return float(np.sqrt(np.mean((result - exact) ** 2)))

    assert error(y) <= error(theirs)
