"""Adapters (PEFT's LoRA) on optimised and compiled models: in our programs, and never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright.backend import backend

FORMS = ("optimize", "compile", "both")


def adapted() -> Any:
    """A model with two adapters, the first one active, both with weights that matter."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama(3), config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def made(form: str) -> Any:
    model = adapted()
    if form != "compile":
        model = tilewright.llm.optimize(model, inplace=True)
    if form != "optimize":
        model.get_base_model().compile(backend=backend)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "other adapter": lambda m: m.set_adapter("second"),
    "merged": lambda m: m.merge_adapter(),
    "scaled": lambda m: [
        layer.self_attn.q_proj.scale_layer(3.0) for layer in m.get_base_model().model.layers
    ],
    "loaded": lambda m: m.load_state_dict(
        {k: v * 1.5 if "lora_B" in k else v for k, v in m.state_dict().items()}
    ),
}


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=prompt()).logits
    return result


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_adapters_is_honoured(change: str, form: str) -> None:
    torch._dynamo.reset()
    reference, model = adapted(), made(form)
    before = logits(reference)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    for both in (reference, model):
        CHANGES[change](both)
    after = logits(reference)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)
    if change == "merged":
        for both in (reference, model):
            both.unmerge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_unmerged_adapters_run_in_our_programs(form: str) -> None:
    torch._dynamo.reset()
    reference, model = adapted(), made(form)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    ids = prompt()
    expected = reference.generate(input_ids=ids, **arguments)
    assert torch.equal(model.generate(input_ids=ids, **arguments), expected)
    explanation = tilewright.explain(model)
    assert explanation.own_flops_share > 0.99, explanation.fallbacks
    if form != "compile":
        assert not explanation.fallbacks


@torch.no_grad()
def test_restore_finds_the_model_inside_its_wrapper() -> None:
    model = made("optimize")
    expected = logits(model)
    restored = tilewright.llm.restore(model)
    assert "forward" not in restored.get_base_model().__dict__
    torch.testing.assert_close(logits(restored), expected, rtol=1e-4, atol=1e-4)
