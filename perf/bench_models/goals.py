"""What matmul is to reach on each kind of machine, and where a record of `bench ops` stands.

Shares are of the limit that the machine sets in the same run: the time of reading the bytes as
given (12 bits and exact weights can pass 1), or of the operations at the peak of the dtype,
whichever is longer. Ratios are to the better of ATen and oneDNN. Tested by
tests/python/test_bench_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goal:
    """Of the cases that `fits` takes: record of a case -> bool."""

    title: str
    share: float  # 0: none
    ratio: float
    fits: Callable[[dict[str, Any]], bool]
    isa: str = ""  # only where the machine has it
    without: str = ""  # only where it has not


@dataclass
class Standing:
    """Where a record stands: nothing but a reason if no case tells."""

    goal: Goal
    reason: str = ""
    shares: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def _of(dtype: str, low: int, high: int, form: str = "") -> Callable[[dict[str, Any]], bool]:
    def fits(row: dict[str, Any]) -> bool:
        return (
            row["set"] == "matmul"
            and row["dtype"] == dtype
            and low <= row["rows"] <= high
            and row.get("form", "") == form
        )

    return fits


MANY = 1 << 30
GOALS = (
    Goal("fp32 by FMA, M >= 128, cold", 0.90, 1.15, _of("fp32", 128, MANY)),
    Goal("fp32 by FMA, M >= 128, warm", 0.90, 1.03, _of("fp32", 128, MANY, "warm")),
    Goal("bf16 by AMX, warm", 0.80, 1.3, _of("bf16", 256, MANY, "warm bf16"), "amx_bf16"),
    Goal("bf16 by AMX, M = 512, cold", 0.70, 2.2, _of("bf16", 512, 512), "amx_bf16"),
    Goal("bf16 by vdpbf16ps, M >= 128", 0.85, 1.05, _of("bf16", 128, MANY), "avx512_bf16",
         "amx_bf16"),
    Goal("fp32 by AMX, exact weights", 2.5, 2.5, _of("fp32", 256, MANY, "exact by AMX"),
         "amx_bf16"),
    Goal("fp32 by AMX, any weights", 1.4, 1.4, _of("fp32", 256, MANY, "by AMX"), "amx_bf16"),
    Goal("GEMV fp32", 0.95, 0.98, _of("fp32", 1, 1)),
    Goal("M <= 4, bf16 in 16 bits", 0.92, 1.3, _of("bf16", 1, 4, "16 bits")),
    Goal("GEMV bf16 in 12 bits", 1.15, 1.2, _of("bf16", 1, 1, "12 bits")),
    Goal("GEMV fp32, exact weights", 2.2, 2.2, _of("fp32", 1, 1, "exact")),
    Goal("M = 5 to 32", 0.0, 1.2, lambda row: row["set"] == "matmul" and 5 <= row["rows"] <= 32),
)  # fmt: skip


def standing(record: dict[str, Any]) -> list[Standing]:
    """One for each goal, in order."""
    return [_standing(goal, record) for goal in GOALS]


def _standing(goal: Goal, record: dict[str, Any]) -> Standing:
    isa = record["isa"]
    if goal.isa and goal.isa not in isa:
        return Standing(goal, f"this machine has no {goal.isa}")
    if goal.without and goal.without in isa:
        return Standing(goal, f"this machine has {goal.without}")
    found = Standing(goal)
    for row in filter(goal.fits, record["cases"]):
        implementations = row["implementations"]
        share = implementations["tilewright"].get("share_of_limit")
        ratios = [
            implementations[peer]["ratio"]["median"]
            for peer in ("aten", "onednn")
            if "ratio" in implementations.get(peer, {})
        ]
        if share is None or not ratios:
            continue
        found.shares.append(share)
        found.ratios.append(min(ratios))
    if not found.shares:
        found.reason = "no case was measured"
    return found
