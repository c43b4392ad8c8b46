"""explain: counted, complete, and honest about what did not run."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright

PHASE_KEYS = {"own_flops_share", "own_time_share", "fallback_calls", "steps_per_layer"}
REGION_KEYS = {"name", "kernel", "fallback", "reason", "isa", "flops"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def flops(tokens: int, keys: int, layers: int = 3, hidden: int = 64) -> int:
    """Of a step of the tiny Llama, logits of the last token: matrix products and attention."""
    projections = 2 * tokens * hidden * (hidden + 32 + 32 + hidden + 3 * 96)
    attention = sum(4 * hidden * (keys - tokens + i + 1) for i in range(tokens))
    return layers * (projections + attention) + 2 * hidden * 160


def test_before_anything_ran() -> None:
    explanation = tilewright.explain(tilewright.llm.optimize(tiny_llama(3)))
    assert explanation.own_flops_share == 0.0
    assert "has not run" in str(explanation)


def test_an_optimised_model() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    model.generate(prompt(1, 9), max_new_tokens=4, do_sample=False)
    explanation = tilewright.explain(model)
    data = explanation.to_dict()
    json.dumps(data)
    assert data["own_flops_share"] >= 0.99 and not data["fallbacks"]
    assert data["kernels_emitted"] + data["kernels_loaded"] > 0
    for name, runs in (("prefill", 1), ("decode", 3)):
        phase = data["phases"][name]
        assert phase.keys() >= PHASE_KEYS
        assert phase["runs"] == runs and phase["fallback_calls"] == 0
        assert phase["own_time_share"] >= 0.99
    assert data["phases"]["decode"]["steps_per_layer"] == 5
    assert all(region.keys() >= REGION_KEYS for region in data["regions"])
    source = data["choices"]["source"]
    assert source.startswith(("row ", "rule ", "profile "))
    text = str(explanation)
    assert "prefill: 1 runs" in text and "decode: 3 runs" in text
    assert f"choices of speed: {source}" in text


def test_flops_are_those_of_the_model() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    model.generate(prompt(1, 9), max_new_tokens=4, do_sample=False)
    phases = tilewright.explain(model).to_dict()["phases"]
    assert phases["prefill"]["own_flops"] == pytest.approx(flops(9, 9), rel=0.15)
    decode = sum(flops(1, 10 + i) for i in range(3))
    assert phases["decode"]["own_flops"] == pytest.approx(decode, rel=0.15)


def test_a_compiled_model() -> None:
    model = tiny_llama(2)
    model.compile(backend="tilewright")
    model.generate(prompt(1, 9), max_new_tokens=4, do_sample=False)
    data = tilewright.explain(model).to_dict()
    assert data["phases"]["prefill"]["runs"] == 1 and data["phases"]["decode"]["runs"] == 3
    assert data["own_flops_share"] >= 0.99


def test_models_do_not_mix() -> None:
    first, second = (tilewright.llm.optimize(tiny_llama(3)) for _ in range(2))
    with torch.no_grad():
        first(prompt())
    assert tilewright.explain(first).to_dict()["phases"]["prefill"]["runs"] == 1
    assert tilewright.explain(second).to_dict()["phases"]["prefill"]["runs"] == 0


@torch.no_grad()
def test_fallbacks_lower_the_share() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_power(self.layer(x), 2)

    model = Model().eval()
    torch.compile(model, backend="tilewright")(torch.randn(64, 64))
    data = tilewright.explain(model).to_dict()
    assert data["phases"]["prefill"]["fallback_calls"] >= 1
    reasons = [region["reason"] for region in data["regions"] if region["fallback"]]
    assert reasons and all(reasons)


@torch.no_grad()
def test_products_that_pytorch_computes_count() -> None:
    """A convolution whose patches overlap is PyTorch's; the linear layer behind it is ours."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 16)).eval()
    compiled = torch.compile(model, backend="tilewright")
    compiled(torch.randn(2, 4, 10, 10))
    elements = 2 * 8 * 8 * 8  # of the convolution's result
    theirs, ours = 2 * elements * 4 * 9, 2 * elements * 16
    share = tilewright.explain(compiled).own_flops_share
    assert abs(share - ours / (ours + theirs)) < 0.01, share


def test_stats_count_what_happened() -> None:
    before = tilewright.stats()
    model = tilewright.llm.optimize(tiny_llama(3))
    with torch.no_grad():
        output = model(prompt(2, 9))
        model(prompt(2, 1), past_key_values=output.past_key_values)
        model(prompt(2, 9), output_hidden_states=True)
    now = tilewright.stats()
    assert now["tokens"] - before["tokens"] == 2 * 10
    assert now["calls"] - before["calls"] == 2
    reason = "the argument output_hidden_states is given"
    assert now["fallbacks"][reason] - before["fallbacks"].get(reason, 0) == 1
    assert now["weight_bytes"] > before["weight_bytes"]
    assert now["cache_bytes"] >= before["cache_bytes"] + 3 * 2 * 10 * 2 * 2 * 16 * 4
    assert now["kernels"]["emitted"] + now["kernels"]["loaded"] > 0
