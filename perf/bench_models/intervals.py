"""Medians of paired ratios, with bootstrap intervals.

Why ratios of neighbours: a shared machine changes by 2x within minutes, and what changes slowly
cancels in the ratio of two measurements taken one after the other in the order A B B A.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median and where it may lie (95 %)."""

    median: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The median of the values and its percentile bootstrap interval.

    Below six values the percentiles of resampled medians are too narrow to be honest; the interval
    is then the whole range.
    """
    if not values:
        raise ValueError("no values")
    middle = statistics.median(values)
    if len(values) < 6:
        return Interval(middle, min(values), max(values), len(values))
    generator = random.Random(seed)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    tail = RESAMPLES // 40
    return Interval(middle, medians[tail], medians[-1 - tail], len(values))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Of neighbours, pair by pair."""
    return bootstrap([n / d for n, d in zip(numerators, denominators, strict=True)])
