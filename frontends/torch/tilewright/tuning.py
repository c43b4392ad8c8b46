"""tune: measures choices of speed (ops/choices.h) on this machine and writes those that win.

Each choice has candidates and a few shapes that it decides about. A shape's programs, one for each
candidate, share packed weights and run in turns, the shipped choice before and after each
candidate, so that what changes slowly on a machine cancels in the ratio. A candidate wins if its
ratio over all shapes lies above 1 with its whole interval, on no shape below 1, and again so when
it is measured a second time: of twenty candidates that are all the same, one wins once by luck.

Nothing of this happens when programs start: they read what was written (ops/machine_profile.h).
Tested by tests/python/test_tune.py.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tilewright import _core, core, operators
from tilewright.graph_text import DTYPE_NAMES

COLD_BYTES = 128 << 20  # of weights, at least: more than most last caches
MOST_COLD_BYTES = 1 << 30
LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
SAMPLE_SECONDS = 0.01  # that a timed piece takes at least
MEGA = 1 << 20
NEVER = (1 << 63) - 1
PLAIN = {"twelve_bits_from": NEVER}
COMPACT = {"twelve_bits_from": 0}


# --- shapes


@functools.cache
def cold_bytes() -> int:
    """Of weights that no cache holds from one use to the next: twice the last one (Emerald Rapids
    has 260 MB of it)."""
    try:
        last = int(LAST_CACHE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        last = 0
    return min(max(COLD_BYTES, 2 * last), MOST_COLD_BYTES)


@dataclass(frozen=True)
class Layers:
    """A chain of linear layers, k -> n -> k ..., of `values` weights or more, for some rows."""

    rows: int
    k: int
    n: int
    dtype: torch.dtype
    values: int = 0  # 0: as many as are cold
    fixed: dict[str, Any] = field(default_factory=dict)  # choices besides the candidate's
    wide: int = 0  # every so many steps of 8 k do not fit 12 bits; 0: all fit
    shares: bool = True  # packed weights do not depend on the candidate
    exact: bool = False  # all fit bf16
    name: str = ""  # what the rest does not say

    def __str__(self) -> str:
        text = f"{self.rows} x {self.k} x {self.n} {DTYPE_NAMES[self.dtype]}"
        if self.values:
            text += f" of {self.values // MEGA} M"
        if self.wide:
            text += f", 1/{self.wide} wide"
        return f"{text} {self.name}".rstrip()

    def constants(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = self.values or cold_bytes() // self.dtype.itemsize
        weights: dict[str, torch.Tensor] = {}
        while sum(weight.numel() for weight in weights.values()) < values:
            n, k = (self.n, self.k) if len(weights) % 2 == 0 else (self.k, self.n)
            weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
            if self.wide:  # all others have one exponent, so nothing is left to chance
                sizes = 1 + torch.rand(n, k, generator=generator)
                weight = torch.copysign(sizes, weight) / math.sqrt(k)
                steps = weight[:, : k // 8 * 8].view(n, k // 8, 8)[:, :: self.wide]
                steps *= torch.exp2(-40 * torch.rand(steps.shape, generator=generator))
            if self.exact:
                weight = weight.to(torch.bfloat16)
            weights[f"w{len(weights)}"] = weight.to(self.dtype)
        return weights

    def graph(self, constants: dict[str, torch.Tensor]) -> str:
        dtype = DTYPE_NAMES[self.dtype]
        lines, last = [], "x"
        for i, (name, weight) in enumerate(constants.items()):
            n, k = weight.shape
            lines.append(f'  %{name} = const "{name}" : {dtype}[{n}, {k}]')
            lines.append(f"  %y{i} = linear(%{last}, %{name})")
            last, width = f"y{i}", n
        return (
            f"graph layers(%x: {dtype}[s, {self.k}]) -> ({dtype}[s, {width}]) {{\n"
            + "\n".join(lines)
            + f"\n  return %{last}\n}}\n"
        )

    def inputs(self) -> list[torch.Tensor]:
        return [torch.randn(self.rows, self.k).to(self.dtype)]

    def caches(self) -> list[_core.KvCache]:
        return []


@dataclass(frozen=True)
class Attention:
    """Some tokens of 32 heads of 64 behind a cache of keys of 8 heads."""

    queries: int
    keys: int
    fixed: dict[str, Any] = field(default_factory=dict)
    shares: bool = True

    def __str__(self) -> str:
        return f"{self.queries} queries x {self.keys} keys"

    def constants(self) -> dict[str, torch.Tensor]:
        return {}

    def graph(self, constants: dict[str, torch.Tensor]) -> str:
        return (
            "graph attend(%q: f32[1, 32, s, 64], %k: f32[1, 8, s, 64], %v: f32[1, 8, s, 64],"
            " %c: cache<f32, 8 x 64>) -> (f32[1, 32, s, 64]) {\n"
            "  %kv = kv_append(%c, %k, %v)\n"
            "  %y = attention(%q, %kv) {causal = true, scale = 0.125}\n"
            "  return %y\n}\n"
        )

    def inputs(self) -> list[torch.Tensor]:
        return [torch.randn(1, heads, self.queries, 64) for heads in (32, 8, 8)]

    def caches(self) -> list[_core.KvCache]:
        cache = _core.KvCache(1, 8, 64, "f32")
        keys, values = torch.randn(8, self.keys, 64), torch.randn(8, self.keys, 64)
        cache.append(self.keys, "f32", keys.data_ptr(), values.data_ptr())
        return [cache]


Shape = Layers | Attention


@dataclass(frozen=True)
class Experiment:
    """A choice, other values for it, and where it matters."""

    choice: str
    candidates: Sequence[Any]
    shapes: Sequence[Shape]


def experiments(lanes: int, tiles: bool) -> list[Experiment]:
    """What there is to measure on a machine whose vectors have so many fp32 lanes, and which has
    AMX or not."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    def layers(rows: int, k: int, n: int, dtype: torch.dtype = f32, **more: Any) -> Layers:
        return Layers(rows, k, n, dtype, **{"fixed": PLAIN, **more})

    def small(values: int) -> Layers:
        return layers(1, 1024, 1024, bf16, values=values, fixed={}, shares=False)

    blocks: dict[int, list[list[int]]] = {
        8: [[6, 4, 2, 1], [6, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]],
        16: [
            [12, 8, 4, 2, 1],
            [12, 8, 6, 4, 3, 2, 1],
            [12, 10, 8, 6, 5, 4, 3, 2, 1],
            [8, 7, 6, 5, 4, 3, 2, 1],
        ],
    }
    most = blocks[lanes][0][0]
    found = [
        Experiment(
            f"row_blocks_avx{2 if lanes == 8 else 512}",
            blocks[lanes],
            [
                *(layers(rows, 2048, 2048) for rows in (3, 4, 5, 4 * most)),
                layers(3, 2048, 2048, bf16),
                layers(3, 2048, 2048, bf16, fixed=COMPACT, name="in 12 bits"),
            ],
        ),
        Experiment(
            "many_blocks", [2, 3, 8, 16], [layers(n * most, 2048, 2048) for n in (2, 3, 6, 12)]
        ),
        Experiment(
            "pack_panels", [3, 16], [layers(16 * most, 2048, n, values=MEGA) for n in (128, 256)]
        ),
        Experiment(
            "packed_x_bytes",
            [MEGA, 4 * MEGA, 8 * MEGA, 16 * MEGA],
            [
                layers(1024, 2048, 2048, values=8 * MEGA),
                layers(512, 8192, 2048, values=32 * MEGA),
            ],
        ),
        Experiment("fewest_chunk_rows", [24, 96], [layers(192, 14336, 512, values=12 * MEGA)]),
        Experiment("most_chunk_rows", [192, 768], [layers(1024, 576, 1536, values=2 * MEGA)]),
        Experiment(
            "prefetch",
            [0, 512, 2048, 4096, 8192],
            [layers(4, 2048, 2048, bf16), layers(4, 2048, 2048)],
        ),
        Experiment(
            "prefetch_block",
            [0, 1024, 8192, 16384],
            [layers(rows, 2048, 2048, dtype) for dtype in (f32, bf16) for rows in (most, 2 * most)],
        ),
        Experiment(
            "prefetch_f16",
            [0, 1024, 2048, 8192],
            [layers(rows, 2048, 2048, f16) for rows in (1, 4)],
        ),
        Experiment(
            "prefetch_row",
            [512, 1024, 2048, 4096, 8192],
            [layers(1, 2048, 2048), layers(1, 2048, 2048, bf16)],
        ),
        Experiment(
            "prefetch_near",
            [0, 512, 1536],
            [
                *(layers(rows, 2048, 2048, bf16) for rows in (1, 4)),
                *(
                    layers(rows, 2048, 2048, bf16, fixed=COMPACT, name="in 12 bits")
                    for rows in (1, 4)
                ),
            ],
        ),
        Experiment("streams_row", [1], [layers(1, 2048, 2048), layers(1, 2048, 2048, bf16)]),
        Experiment(
            "prefetch_twelve_bits",
            [0, 768, 3072, 6144],
            [layers(rows, 2048, 2048, bf16, fixed=COMPACT) for rows in (1, 4)],
        ),
        Experiment(
            "twelve_bits_from",
            [8 * MEGA, 16 * MEGA, 64 * MEGA],
            [small(values * MEGA) for values in (8, 16, 32)],
        ),
        Experiment(
            "twelve_bits_percent",
            [79, 90],
            [
                layers(1, 2048, 2048, bf16, fixed=COMPACT, wide=wide, shares=False)
                for wide in (4, 2)  # 81 and 87.5 % of the size in 16 bits
            ],
        ),
        Experiment("prefetch_keys_level", [0, 1], [Attention(1, 32768)]),
        Experiment("prefetch_only_jumps", [0, 1], [Attention(1, 32768)]),
        Experiment("few_queries", [32, 64], [Attention(queries, 1024) for queries in (24, 48)]),
    ]
    if lanes == 16:
        widths = [layers(1, 2048, 2048), layers(64, 2048, 2048)]
        found.append(Experiment("highest_isa", ["avx2"], widths))
    if tiles:
        three = layers(256, 2048, 2048, exact=True, name="that fit bf16")
        found.append(Experiment("fp32_products", [3, 6], [three, layers(256, 2048, 2048)]))
    return found


# --- measuring


@dataclass(frozen=True)
class Interval:
    """A median and where it lies with 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """By order statistics: the median lies between two of the sorted values by the binomial
    distribution, whatever theirs is. Fewer than six values give their whole range."""
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0
    while 2 * (below := below + math.comb(count, outside) / 2**count) <= 0.05:
        outside += 1
    edge = max(outside - 1, 0)
    return Interval(statistics.median(ordered), ordered[edge], ordered[-1 - edge])


@dataclass(frozen=True)
class Outcome:
    """A candidate against the shipped value; above 1 it is faster."""

    choice: str
    shipped: Any
    candidate: Any
    by_shape: dict[str, Interval]
    overall: Interval

    @property
    def wins(self) -> bool:
        return self.overall.low > 1 and all(ratio.high >= 1 for ratio in self.by_shape.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "choice": self.choice,
            "shipped": self.shipped,
            "candidate": self.candidate,
            "ratio": vars(self.overall),
            "by_shape": {name: vars(ratio) for name, ratio in self.by_shape.items()},
        }


class Runs:
    """A shape's programs: the shipped choices', then one for each candidate."""

    def __init__(self, shape: Shape, choice: str, candidates: Sequence[Any]) -> None:
        self.constants = shape.constants()
        self.inputs = shape.inputs()
        self.caches = shape.caches()
        self.lengths = [cache.length for cache in self.caches]
        text = shape.graph(self.constants)
        views = {
            name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self.constants.items()
        }
        store = _core.WeightStore()
        self.programs = []
        for changes in ({}, *({choice: candidate} for candidate in candidates)):
            engine = core.engine_for("", json.dumps({**shape.fixed, **changes}))
            own = store if shape.shares else _core.WeightStore()
            self.programs.append(engine.compile(text, views, own))
        for index in range(len(self.programs)):
            self.seconds(index, 1)
        once = self.seconds(0, 1)
        self.calls = max(2, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))

    def seconds(self, index: int, calls: int) -> float:
        """Of the fastest call: what else runs on a machine only ever adds to one."""
        handle, threads = self.programs[index].handle, core.threads()
        caches = [cache.handle for cache in self.caches]
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            operators.step(handle, self.inputs, [], caches, False, threads)
            times.append(time.perf_counter() - start)
            for cache, length in zip(self.caches, self.lengths, strict=True):
                cache.truncate(length)
        return min(times)

    def ratios(self) -> list[float]:
        """Shipped over candidate, for each candidate: one round."""
        found = []
        before = self.seconds(0, self.calls)
        for index in range(1, len(self.programs)):
            own = self.seconds(index, self.calls)
            after = self.seconds(0, self.calls)
            found.append((before + after) / 2 / own)
            before = after
        return found


def measure(
    experiment: Experiment, candidates: Sequence[Any], shipped: Any, rounds: int
) -> list[Outcome]:
    """Each candidate over all shapes."""
    by_shape: dict[str, list[list[float]]] = {}  # [round][candidate]
    for shape in experiment.shapes:
        runs = Runs(shape, experiment.choice, candidates)
        by_shape[str(shape)] = [runs.ratios() for _ in range(rounds)]
    outcomes = []
    for index, candidate in enumerate(candidates):
        ratios = {name: [row[index] for row in rows] for name, rows in by_shape.items()}
        overall = [statistics.geometric_mean(row) for row in zip(*ratios.values(), strict=True)]
        outcomes.append(
            Outcome(
                experiment.choice,
                shipped,
                candidate,
                {name: interval(values) for name, values in ratios.items()},
                interval(overall),
            )
        )
    return outcomes


@dataclass
class Tuning:
    """What was measured, and the choices that won: {} if the shipped ones are best."""

    outcomes: list[Outcome] = field(default_factory=list)
    confirmations: list[Outcome] = field(default_factory=list)
    choices: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "confirmations": [outcome.to_dict() for outcome in self.confirmations],
            "choices": self.choices,
        }


def tune(
    wanted: Sequence[Experiment],
    rounds: int,
    advance: Callable[[], Any] = lambda: None,
    measured: Callable[[Experiment, Sequence[Any], Any, int], list[Outcome]] = measure,
) -> Tuning:
    """All experiments; calls advance() after each."""
    shipped = {
        row["name"]: json.loads(row["value"])
        for row in core.engine_for("", "{}").choices()["values"]
    }
    result = Tuning()
    with torch.inference_mode():
        for experiment in wanted:
            value = shipped[experiment.choice]
            others = [candidate for candidate in experiment.candidates if candidate != value]
            outcomes = measured(experiment, others, value, rounds)
            result.outcomes += outcomes
            winners = [outcome for outcome in outcomes if outcome.wins]
            if winners:
                best = max(winners, key=lambda outcome: outcome.overall.median)
                (again,) = measured(experiment, [best.candidate], value, rounds)
                result.confirmations.append(again)
                if again.wins:
                    result.choices[experiment.choice] = best.candidate
            advance()
    return result


# --- the profile


def profile_path() -> Path | None:
    """Where TILEWRIGHT_PROFILE says, or the user's own place; None if there is no such place."""
    named = core.settings()["machine_profile"]
    path = named if named not in ("", "off") else _core.profile_path()
    return Path(path) if path else None


def write_profile(path: Path, tuning: Tuning) -> None:
    """Whole or not at all, readable by this user only. OSError if it cannot be."""
    text = _core.profile_text(json.dumps(tuning.choices), json.dumps(tuning.to_dict()))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".profile-", delete=False
    ) as file:  # mode 0600
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
