"""The order of measurements: A B B A rounds between probes of the machine.

One round measures every system twice, forwards and then backwards, and yields one number each: the
mean of the two, in which a linear drift is the same for all. A round in which the machine's limits
moved by more than 10 % is dropped and tried again, at most `retries` times in all.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MOVEMENT = 0.10


class Probe(Protocol):
    """What tells whether the machine held still."""

    def read(self) -> Mapping[str, float]: ...


@dataclass
class Sample:
    """One generation: until the first token, and per further token."""

    prefill: float
    decode: float


@dataclass
class Rounds:
    """What was kept, and what it cost."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    probes: list[Mapping[str, float]] = field(default_factory=list)
    kept: int = 0
    dropped: int = 0
    movements: list[float] = field(default_factory=list)


def movement(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest relative change of any limit."""
    return max((abs(after[name] / before[name] - 1) for name in before), default=0.0)


def run_rounds(
    names: Sequence[str],
    measure: Callable[[str], Sample],
    probe: Probe,
    count: int,
    retries: int = 3,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Rounds:
    """`count` kept rounds, or fewer when the retries or the time are used up."""
    result = Rounds({name: [] for name in names})
    attempts = count + retries
    while result.kept < count and result.kept + result.dropped < attempts:
        if out_of_time() and result.kept + result.dropped > 0:
            break
        before = probe.read()
        measured: dict[str, list[Sample]] = {name: [] for name in names}
        # Alternate which system is at the ends of the round: neighbours differ otherwise.
        order = list(names) if result.kept % 2 == 0 else list(reversed(names))
        for name in [*order, *reversed(order)]:
            measured[name].append(measure(name))
        after = probe.read()
        moved = movement(before, after)
        result.movements.append(moved)
        if moved > MOVEMENT:
            result.dropped += 1
            continue
        result.kept += 1
        result.probes += [before, after]
        for name, samples in measured.items():
            result.samples[name].append(
                Sample(
                    sum(sample.prefill for sample in samples) / len(samples),
                    sum(sample.decode for sample in samples) / len(samples),
                )
            )
    return result
