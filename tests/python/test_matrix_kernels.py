"""Linear kernels of the 16-bit matrix instructions, proved from their bytes on any machine.

kernel_dump gives whole kernels (vdpbf16ps, AMX, and fp32 by AMX) with memory before and after the
VIR interpreter ran them. avx512_machine executes the bytes, which must leave the same memory; and
the products are compared with numpy's in fp64 and with PyTorch's fp32. Run as a program, it prints
the errors of fp32 by AMX and of PyTorch.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from amx_instructions import STEPS
from avx512_machine import Machine
from emitted_code import kernel_dump, tool

BASE, DISTANCE = 0x1000_0000, 0x100_0000


def linear_kernels() -> list[dict[str, Any]]:
    return [kernel for kernel in kernel_dump() if "shape" in kernel]


def matrix(kernel: dict[str, Any], name: str, rows: int, columns: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(kernel[name]), np.float32).reshape(rows, columns)


def operands(kernel: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m, n, k = kernel["shape"]
    return matrix(kernel, "x", m, k), matrix(kernel, "w", n, k), matrix(kernel, "y", m, n)


def test_the_bytes_do_what_the_interpreter_does() -> None:
    steps = {"linear_avx512_bf16": 0, "linear_amx_bf16": 0, "linear_amx_fp32": 0, "tile_pack": 0}
    for kernel in kernel_dump():
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


# --- the error of fp32 by tiles, beside that of PyTorch

ROWS, COLUMNS, SEEDS = 11, 64, 3
Matrices = tuple[np.ndarray, np.ndarray]


def cancelling(random: np.random.Generator, k: int) -> Matrices:
    """Of two neighbours 1e-4 is left."""
    x = 1 + 1e-4 * random.standard_normal((ROWS, k))
    w = np.repeat(random.standard_normal((COLUMNS, k // 2)), 2, axis=1)
    return x * (-1.0) ** np.arange(k), w


def of_many_sizes(random: np.random.Generator, rows: int, k: int) -> np.ndarray:
    return random.standard_normal((rows, k)) * 10 ** random.uniform(-6, 6, (rows, k))


def normal(random: np.random.Generator, k: int, x_scale: float = 1, w_scale: float = 1) -> Matrices:
    x, w = random.standard_normal((ROWS, k)), random.standard_normal((COLUMNS, k))
    return x * x_scale, w * w_scale


# How x and w are drawn. Sizes of 1e30 by 1e-30 leave the range of tiles: tests/task_test.cpp.
KINDS: dict[str, Callable[[np.random.Generator, int], Matrices]] = {
    "normal": normal,
    "1e18 by 1e-18": lambda random, k: normal(random, k, 1e18, 1e-18),
    "1e30 by 1e-24": lambda random, k: normal(random, k, 1e30, 1e-24),
    "1e-24 by 1e30": lambda random, k: normal(random, k, 1e-24, 1e30),
    "cancellation of neighbours": cancelling,
    "x from 1e-6 to 1e6": lambda random, k: (of_many_sizes(random, ROWS, k), normal(random, k)[1]),
    "x and w from 1e-6 to 1e6": lambda random, k: (
        of_many_sizes(random, ROWS, k),
        of_many_sizes(random, COLUMNS, k),
    ),
    "all positive": lambda random, k: (np.abs(normal(random, k)[0]), np.abs(normal(random, k)[1])),
}


def by_tiles(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x @ w.T by the kernel for the form that w is stored in, in the interpreter."""
    command = [tool("kernel_dump"), "multiply", str(len(x)), str(len(w)), str(x.shape[1])]
    done = subprocess.run(
        command, input=x.tobytes() + w.tobytes(), stdout=subprocess.PIPE, check=True
    )
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), len(w))


def error(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """Root of the mean square, against fp64."""
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    return float(np.sqrt(np.mean((y - exact) ** 2)))


def errors(kind: str, k: int, products: int) -> tuple[float, float]:
    """Ours and PyTorch's, with weights that fit bf16 (three products) or do not (six)."""
    ours, theirs = [], []
    for seed in range(SEEDS):
        drawn = KINDS[kind](np.random.default_rng([seed, k]), k)
        x, w = (matrix.astype(np.float32) for matrix in drawn)
        if products == 3:
            w = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        ours.append(error(by_tiles(x, w), x, w))
        product = torch.from_numpy(x) @ torch.from_numpy(w).T
        theirs.append(error(product.numpy(), x, w))
    return float(np.mean(ours)), float(np.mean(theirs))


@pytest.mark.parametrize("products", [3, 6])
@pytest.mark.parametrize("k", [64, 512, 576, 768, 1024, 1536])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_by_tiles_is_as_exact_as_pytorch(kind: str, k: int, products: int) -> None:
    ours, theirs = errors(kind, k, products)
    assert ours <= theirs


if __name__ == "__main__":  # the table of perf/results/linear-amx.md
    for kind in KINDS:
        for k in (64, 576, 1536, 4096):
            cells = []
            for products in (3, 6):
                ours, theirs = errors(kind, k, products)
                cells.append(f"{ours:.2g} | {theirs:.2g} | {ours / theirs:.2f}")
            print(f"| {kind} | {k} | " + " | ".join(cells) + " |")
