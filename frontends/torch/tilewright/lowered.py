"""What capture gives, apart from how: a process whose model has a plan imports no more than this.

Tested by tests/python/test_lower.py, test_plans.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.dims import Derived, Dim
from tilewright.graph_text import Type, UnsupportedError

if TYPE_CHECKING:
    from tilewright.outputs import Output

RAGGED = -1  # in the place of logits_to_keep: the step's third input says which


@dataclass(eq=False, repr=False)  # each method that it makes takes 0.2 ms of a start
class Lowered:
    """What the core and a call need to know about a graph."""

    text: str  # as captured, or after the core's passes (has_passed)
    constants: dict[str, torch.Tensor]
    inputs: list[int]  # placeholders that are tensor parameters of the program, in its order
    shape_inputs: list[str]  # further parameters u8[symbol, 0]: they only carry the symbol's value
    bindings: dict[str, tuple[int, int | None]]  # symbol -> (placeholder, axis or the int itself)
    outputs: list[Output]
    output_tree: Any
    results: list[Type]  # of the program's outputs, in order
    tokens: Dim | None  # of each sequence in one call; one means decode
    mutated: frozenset[int]  # placeholders that a run writes
    externals: list[tuple[str, str]] = field(default_factory=list)  # (function, reason)
    derived: dict[str, Derived] = field(default_factory=dict)  # symbols computed from the bound
    at_most: list[tuple[Dim, Dim]] = field(default_factory=list)  # in every call: first <= second
    caches: list[int] = field(default_factory=list)  # layers whose caches are parameters, in order
    has_passed: bool = False

    def symbols(self, arguments: Sequence[Any]) -> dict[str, int]:
        """The symbols' values in a call with these arguments. Raises UnsupportedError if the
        program is not for them."""
        found = {
            name: arguments[i] if axis is None else arguments[i].shape[axis]
            for name, (i, axis) in self.bindings.items()
        }
        for name, derived in self.derived.items():
            try:
                found[name] = derived.compute(*(found[symbol] for symbol in derived.symbols))
            except ZeroDivisionError:
                raise UnsupportedError(f"the size {name} divides by zero in this call") from None
            if found[name] < 0:
                raise UnsupportedError(f"the size {name} is negative in this call")
        for size, limit in self.at_most:
            if size.evaluate(found) > limit.evaluate(found):
                raise UnsupportedError(f"an index up to {size} of only {limit} in this call")
        return found


@dataclass(eq=False, repr=False)
class CapturedModel:
    lowered: Lowered
    output_type: type  # what the model's forward returns
    caches: list[CacheShape] = field(default_factory=list)  # the program's, in order
    # Constants that no module has: programs read them where they are, so who has one keeps these.
    literals: dict[str, torch.Tensor] = field(default_factory=dict)


class CacheShape(NamedTuple):
    layer: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of the model's keys and values
    stored: torch.dtype  # of the blocks: the same, or int8 with scales


def lowered_model(
    text: str,
    constants: dict[str, torch.Tensor],
    results: list[Type],
    externals: list[tuple[str, str]],
    logits_to_keep: int,
) -> Lowered:
    """The graph of a whole model, whose inputs are always the same."""
    ragged = logits_to_keep == RAGGED
    return Lowered(
        text=text,
        constants=constants,
        inputs=[0, 1, 2] if ragged else [0, 1],
        shape_inputs=[],
        bindings={"s": (0, 1), "n": (2, 0)} if ragged else {"b": (0, 0), "s": (0, 1)},
        outputs=[],
        output_tree=None,
        results=results,
        tokens=Dim.symbol("s"),
        mutated=frozenset(),
        externals=externals,
    )
