"""The order of measurements: blocks A B B A between probes of the machine, in rounds over systems.

A block measures a system beside the baseline (the first system), twice each, forwards and
backwards, and yields one number for each: the mean of the two, in which a linear drift is the same
for both. A block across which the limits moved by more than 10 % is dropped and tried again: the
machine's, or those of what is measured, which is not slower for a memory that arithmetic does not
wait for. Blocks, not rounds, are dropped: a round over nine systems takes minutes, and no shared
machine holds still that long. The price is that the baseline runs in every block.
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
class Blocks:
    """One system's kept blocks: its own numbers, and the baseline's beside each; and those of the
    blocks that were dropped, in pairs."""

    own: list[Sample] = field(default_factory=list)
    baseline: list[Sample] = field(default_factory=list)
    unsteady: list[tuple[Sample, Sample]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return len(self.own)

    @property
    def dropped(self) -> int:
        return len(self.unsteady)


@dataclass
class Rounds:
    """What was kept, and what it cost. The baseline's own blocks are those of all others."""

    blocks: dict[str, Blocks]
    probes: list[Mapping[str, float]] = field(default_factory=list)
    movements: list[float] = field(default_factory=list)


def _as_they_are(limits: Mapping[str, float]) -> Mapping[str, float]:
    return limits


def movement(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The largest relative change of any limit."""
    return max((abs(after[name] / before[name] - 1) for name in before), default=0.0)


def _mean(samples: Sequence[Sample]) -> Sample:
    return Sample(
        sum(sample.prefill for sample in samples) / len(samples),
        sum(sample.decode for sample in samples) / len(samples),
    )


def run_rounds(
    names: Sequence[str],
    measure: Callable[[str], Sample | None],
    probe: Probe,
    count: int,
    retries: int = 3,
    out_of_time: Callable[[], bool] = lambda: False,
    limits: Callable[[Mapping[str, float]], Mapping[str, float]] = _as_they_are,
) -> Rounds:
    """`count` kept blocks of each system, or fewer when its retries or the time are used up; a
    system without any gets a second chance even then. A system for which `measure` has no sample
    any more is left out from there on; without the baseline nothing is left to measure. `limits`:
    those of what is measured, by a probe's answer."""
    if not names:
        return Rounds({})
    baseline, *others = names
    found = {name: Blocks() for name in others or [baseline]}
    result = Rounds(found)
    gone: set[str] = set()

    def wants_more(name: str) -> bool:
        if gone & {name, baseline}:
            return False
        blocks = found[name]
        tried = blocks.kept + blocks.dropped
        if out_of_time() and (blocks.kept > 0 or tried > 1):
            return False
        return blocks.kept < count and tried < count + retries

    before = probe.read()
    while pending := [name for name in found if wants_more(name)]:
        for name in pending:
            if not wants_more(name):  # time may have run out since
                continue
            blocks = found[name]
            # Alternate who is at the ends of the block: neighbours differ otherwise.
            pair = (baseline, name) if blocks.kept % 2 == 0 else (name, baseline)
            measured: dict[str, list[Sample]] = {baseline: [], name: []}
            for turn in (*pair, *reversed(pair)):
                sample = measure(turn)
                if sample is None:
                    gone.add(turn)
                    break
                measured[turn].append(sample)
            if gone & {name, baseline}:
                continue
            after = probe.read()
            moved = movement(limits(before), limits(after))
            result.movements.append(moved)
            own, beside = _mean(measured[name]), _mean(measured[baseline])
            if moved > MOVEMENT:
                blocks.unsteady.append((own, beside))
            else:
                blocks.own.append(own)
                blocks.baseline.append(beside)
                result.probes += [before, after]
            before = after
    if others:
        kept = [sample for blocks in found.values() for sample in blocks.baseline]
        unsteady = [(sample, sample) for each in found.values() for _, sample in each.unsteady]
        result.blocks = {baseline: Blocks(kept, kept, unsteady), **found}
    return result
