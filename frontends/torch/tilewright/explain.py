"""explain(model): what ran in our kernels, what did not, and why. Counted while running.

Tested by tests/python/test_explain.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tilewright import core
from tilewright.program import Executable

PHASES = ("prefill", "decode")
_COUNTS = (
    "runs",
    "steps",
    "fallback_calls",
    "onednn_calls",
    "layers",
    "layer_steps",
    "own_flops",
    "fallback_flops",
    "own_seconds",
    "fallback_seconds",
)


@dataclass
class Explanation:
    """`print` it, or take `to_dict()`."""

    model: str
    regions: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls of PyTorch's forward
    problem: str = ""  # why everything runs in PyTorch, in this process
    by_parts: str = ""  # why the model is no single program, but graphs of torch.compile
    kv_cache: str = ""  # the type of keys and values, if it is not the model's
    not_stored: str = ""  # why it is the model's although another was asked for
    kernels_emitted: int = 0
    kernels_loaded: int = 0
    emit_seconds: float = 0.0
    captured: int = 0  # models of this process: traced, or taken from plans in the cache
    planned: int = 0
    weights_packed: int = 0  # of this process, as the kernels
    weights_mapped: int = 0
    target: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)  # of speed: values and their source
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def own_flops_share(self) -> float:
        """The smaller of the phases that ran; 0 if nothing did."""
        shares = [phase["own_flops_share"] for phase in self.phases.values() if phase["runs"]]
        return min(shares, default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "own_flops_share": self.own_flops_share,
            "kernels_emitted": self.kernels_emitted,
            "kernels_loaded": self.kernels_loaded,
            "emit_seconds": self.emit_seconds,
            "captured": self.captured,
            "planned": self.planned,
            "weights_packed": self.weights_packed,
            "weights_mapped": self.weights_mapped,
            "phases": self.phases,
            "problem": self.problem,
            "fallbacks": self.fallbacks,
            "by_parts": self.by_parts,
            "kv_cache": self.kv_cache,
            "notes": self.notes(),
            "regions": self.regions,
            "target": self.target,
            "choices": self.choices,
            "cache": self.cache,
        }

    def notes(self) -> list[str]:
        """What a user should know besides the numbers."""
        notes = [f"everything runs in PyTorch: {self.problem}"] if self.problem else []
        notes += [f"in PyTorch ({count} calls): {why}" for why, count in self.fallbacks.items()]
        if self.by_parts:
            notes.append(f"by parts, through torch.compile: {self.by_parts}")
        if self.kv_cache:
            notes.append(
                f"keys and values are kept in {self.kv_cache}, but for those of paged caches"
            )
        if self.not_stored:
            notes.append(self.not_stored)
        if self.choices.get("problem"):
            notes.append(self.choices["problem"])
        if self.cache.get("problem"):
            notes.append(f"kernel cache: {self.cache['problem']}")
        return notes

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.target.get('isa', '?')}: "
            f"{self.captured} graphs captured, {self.planned} from plans in the cache; "
            f"{self.kernels_emitted} kernels emitted, {self.kernels_loaded} loaded from the cache; "
            f"{self.weights_packed} weights packed, {self.weights_mapped} mapped from the cache",
            f"choices of speed: {self.choices.get('source', '?')}",
        ]
        for name in PHASES:
            phase = self.phases.get(name)
            if not phase or not phase["runs"]:
                lines.append(f"{name}: has not run")
                continue
            lines.append(
                f"{name}: {phase['runs']} runs, {100 * phase['own_flops_share']:.2f} % of the flops"
                f" and {100 * phase['own_time_share']:.2f} % of the time in our kernels, "
                f"{phase['fallback_calls']} fallback calls, "
                f"{phase['steps_per_layer']:.1f} steps per layer, {phase['threads']} threads"
            )
        lines += self.notes()
        lines += self._region_lines()
        return "\n".join(lines)

    def _region_lines(self) -> list[str]:
        """Equal regions of many layers share a line."""
        groups: dict[tuple[str, ...], list[float]] = {}
        for region in self.regions:
            key = (region["name"], region["kernel"], region["isa"], region["reason"])
            groups.setdefault(key, []).append(float(region["flops"]))
        lines = []
        for (name, kernel, isa, reason), flops in groups.items():
            where = f"fallback: {reason}" if reason else f"{isa}  {kernel}"
            lines.append(f"  {len(flops):4d} x {name:32s} {sum(flops) / 1e6:10.1f} Mflop  {where}")
        return lines


def explain(model: nn.Module) -> Explanation:
    """What happened to `model` so far: optimised, compiled, or both."""
    original = getattr(model, "_orig_mod", model)
    explanation = Explanation(type(original).__name__)
    reports = [
        report
        for executable in executables_of(original, explanation)
        for report in executable.reports()
    ]
    for report in reports:
        explanation.regions += [_region(region) for region in report["regions"]]
    explanation.phases = {name: _phase(report[name] for report in reports) for name in PHASES}
    for name, count in explanation.fallbacks.items():
        if count:
            explanation.regions.append(_whole_call(name))
    try:
        engine = core.engine()
    except core.CoreError as error:
        explanation.fallbacks.setdefault(str(error), 0)
        return explanation
    explanation.problem = core.unavailable()
    counters = engine.kernel_counters()
    explanation.kernels_emitted = counters["emitted"]
    explanation.kernels_loaded = counters["loaded"]
    explanation.emit_seconds = counters["emit_seconds"]
    if (plans := sys.modules.get("tilewright.plans")) is not None:
        counted = plans.counters()
        explanation.captured, explanation.planned = counted["captured"], counted["loaded"]
    weights = engine.weight_counters()
    explanation.weights_packed = weights["packed"]
    explanation.weights_mapped = weights["mapped"]
    explanation.target = dict(engine.target())
    explanation.choices = dict(engine.choices())
    explanation.cache = dict(engine.cache_state())
    return explanation


def executables_of(model: nn.Module, explanation: Explanation) -> list[Executable]:
    """The model's programs; fills in what ran in PyTorch instead."""
    found: list[Executable] = []
    decoders = sys.modules.get("tilewright.decoder")
    decoder = decoders.decoder_of(model) if decoders is not None else None
    if decoder is not None:
        found += decoder.programs()
        explanation.fallbacks.update(decoder.fallbacks)
        explanation.not_stored = decoder.model_programs.not_stored
        if decoder.model_programs.stored is not None:
            explanation.kv_cache = str(decoder.model_programs.stored).removeprefix("torch.")
        if decoder.parts.compiled is not None:
            explanation.by_parts = decoder.model_programs.unsupported
        if decoder.parts.refused:
            explanation.fallbacks.setdefault(decoder.parts.refused, 0)
    backends = sys.modules.get("tilewright.backend")
    if backends is not None:
        parameters = {id(parameter) for parameter in model.parameters()}
        for graph in list(backends.graphs):
            if not (graph.owns(parameters) or graph in getattr(model, "graphs", ())):
                continue
            if graph.executable is not None:
                found.append(graph.executable)
            if graph.reason:
                calls = explanation.fallbacks.get(graph.reason, 0) + graph.fallback_calls
                explanation.fallbacks[graph.reason] = calls
    return found


def _region(region: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": region["name"],
        "kernel": region["kernel"],
        "fallback": region["fallback"],
        "reason": region["reason"],
        "isa": region["isa"],
        "flops": region["flops"],
        "weight_bytes": region["weight_bytes"],
    }


def _whole_call(reason: str) -> dict[str, Any]:
    return {
        "name": "forward",
        "kernel": "",
        "fallback": True,
        "reason": reason,
        "isa": "",
        "flops": 0.0,
        "weight_bytes": 0,
    }


def _phase(counters: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total = dict.fromkeys(_COUNTS, 0)
    threads = 0  # of each program's last run
    for counted in counters:
        threads = max(threads, counted["threads"])
        for name in _COUNTS:
            total[name] += counted[name]
    flops = total["own_flops"] + total["fallback_flops"]
    seconds = total["own_seconds"] + total["fallback_seconds"]
    return {
        **total,
        "own_flops_share": total["own_flops"] / flops if flops else 0.0,
        "own_time_share": total["own_seconds"] / seconds if seconds else 0.0,
        "steps_per_layer": total["layer_steps"] / total["layers"] if total["layers"] else 0.0,
        "threads": threads,
    }
