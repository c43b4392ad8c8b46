"""llm.optimize: results, types, copies, staleness, restore."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import padded, prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright.decoder import decoder_of
from tilewright.graph_text import UnsupportedError
from tilewright.installed import installed_in

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
    torch.float16: {"rtol": 0.02, "atol": 0.02},
}


def calls(model: Any) -> int:
    decoder = decoder_of(model)
    assert decoder is not None
    assert not decoder.fallbacks, decoder.fallbacks
    return decoder.calls


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits(dtype: torch.dtype, batch: int) -> None:
    model = tiny_llama(3, dtype)
    optimized = tilewright.llm.optimize(model)
    ids = prompt(batch, 11)
    expected, actual = model(ids), optimized(ids)
    assert type(actual) is type(expected) and actual.logits.dtype == dtype
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE[dtype])
    assert calls(optimized) == 1


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    for keep in (0, 1, 4):
        expected = model(prompt(2, 9), logits_to_keep=keep).logits
        actual = optimized(prompt(2, 9), logits_to_keep=keep).logits
        torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])
    assert calls(optimized) == 3


@torch.no_grad()
def test_steps_with_a_cache_of_the_caller() -> None:
    from transformers import DynamicCache

    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    ids = prompt(2, 12)
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    first = optimized(ids[:, :7], past_key_values=cache, use_cache=True)
    assert first.past_key_values is cache and cache.get_seq_length() == 7
    second = optimized(ids[:, 7:11], past_key_values=cache)
    third = optimized(ids[:, 11:], past_key_values=cache)
    actual = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])
    assert calls(optimized) == 3
    reference = DynamicCache(config=model.config)
    model(ids, past_key_values=reference)
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


def other_contents(cache: Any) -> None:
    for layer in cache.layers:
        keys, values = layer.keys[:1] * 2, layer.values[:1] * 3
        layer.keys, layer.values = keys, values


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda cache: None, 2),
        (lambda cache: cache.layers.reverse(), 2),
        (lambda cache: setattr(cache, "layers", cache.layers[::-1]), 2),
        (lambda cache: cache.layers.__setitem__(0, copy.deepcopy(cache.layers[1])), 2),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), 1),
        (lambda cache: cache.crop(-2), 2),
        (lambda cache: cache.reset(), 2),
        (other_contents, 1),
    ],
    ids=[
        *("nothing", "layers reversed", "other list of layers", "other layer", "reordered"),
        *("selected", "cropped", "reset", "other contents"),
    ],
)
def test_what_changes_a_cache_between_two_steps(change: Any, batch: int) -> None:
    model = tiny_llama(2)
    logits = []
    for candidate in (model, tilewright.llm.optimize(model)):
        cache = candidate(prompt(2, 7), use_cache=True).past_key_values
        for tokens in (1, 2, 1):  # what was made ready for one step is there for the next
            candidate(prompt(2, tokens), past_key_values=cache)
        change(cache)
        logits.append(candidate(prompt(batch, 1), past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], **TOLERANCE[torch.float32])


@torch.no_grad()
def test_a_mask_may_change_between_two_calls() -> None:
    model = tiny_llama(2)
    inputs, token = padded([7, 4]), prompt(2, 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    logits = []
    for candidate in (model, tilewright.llm.optimize(model)):
        cache = candidate(**inputs, use_cache=True).past_key_values
        for same in (mask, torch.ones_like(mask), mask):  # the padding is there, then it is not
            output = candidate(
                token,
                attention_mask=same,
                position_ids=torch.tensor([[7], [4]]),
                past_key_values=cache,
            )
            cache.crop(-1)
            logits.append(output.logits)
    assert not torch.allclose(logits[0][1], logits[1][1], rtol=0.01, atol=0.01)
    for theirs, ours in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE[torch.float32])
    torch.testing.assert_close(logits[5], logits[3], **TOLERANCE[torch.float32])
    assert not torch.allclose(logits[3][1], logits[4][1], rtol=0.01, atol=0.01)


@torch.no_grad()
def test_the_configuration_may_change_between_two_calls() -> None:
    optimized = tilewright.llm.optimize(tiny_llama(2))
    assert optimized(prompt()).past_key_values is not None
    optimized.config.use_cache = False
    assert optimized(prompt()).past_key_values is None
    optimized.config.output_hidden_states = True
    assert len(optimized(prompt()).hidden_states) == 3
    optimized.config.output_hidden_states = False
    optimized.config.use_cache = True
    output = optimized(prompt())
    assert output.past_key_values is not None and output.hidden_states is None
    assert decoder_of(optimized).fallbacks["config.output_hidden_states is set"] == 1


@torch.no_grad()
def test_two_models_may_share_a_cache() -> None:
    model = tiny_llama(2)
    first = tilewright.llm.optimize(model)
    second = tilewright.llm.optimize(model, kv_cache_dtype="int8")
    ids = prompt(1, 9)
    cache = first(ids[:, :4], use_cache=True).past_key_values
    for at, candidate in enumerate((first, second, first, second), 4):
        actual = candidate(ids[:, at : at + 1], past_key_values=cache).logits
        expected = model(ids[:, : at + 1]).logits[:, -1:]
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
        assert calls(candidate) > 0 and not decoder_of(candidate).fallbacks


@torch.no_grad()
def test_arguments_by_position() -> None:
    optimized = tilewright.llm.optimize(tiny_llama(2))
    mask = torch.ones_like(prompt())
    expected = optimized(input_ids=prompt(), attention_mask=mask, logits_to_keep=1).logits
    assert torch.equal(optimized(prompt(), mask, logits_to_keep=1).logits, expected)
    with pytest.raises(TypeError, match="multiple values"):
        optimized(prompt(), input_ids=prompt())
    with pytest.raises(TypeError, match="too many positional"):
        optimized(*[None] * 20)


@torch.no_grad()
def test_a_cache_that_eager_filled() -> None:
    from transformers import DynamicCache

    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    ids = prompt(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    actual = optimized(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(actual, model(ids).logits[:, 8:], **TOLERANCE[torch.float32])
    assert calls(optimized) == 1


@torch.no_grad()
def test_left_padding() -> None:
    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    inputs = padded([9, 4, 7])
    expected, actual = model(**inputs).logits, optimized(**inputs).logits
    for row, length in enumerate((9, 4, 7)):
        torch.testing.assert_close(
            actual[row, -length:], expected[row, -length:], **TOLERANCE[torch.float32]
        )
    assert calls(optimized) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"labels": prompt(1, 6)}, "labels"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, "not left padding"),
        ({"attention_mask": torch.ones(1, 1, 6, 6).tril().bool()}, "not .batch, keys."),
    ],
    ids=["hidden states", "attentions", "labels", "right padding", "4-D mask"],
)
def test_other_calls_run_in_pytorch_with_a_reason(arguments: Any, reason: str) -> None:
    model = tiny_llama(3, attn_implementation="eager")
    optimized = tilewright.llm.optimize(model)
    expected, actual = model(prompt(1, 6), **arguments), optimized(prompt(1, 6), **arguments)
    torch.testing.assert_close(actual.logits, expected.logits)
    decoder = decoder_of(optimized)
    assert decoder is not None and decoder.calls == 0
    assert len(decoder.fallbacks) == 1
    import re

    assert re.search(reason, next(iter(decoder.fallbacks)))


@torch.no_grad()
def test_embeddings_as_input_share_the_cache() -> None:
    from transformers import DynamicCache

    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    ids = prompt(1, 8)
    cache = DynamicCache(config=model.config)
    optimized(ids[:, :3], past_key_values=cache)
    embeddings = model.get_input_embeddings()(ids[:, 3:6])
    optimized(inputs_embeds=embeddings, past_key_values=cache)
    actual = optimized(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(actual, model(ids).logits[:, 6:], **TOLERANCE[torch.float32])
    decoder = decoder_of(optimized)
    assert decoder is not None and decoder.calls == 2 and sum(decoder.fallbacks.values()) == 1


def test_gradients_still_flow() -> None:
    optimized = tilewright.llm.optimize(tiny_llama(3))
    optimized(prompt(), labels=prompt()).loss.backward()
    assert optimized.lm_head.weight.grad is not None


@torch.no_grad()
def test_not_in_place_leaves_the_model_alone() -> None:
    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model, dtype=torch.bfloat16)
    assert model.dtype == torch.float32 and installed_in(model) is None
    assert optimized.dtype == torch.bfloat16 and optimized is not model
    assert optimized.config.dtype == torch.bfloat16
    shared = tilewright.llm.optimize(model)
    assert shared.lm_head.weight is model.lm_head.weight


@torch.no_grad()
def test_in_place_and_restore() -> None:
    model = tiny_llama(3)
    forward = model.forward
    assert tilewright.llm.optimize(model, inplace=True, dtype=torch.bfloat16) is model
    assert model.dtype == torch.bfloat16
    model(prompt())
    assert calls(model) == 1
    assert tilewright.llm.restore(model) is model
    assert model.dtype == torch.float32 and model.forward == forward
    assert installed_in(model) is None and "forward" not in model.__dict__
    assert tilewright.llm.restore(model) is model


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    model = tilewright.llm.optimize(tiny_llama(3), dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_float16_to_bfloat16_says_what_it_rounds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tilewright"):
        tilewright.llm.optimize(tiny_llama(3, torch.float16), dtype=torch.bfloat16)
    assert "float16 to bfloat16 rounded" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tilewright"):
        tilewright.llm.optimize(tiny_llama(3), dtype=torch.bfloat16)
    assert "rounded" not in caplog.text


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.5),
        lambda m: m.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
        lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict(
            {k: nn.Parameter(v * 1.1) for k, v in m.state_dict().items()}, assign=True
        ),
        lambda m: m.to(torch.bfloat16),
        lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.ReLU()),
        lambda m: setattr(m.model.norm, "weight", nn.Parameter(m.model.norm.weight * 2)),
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5),
        lambda m: setattr(m.model.layers[2].post_attention_layernorm, "variance_epsilon", 0.5),
    ],
    ids=[
        *("in place", "data", "loaded", "assigned", "to", "module replaced", "parameter replaced"),
        *("attribute of attention", "attribute of a norm"),
    ],
)
def test_changed_models_are_noticed(change: Any) -> None:
    optimized = tilewright.llm.optimize(tiny_llama(3))
    before = optimized(prompt()).logits
    change(optimized)
    actual = optimized(prompt()).logits
    expected = decoder_of(optimized).original(prompt()).logits
    assert not torch.equal(expected.float(), before)
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])
    assert calls(optimized) == 2


@torch.no_grad()
def test_changes_are_noticed_at_a_single_token_and_nothing_else_captures_again() -> None:
    optimized = tilewright.llm.optimize(tiny_llama(3))
    decoder, token = decoder_of(optimized), prompt()[:, :1]
    for _ in range(2):
        optimized.generate(prompt(), max_new_tokens=4, do_sample=False)
    cache = optimized(prompt(), use_cache=True).past_key_values
    programs = dict(decoder.model_programs.made)
    optimized(token, past_key_values=cache)
    assert decoder.model_programs.made == programs, "captured again although nothing changed"
    optimized.model.layers[0].self_attn.scaling *= 2
    cache = optimized(prompt(), use_cache=True).past_key_values
    fresh = decoder.original(prompt(), use_cache=True).past_key_values
    optimized.model.layers[0].self_attn.scaling *= 2
    actual = optimized(token, past_key_values=cache).logits
    expected = decoder.original(token, past_key_values=fresh).logits
    torch.testing.assert_close(actual, expected, **TOLERANCE[expected.dtype])


@torch.no_grad()
def test_hooks_that_come_later_see_their_values() -> None:
    optimized = tilewright.llm.optimize(tiny_llama(3))
    expected = optimized(prompt()).logits
    seen: list[torch.Tensor] = []
    inner = optimized.model.layers[1].mlp.register_forward_hook(lambda m, a, y: seen.append(y))
    torch.testing.assert_close(optimized(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1 and type(seen[0]) is torch.Tensor
    reason = "model.layers.1.mlp has forward hooks"
    assert reason in next(iter(decoder_of(optimized).fallbacks))
    inner.remove()
    outer = optimized.register_forward_hook(lambda m, a, y: seen.append(y.logits))
    optimized(prompt())
    outer.remove()
    assert len(seen) == 2 and decoder_of(optimized).calls == 2


@torch.no_grad()
def test_copies_have_programs_of_their_own() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    model(prompt())
    copied = copy.deepcopy(model)
    copied.lm_head.weight.mul_(2)
    torch.testing.assert_close(
        copied(prompt()).logits, decoder_of(copied).original(prompt()).logits, rtol=1e-4, atol=1e-4
    )
    assert decoder_of(copied) is not decoder_of(model)
    assert calls(copied) == 1 and calls(model) == 1


@torch.no_grad()
def test_saving_and_loading() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    expected = model(prompt()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(prompt()).logits, expected)
    assert calls(loaded) == 1
    assert model.state_dict().keys() == tiny_llama(3).state_dict().keys()


@torch.no_grad()
def test_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 8)).eval()
    optimized = tilewright.llm.optimize(model)
    x = torch.randn(5, 64)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
    assert tilewright.explain(optimized).to_dict()["own_flops_share"] == 1.0
    assert installed_in(tilewright.llm.restore(optimized)) is None


@torch.no_grad()
def test_a_model_that_dynamo_cannot_take_either(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright import model_programs

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("planted")

    def fail(*_: Any, **__: Any) -> None:
        raise torch._dynamo.exc.Unsupported("planted, too")

    monkeypatch.setattr(model_programs, "planned_model", refuse)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    reference = tiny_llama(2)
    optimized = tilewright.llm.optimize(reference)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        optimized.generate(prompt(), **settings), reference.generate(prompt(), **settings)
    )
    ((reason, count),) = decoder_of(optimized).fallbacks.items()
    assert reason == "planted; by parts: planted, too" and count == 4


@torch.no_grad()
def test_a_model_whose_cache_cannot_be_made() -> None:
    model, reference = tiny_llama(2), tiny_llama(2)
    reference.load_state_dict(model.state_dict())
    model.config.layer_types = ["of a kind of its own"] * 2
    optimized = tilewright.llm.optimize(model, inplace=True)
    ids = prompt()
    for _ in range(2):
        got = optimized(ids, use_cache=False).logits
        torch.testing.assert_close(got, reference(ids, use_cache=False).logits)
    assert "of a kind of its own" in next(iter(decoder_of(optimized).fallbacks))


@torch.no_grad()
def test_models_that_cannot_be_captured_say_why() -> None:
    from transformers import MambaConfig

    from tiny_models import build

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = build(MambaConfig(**sizes, pad_token_id=0, eos_token_id=None))
    optimized = tilewright.llm.optimize(model)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(optimized(ids).logits, model(ids).logits)
    explanation = tilewright.explain(optimized).to_dict()
    assert not explanation["by_parts"]
    assert explanation["fallbacks"] and explanation["regions"][0]["fallback"]
    assert explanation["regions"][0]["reason"]
