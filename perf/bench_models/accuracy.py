"""How right the answers are: logits against a reference in fp64 (or fp32 for models too large).

Next to every speed stand the largest and the root-mean-square error of the logits, the mean
Kullback-Leibler divergence, how often the most likely token is the same, and perplexity on a real
text. `is_wrong` marks a system whose error cannot be rounding at its precision.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy

# Mean divergence from the reference (nats) above which a system of this precision is marked.
# Rounding of fp32 gives about 1e-10 and of bf16 about 1e-4; 4 bits may cost much more.
LARGEST_DIVERGENCE = {"fp32": 1e-6, "bf16": 5e-3, "int8": 5e-2, "int4": 1.0}


@dataclass(frozen=True)
class Accuracy:
    """One system's logits against the reference."""

    largest_error: float
    rms_error: float
    divergence: float
    same_top: float
    perplexity: float
    reference_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    """In double."""
    wide: numpy.ndarray = logits.astype(numpy.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - numpy.log(numpy.exp(wide).sum(-1, keepdims=True))


def perplexity(log_probabilities: numpy.ndarray, tokens: list[int]) -> float:
    """Of tokens[1:], each predicted from those before it."""
    rows = numpy.arange(len(tokens) - 1)
    chosen = log_probabilities[rows, numpy.asarray(tokens[1:])]
    return float(numpy.exp(-chosen.mean()))


def compare(logits: numpy.ndarray, reference: numpy.ndarray, tokens: list[int]) -> Accuracy:
    """Both [tokens, vocabulary]. Not-a-number counts as infinitely wrong."""
    if logits.shape != reference.shape:
        raise ValueError(f"logits of shape {logits.shape}, expected {reference.shape}")
    if not numpy.isfinite(logits).all():
        nothing = float("inf")
        return Accuracy(nothing, nothing, nothing, 0.0, nothing, nothing)
    error = logits.astype(numpy.float64) - reference.astype(numpy.float64)
    ours, theirs = log_softmax(logits), log_softmax(reference)
    divergence = (numpy.exp(theirs) * (theirs - ours)).sum(-1).mean()
    return Accuracy(
        largest_error=float(numpy.abs(error).max()),
        rms_error=float(numpy.sqrt((error**2).mean())),
        divergence=max(0.0, float(divergence)),
        same_top=float((logits.argmax(-1) == reference.argmax(-1)).mean()),
        perplexity=perplexity(ours, tokens),
        reference_perplexity=perplexity(theirs, tokens),
    )


def is_wrong(accuracy: Accuracy, dtype: str) -> bool:
    """More than rounding."""
    return not accuracy.divergence <= LARGEST_DIVERGENCE[dtype]


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> str:
    """How far greedy tokens agree, in words."""
    if tokens == reference:
        return "identical"
    shortest = len(reference[0])
    for ours, theirs in zip(tokens, reference, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), shortest
        )
        shortest = min(shortest, same)
    return f"first {shortest} of {len(reference[0])}"
