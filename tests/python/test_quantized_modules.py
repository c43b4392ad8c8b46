"""Modules that come already quantised keep their own forward, stay right, and are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright.backend import backend

FORMS = ("optimize", "compile", "both")


class Int8Linear(nn.Module):
    """As packages of quantised models write it: integers and scales, dequantised in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


def with_integers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    return model


def dynamically_quantized(model: Any) -> Any:
    """torch's own: its modules keep their weights in objects that no graph can hold."""
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantize", [with_integers, dynamically_quantized])
def test_they_stay_right_and_are_named(quantize: Any, form: str) -> None:
    torch._dynamo.reset()
    reference, model = quantize(tiny_llama(3)), quantize(tiny_llama(3))
    if form != "compile":
        model = tilewright.llm.optimize(model, inplace=True)
    if form != "optimize":
        model.compile(backend=backend)
    expected = reference(prompt()).logits
    for _ in range(2):
        torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    expected = reference.generate(prompt(), **arguments)
    assert torch.equal(model.generate(prompt(), **arguments), expected)
    named = any(region["reason"] for region in tilewright.explain(model).regions)
    # Dynamo leaves torch's own ones out of the graphs that we get.
    assert named or (form == "compile" and quantize is dynamically_quantized)
