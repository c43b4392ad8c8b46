"""What is measured: cells of model x dtype x prompt x new tokens x batch, and the limits of each.

Definitions. Memory limit of decode: the bytes of all weights that a token reads (head included,
embedding not), plus the keys and values at the middle of the generated part, over the measured read
bandwidth; or its arithmetic over the measured peak, whichever is slower. Prefill limit: the
operations of the linear layers and of the attention that the causal mask leaves, plus one row of
the head per sequence, over the measured peak of the cell's dtype; or one read of the weights.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench_models import gate
from bench_models.models import MODELS, Shape

# Bytes per weight: int4 with a 16-bit scale (and zero) per group of 64.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
CACHE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 2.0, "int4": 2.0}


@dataclass(frozen=True)
class Cell:
    """One measurement for every system."""

    model: str
    dtype: str
    prompt: int
    new: int
    batch: int

    @property
    def shape(self) -> Shape:
        return MODELS[self.model]

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} p{self.prompt} n{self.new} b{self.batch}"


@dataclass(frozen=True)
class Roof:
    """What the machine can do with the arithmetic of a dtype: as measured before a run."""

    read_gb_per_second: float
    peak_gflops: float
    fma_gflops: float  # of fp32

    def beside(self, probes: Sequence[Mapping[str, float]]) -> Roof:
        """What it could do between the rounds of a measurement. A CPU clocks higher for a moment
        than it holds, and others share it: a share of another moment's limit says little. Other
        arithmetic is taken to have moved as FMA did."""
        if not probes:
            return self
        fma = statistics.median(probe["fma_gflops"] for probe in probes)
        return Roof(
            statistics.median(probe["read_gb_per_second"] for probe in probes),
            self.peak_gflops * fma / self.fma_gflops,
            fma,
        )


@dataclass(frozen=True)
class Limit:
    """The least time that the measured machine allows."""

    prefill_seconds: float
    decode_seconds: float
    decode_bytes: float
    prefill_flops: float
    read_gb_per_second: float
    peak_gflops: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def attention_flops(shape: Shape, queries: int, keys_before: int) -> float:
    """Of one sequence in all layers: query i sees keys_before + i + 1 keys, twice (QK and PV)."""
    seen = queries * keys_before + queries * (queries + 1) / 2
    return 4.0 * shape.layers * shape.heads * shape.head_size * seen


def limit_of(cell: Cell, roof: Roof) -> Limit:
    """Both limits of a cell, from what was measured."""
    shape = cell.shape
    bandwidth, peak = roof.read_gb_per_second * 1e9, roof.peak_gflops * 1e9
    weights = shape.read_per_token * WEIGHT_BYTES[cell.dtype]
    context = cell.prompt + cell.new / 2
    per_key = 2 * shape.layers * shape.key_value_heads * shape.head_size * CACHE_BYTES[cell.dtype]
    decode_bytes = weights + cell.batch * context * per_key
    decode_flops = cell.batch * (
        2.0 * shape.read_per_token + attention_flops(shape, 1, int(context))
    )
    head = shape.vocabulary * shape.hidden
    prefill_flops = cell.batch * (
        2.0 * shape.layers * shape.layer_parameters * cell.prompt
        + attention_flops(shape, cell.prompt, 0)
        + 2.0 * head
    )
    return Limit(
        prefill_seconds=max(prefill_flops / peak, weights / bandwidth),
        decode_seconds=max(decode_bytes / bandwidth, decode_flops / peak),
        decode_bytes=decode_bytes,
        prefill_flops=prefill_flops,
        read_gb_per_second=roof.read_gb_per_second,
        peak_gflops=roof.peak_gflops,
    )


def peak_for(dtype: str, arithmetic: list[dict[str, Any]], threads: int) -> float:
    """The best measured rate that a dtype may use on this machine. 16-bit and fp32 products may use
    each other's units (a weight can be widened), integers may use all."""
    usable = {
        "fp32": ("fp32",),
        "bf16": ("fp32", "bf16"),
        "int8": ("fp32", "bf16", "int8"),
        "int4": ("fp32", "bf16", "int8"),
    }[dtype]
    rates = [
        row["gflops"] for row in arithmetic if row["type"] in usable and row["threads"] == threads
    ]
    return max(rates)


def roof_of(dtype: str, limits: dict[str, Any], threads: int) -> Roof:
    """From the probe's JSON."""
    arithmetic = limits["arithmetic"]
    return Roof(
        gate.best_read(limits, threads),
        peak_for(dtype, arithmetic, threads),
        peak_for("fp32", arithmetic, threads),
    )


def quick_cells(arithmetic: list[dict[str, Any]]) -> list[Cell]:
    """For every commit: fp32, and bf16 where the CPU multiplies it. Elsewhere most systems emulate
    it, which takes minutes."""
    has_bf16 = any(row["type"] == "bf16" for row in arithmetic)
    dtypes = ("fp32", "bf16") if has_bf16 else ("fp32",)
    return [Cell("smollm2-135m", dtype, 128, 9, 1) for dtype in dtypes]


def share_of_time(now: float, end: float, groups: int) -> float:
    """Until when the first of these groups of cells may begin rounds: each has the same share."""
    return now + max(0.0, end - now) / groups


FULL = tuple(
    Cell(model, dtype, prompt, 33, batch)
    for model, dtypes in (
        ("smollm2-135m", ("fp32", "bf16", "int8", "int4")),
        ("llama-1b", ("fp32", "bf16", "int8", "int4")),
    )
    for dtype in dtypes
    for prompt, batch in ((512, 1), (128, 4), (128, 16))
)


def make_cells(
    models: list[str], dtypes: list[str], prompts: list[int], new: int, batches: list[int]
) -> list[Cell]:
    """The product; unknown names are errors that say what there is."""
    for name in models:
        if name not in MODELS:
            raise ValueError(f"no model '{name}'; there are {', '.join(MODELS)}")
    for dtype in dtypes:
        if dtype not in WEIGHT_BYTES:
            raise ValueError(f"no dtype '{dtype}'; there are {', '.join(WEIGHT_BYTES)}")
    return [
        Cell(model, dtype, prompt, new, batch)
        for model in models
        for dtype in dtypes
        for prompt in prompts
        for batch in batches
    ]
