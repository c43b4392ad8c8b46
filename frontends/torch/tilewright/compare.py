"""compare: which region of an optimised or compiled model computes something wrong.

Tested by tests/python/test_compare.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.explain import Explanation, executables_of


@dataclasses.dataclass(frozen=True)
class Region:
    """One region of one run. `error` is the largest of its outputs' elements, absolute."""

    name: str  # its ops
    kernel: str  # the kernels that ran, or the fallback
    reason: str  # why it was not compared, else empty
    error: float
    bound: float
    graph: str  # beyond its bound: a file for `twc run`, which shows the difference again

    @property
    def differs(self) -> bool:
        """Compared, and beyond its bound (or not a number)."""
        return not self.reason and not self.error <= self.bound

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: not compared: {self.reason}"
        return f"{self.name}: error {self.error:.3g}, bound {self.bound:.3g}  {self.kernel}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What compare() found. Printed: the first region beyond its bound, and what was left out."""

    model: str
    regions: list[Region]  # in the order in which they ran
    fallbacks: dict[str, int]  # what ran in PyTorch so far, as in explain()

    @property
    def first(self) -> Region | None:
        """The first region beyond its bound."""
        return next((region for region in self.regions if region.differs), None)

    def save(self, path: str | Path) -> None:
        """Writes the first region as a `.graph` file: `twc run FILE` reproduces the difference.

        ValueError if no region differs. The file holds the region's inputs and weights as text.
        """
        if self.first is None:
            raise ValueError("no region differs: there is nothing to save")
        Path(path).write_text(self.first.graph)

    def __str__(self) -> str:
        compared = sum(not region.reason for region in self.regions)
        lines = [f"{self.model}: {compared} of {len(self.regions)} regions compared"]
        if not self.regions:
            lines.append("nothing ran in a program of ours")
        lines += [f"in PyTorch ({count} calls): {why}" for why, count in self.fallbacks.items()]
        left_out: dict[str, int] = {}
        for region in self.regions:
            if region.reason:
                left_out[str(region)] = left_out.get(str(region), 0) + 1
        lines += [f"{count} x {text}" for text, count in left_out.items()]
        if self.first is not None:
            lines.append(f"first beyond its bound: {self.first}")
        elif compared:
            lines.append("every compared region is within its bound")
        return "\n".join(lines)


def compare(model: nn.Module, inputs: Any) -> Comparison:
    """Runs `model` on `inputs` and compares each region with what its nodes mean.

    model: optimised (llm.optimize), compiled (backend="tilewright"), or both. inputs: a mapping of
    keyword arguments, a tuple of positional ones, or one tensor; the model gets copies, so a cache
    among them does not grow.

    The reference is the graph's interpreter, in double, on the inputs that the program gave the
    region: errors do not add up over regions, and the first one beyond its bound is the wrong one.
    It judges kernels, layouts and the memory plan; what capture and the passes made of the model
    is its premise, so compare the results with the original model's for that. The bound grows with
    the roundings of an accumulation. Slow: seconds for each token and 100 million weights, and
    packed weights are unpacked meanwhile. The model is called twice or three times; calls of other
    threads take part. Errors of the model's call are raised.
    """
    if isinstance(inputs, Mapping):
        positional, named = (), dict(inputs)
    else:
        positional, named = inputs if isinstance(inputs, tuple) else (inputs,), {}

    def call() -> None:
        arguments, keywords = copy.deepcopy((positional, named))
        with torch.no_grad():
            model(*arguments, **keywords)

    call()  # captures, compiles, and loads kernels
    original = getattr(model, "_orig_mod", model)
    explanation = Explanation(type(original).__name__)
    executables = executables_of(original, explanation)
    if any(executable.is_spent for executable in executables):
        call()  # packs, after a step that read weights in place
    begun: list[Any] = []
    rows: list[dict[str, Any]] = []
    try:
        for executable in executables:
            executable.begin_check()
            begun.append(executable)
        call()
    finally:
        for executable in begun:
            rows += executable.end_check()
    return Comparison(
        type(original).__name__, [Region(**row) for row in rows], explanation.fallbacks
    )
