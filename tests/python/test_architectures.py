"""Architectures by what is special about them: right, in our programs, without a fallback.

tests/campaign/models.py measures every architecture, in more depth; here are those that between
them use each form of attention, norm, rotary embedding, projection and experts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tilewright._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaign"))

from architectures import ARCHITECTURES, build, others, prompt

import tilewright
from tilewright.capture_ops import window_of
from tilewright.decoder import decoder_of
from tilewright.graph_text import UnsupportedError

WHOLE = {
    "mistral": "a window in every layer",
    "gemma2": "a window in every other layer, softcaps, one-plus norms before and after",
    "qwen3": "norms of queries and keys",
    "gpt2": "weights stored [in, out], learned positions",
    "gpt_neox": "fused QKV interleaved per head, parallel residual, layer norm",
    "phi": "rotary embedding of a part of each head, biases",
    "phi3": "fused QKV and gate-up",
    "falcon": "attention spelled out, one key head",
    "gptj": "attention spelled out, interleaved rotary embedding of a part, from a table",
    "opt": "learned positions with an offset",
    "cohere": "interleaved rotary embedding, scaled logits",
    "gpt_oss": "attention sinks, experts stored [in, out] with biases and a gate of their own",
    "qwen3_moe": "experts behind a softmax and top-k",
    "codegen": "attention spelled out, scaled after the mask",
    "dots1": "experts behind a sigmoid, chosen in groups, and a shared one",
    "gemma4_text": "rotary embedding before heads come first",
    "biogpt": "makes a mask of ones itself",
    "bart": "a decoder without its encoder, whose mask is made and not used",
    "bloom": "ALiBi, attention spelled out with batch and heads merged",
}


@pytest.mark.parametrize("name", WHOLE)
def test_logits_and_tokens(name: str) -> None:
    eager = build({**others(), **ARCHITECTURES}[name])
    ours = tilewright.llm.optimize(eager)
    given = prompt(3, 21, padding=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        expected = eager.generate(
            **given, **settings, return_dict_in_generate=True, output_logits=True
        )
        got = ours.generate(**given, **settings, return_dict_in_generate=True, output_logits=True)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    decoder = decoder_of(ours)
    assert decoder is not None and not decoder.fallbacks, decoder.fallbacks
    explanation = tilewright.explain(ours)
    assert explanation.own_flops_share >= 0.95, str(explanation)
    calls = [phase["fallback_calls"] for phase in explanation.phases.values()]
    assert calls == [0, 0], str(explanation)


def test_positions_counted_from_the_mask() -> None:
    """OPT numbers tokens from the mask when it is given no positions; most models do not."""
    for name in ("opt", "qwen2"):
        eager = build(ARCHITECTURES[name])
        ours = tilewright.llm.optimize(eager)
        given = prompt(2, 9, padding=True)
        kept = given["attention_mask"].bool()
        with torch.inference_mode():
            expected, got = eager(**given).logits[kept], ours(**given).logits[kept]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert not decoder_of(ours).fallbacks


def test_positions_counted_from_the_mask_that_no_caller_can_state() -> None:
    from transformers import OPTForCausalLM

    class Unstated(OPTForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **more):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **more,
            )

    eager = build(ARCHITECTURES["opt"])
    eager.__class__ = Unstated
    ours = tilewright.llm.optimize(eager)
    for padding in (False, True):
        given = prompt(2, 9, padding)
        kept = given["attention_mask"].bool()
        with torch.inference_mode():
            expected, got = eager(**given).logits[kept], ours(**given).logits[kept]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert not decoder_of(ours).fallbacks


@pytest.mark.parametrize(
    ("name", "reason"), [("diffllama", "not the cache's"), ("falcon_alibi", "outside of attention")]
)
def test_a_model_that_is_no_single_program_runs_by_parts(name: str, reason: str) -> None:
    """Differential attention reads half of each value, which capture sees; Falcon rounds its biases
    into the mask, which the core sees."""
    architecture = {**others(), **ARCHITECTURES}[name]
    eager, ours = build(architecture), build(architecture)
    ours = tilewright.llm.optimize(ours, inplace=True)
    given = prompt(1, 9)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        assert torch.equal(eager.generate(**given, **settings), ours.generate(**given, **settings))
    explanation = tilewright.explain(ours)
    assert reason in explanation.by_parts
    assert not explanation.fallbacks and explanation.own_flops_share >= 0.95, str(explanation)
    assert decoder_of(ours).calls == 0


def mask(rule: Any) -> Any:
    return lambda batch, head, query, key: rule(query, key)


def test_masks_are_known_by_what_they_allow() -> None:
    assert window_of(mask(lambda q, k: k <= q), None) == 0
    assert window_of(mask(lambda q, k: k <= q), 8) == 0
    for size in (1, 2, 16, 4096):
        assert window_of(mask(lambda q, k, n=size: (k <= q) & (k > q - n)), size) == size
    others = {
        "all keys": lambda q, k: q >= 0,
        "a window that is not the stated one": lambda q, k: (k <= q) & (k > q - 15),
        "chunks": lambda q, k: (k <= q) & (k // 16 == q // 16),
        "a window to both sides": lambda q, k: abs(q - k) < 16,
        "a prefix": lambda q, k: (k <= q) | (k < 4),
    }
    for name, rule in others.items():
        with pytest.raises(UnsupportedError):
            window_of(mask(rule), 16)
            pytest.fail(name)
