"""kv_cache_dtype="int8": the tokens are those of eager over a cache that rounds each row to 8 bits;
bits depend on neither threads, pieces of a prompt, plans nor copies; or a reason why not.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tiny_models import padded, prompt, tiny_llama

pytest.importorskip("tilewright._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaign"))

import architectures

import tilewright
from tilewright import core, plans
from tilewright.cache import BlockLayer
from tilewright.decoder import decoder_of

NEW = 8
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row as 8 bits and a scale hold it: what jit/base/eight_bits.h says, once more."""
    exact = x.float().abs().amax(-1, keepdim=True) / 127
    scale = ((exact.view(torch.int32) + 0x7F) & ~0x7F).view(torch.float32)
    return (torch.where(scale > 0, x.float() / scale, 0.0).round() * scale).to(x.dtype)


class RoundedLayer(DynamicLayer):
    def update(self, key_states: Any, value_states: Any, *more: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states), rounded(value_states), *more, **kwargs)


def rounding_cache(model: Any) -> Cache:
    """For eager. Layers with a window keep all tokens; masks hide them."""
    count = model.config.num_hidden_layers
    return Cache(layers=[RoundedLayer() for _ in range(count)])


def eight_bit(model: Any, **more: Any) -> Any:
    return tilewright.llm.optimize(model, kv_cache_dtype="int8", **more)


def only_ours(model: Any) -> None:
    """All steps ran in our kernels, over caches of int8."""
    decoder = decoder_of(model)
    assert decoder is not None and not decoder.fallbacks and decoder.calls > 0
    explanation = tilewright.explain(model)
    assert explanation.kv_cache == "int8" and not explanation.not_stored
    calls = [phase["fallback_calls"] for phase in explanation.phases.values()]
    assert calls == [0, 0], str(explanation)
    attention = [r["kernel"] for r in explanation.regions if r["name"] == "attention"]
    assert attention and all("cache=i8" in kernel for kernel in attention), attention
    assert "keys and values are kept in int8" in str(explanation)


MODES: dict[str, dict[str, Any]] = {
    "batch": {"input_ids": prompt(3, 70)},
    "left padding": padded([9, 5, 40]),
    "beams and padding": {**padded([6, 24]), "num_beams": 2},
    "prefill in chunks": {"input_ids": prompt(1, 50), "prefill_chunk_size": 20},
    "one token": {"input_ids": prompt(1, 1)},
}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_eager_over_rounded_keys_and_values(mode: str) -> None:
    model = tiny_llama(3)
    settings = {**SETTINGS, **MODES[mode]}
    expected = model.generate(**settings, past_key_values=rounding_cache(model))
    ours = eight_bit(model)
    assert ours.generate(**settings).tolist() == expected.tolist()
    only_ours(ours)


@torch.no_grad()
def test_the_other_ways_to_generate() -> None:
    model = tiny_llama(3)
    ids = prompt(1, 30)
    expected = model.generate(ids, **SETTINGS, past_key_values=rounding_cache(model)).tolist()
    ours = eight_bit(model)
    assert ours.generate(ids, **SETTINGS, cache_implementation="static").tolist() == expected
    assert ours.generate(ids, **SETTINGS, prompt_lookup_num_tokens=3).tolist() == expected
    only_ours(ours)


ARCHITECTURE_NAMES = {
    "mistral": "a window in every layer",
    "gemma2": "a window in every other layer, softcaps",
    "gpt_oss": "attention sinks",
    "bloom": "ALiBi, attention that the model spells out",
    "qwen2": "biases, groups",
}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_architectures(name: str) -> None:
    model = architectures.build({**architectures.others(), **architectures.ARCHITECTURES}[name])
    ours = eight_bit(model)
    mine, theirs = DynamicCache(), rounding_cache(model)
    for tokens in (prompt(2, 40), prompt(2, 1), prompt(2, 3)):
        tokens = tokens.clamp(max=model.config.vocab_size - 1)
        expected = model(tokens, past_key_values=theirs).logits
        got = ours(tokens, past_key_values=mine).logits
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    only_ours(ours)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_close_and_the_cache_is_small(dtype: torch.dtype) -> None:
    model = tiny_llama(3, dtype)
    logits, used = [], []
    for ours in (tilewright.llm.optimize(model), eight_bit(model)):
        cache = DynamicCache()
        ours(prompt(2, 60), past_key_values=cache)
        logits.append(ours(prompt(2, 1), past_key_values=cache).logits.float())
        used.append(sum(layer.blocks.bytes for layer in cache.layers))
        assert cache.layers[0].keys.dtype == dtype
    head_dim = 16
    assert used[1] / used[0] == (head_dim + 4) / (head_dim * dtype.itemsize)
    wanted, got = logits
    assert 0 < (got - wanted).norm() <= 0.03 * wanted.norm()
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > 0.999


@torch.no_grad()
def test_bits_depend_on_neither_threads_nor_pieces_of_a_prompt() -> None:
    ours = eight_bit(tiny_llama(3))
    ids = prompt(2, 90)
    before, results = torch.get_num_threads(), []
    try:
        for threads, pieces in ((1, [90]), (2, [90]), (2, [30, 60]), (1, [50, 40])):
            torch.set_num_threads(threads)
            cache = DynamicCache()
            for piece in ids.split(pieces, 1):
                logits = ours(piece, past_key_values=cache).logits[:, -1:]
            results.append([logits, ours(prompt(2, 1), past_key_values=cache).logits])
            results[-1] += [t for layer in cache.layers for t in (layer.keys, layer.values)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@torch.no_grad()
def test_a_plan_is_of_one_type_of_cache() -> None:
    make = lambda: tiny_llama(3, intermediate_size=112)  # noqa: E731 - of no other test
    tokens, made = [], []
    for stored in ("auto", "int8", "int8", "auto"):
        before = plans.counters()
        ours = tilewright.llm.optimize(make(), inplace=True, kv_cache_dtype=stored)
        cache = DynamicCache()
        logits = ours(prompt(2, 40), past_key_values=cache).logits
        tokens.append([logits, ours(prompt(2, 1), past_key_values=cache).logits])
        after = plans.counters()
        made.append([after[name] - before[name] for name in ("captured", "loaded")])
        assert cache.layers[0].blocks.dtype == ("i8" if stored == "int8" else "f32")
    assert made == [[1, 0], [1, 0], [0, 1], [0, 1]]
    for a, b in ((0, 3), (1, 2)):
        assert all(torch.equal(x, y) for x, y in zip(tokens[a], tokens[b], strict=True))
    assert not torch.equal(tokens[0][1], tokens[1][1])


def exact(layer: BlockLayer) -> list[torch.Tensor]:
    """Keys and values as the blocks have them."""
    blocks = layer.blocks
    shape = (blocks.batch, blocks.kv_heads, blocks.length, blocks.head_dim)
    tensors = [torch.empty(shape), torch.empty(shape)]
    blocks.read("f32", *(tensor.data_ptr() for tensor in tensors))
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_pickles_and_selections_are_the_same_rows(dtype: torch.dtype) -> None:
    ours = eight_bit(tiny_llama(2, dtype))
    cache = DynamicCache()
    ours(prompt(3, 70), past_key_values=cache)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for each in copies:
        for a, b in zip(cache.layers, each.layers, strict=True):
            assert all(torch.equal(*pair) for pair in zip(exact(a), exact(b), strict=True))
    expected = ours(prompt(3, 1), past_key_values=cache).logits
    for each in copies:
        assert each.layers[0].blocks.dtype == "i8" and each.layers[0].dtype == dtype
        assert torch.equal(ours(prompt(3, 1), past_key_values=each).logits, expected)
    only_ours(ours)
    # One sequence more, another order, a token back: as if it had been so.
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    got = ours(prompt(3, 1)[[2, 2, 1, 1]], past_key_values=cache).logits
    assert torch.equal(got, expected[[2, 2, 1, 1]])
    # What code outside assigns is rounded, in the model's type.
    layer = cache.layers[0]
    keys, values = torch.randn(4, 2, 9, 16, dtype=dtype), torch.randn(4, 2, 9, 16, dtype=dtype)
    layer.keys, layer.values = keys, values
    assert torch.equal(layer.keys, rounded(keys)) and torch.equal(layer.values, rounded(values))


@torch.no_grad()
def test_caches_of_other_types_become_those_of_the_model() -> None:
    model = tiny_llama(2)
    plain, ours = tilewright.llm.optimize(model), eight_bit(model)
    cache = DynamicCache()
    expected = ours(prompt(2, 40), past_key_values=cache)
    wanted = ours(prompt(2, 1), past_key_values=copy.deepcopy(cache)).logits
    for first in (model, plain):  # tensors, and blocks of fp32
        given = DynamicCache(config=model.config)
        first(prompt(2, 40), past_key_values=given)
        got = ours(prompt(2, 1), past_key_values=given).logits
        assert given.layers[0].blocks.dtype == "i8"
        # Layers behind the first saw keys that were not rounded.
        assert (got - wanted).norm() < 0.03 * wanted.norm()
    got = plain(prompt(2, 1), past_key_values=cache).logits  # as they are, from now on in fp32
    assert cache.layers[0].blocks.dtype == "f32" and cache.layers[0].get_seq_length() == 41
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert not decoder_of(plain).fallbacks and not decoder_of(ours).fallbacks
    assert expected.logits.isfinite().all()


@torch.no_grad()
def test_a_step_of_eager_sees_and_leaves_rounded_rows() -> None:
    model = tiny_llama(2)
    ours = eight_bit(model)
    mine, theirs = DynamicCache(), rounding_cache(model)
    for step, tokens in enumerate((prompt(1, 30), prompt(1, 4), prompt(1, 1))):
        given = {"inputs_embeds": model.get_input_embeddings()(tokens)}  # is not for a program
        given = given if step == 1 else {"input_ids": tokens}
        got = ours(**given, past_key_values=mine).logits
        expected = model(tokens, past_key_values=theirs).logits
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert sum(decoder_of(ours).fallbacks.values()) == 1
    assert isinstance(mine.layers[1], BlockLayer) and mine.layers[1].blocks.dtype == "i8"


@torch.no_grad()
@pytest.mark.parametrize("chosen", [True, False])
def test_continuous_batching_keeps_its_pages_in_the_models_type(chosen: bool) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = tiny_llama(3)
    if not chosen:
        model._supports_logits_to_keep = lambda: False
    results = []
    for ours in (tilewright.llm.optimize(model), eight_bit(model)):
        outputs = ours.generate_batch(
            [prompt(1, n)[0].tolist() for n in (3, 40, 17)],
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=NEW, eos_token_id=-1
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=64, max_batch_tokens=48
            ),
        )
        results.append([output.generated_tokens for output in outputs.values()])
        assert not decoder_of(ours).fallbacks and decoder_of(ours).calls
    assert results[0] == results[1]


def test_regions_are_right() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        comparison = tilewright.compare(
            eight_bit(tiny_llama(2, dtype)), {"input_ids": prompt(2, 9)}
        )
        assert comparison.first is None, str(comparison)
        names = " ".join(region.name for region in comparison.regions)
        assert "kv_append" in names and "attention" in names
        assert all(not region.reason for region in comparison.regions), str(comparison)


@torch.no_grad()
def test_a_model_that_cannot_have_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512" in core.engine().target()["isa"]:
        pytest.skip("any head_dim has a kernel with AVX-512")
    model = tiny_llama(2, head_dim=20)
    expected = model.generate(prompt(), **SETTINGS)
    ours = eight_bit(model)
    assert torch.equal(ours.generate(prompt(), **SETTINGS), expected)
    explanation = tilewright.explain(ours)
    reason = "keys and values are not in int8: "
    assert explanation.not_stored.startswith(reason) and "head_dim 20" in explanation.not_stored
    assert explanation.kv_cache == "" and reason in str(explanation)
    assert not decoder_of(ours).fallbacks and decoder_of(ours).calls
    monkeypatch.setitem(core.settings(), "strict", True)
    with pytest.raises(RuntimeError, match=r"STRICT=1.*head_dim 20"):
        eight_bit(model)(prompt())


def test_what_is_no_type_of_a_cache_is_refused() -> None:
    model = tiny_llama(1)
    for wrong in ("int4", torch.float32, 8):
        with pytest.raises(ValueError, match="kv_cache_dtype is None, 'auto' or 'int8', not"):
            tilewright.llm.optimize(model, kv_cache_dtype=wrong)
    with pytest.raises(ValueError, match="causal language models"):
        tilewright.llm.optimize(torch.nn.Linear(2, 2).eval(), kv_cache_dtype="int8")
    assert decoder_of(model) is None


def test_the_environment_asks_for_it_and_the_argument_comes_first(run_python: Any) -> None:
    code = """
import torch, tilewright
from transformers import DynamicCache
from tiny_models import prompt, tiny_llama
for asked in (None, "auto", "int8"):
    model = tilewright.llm.optimize(tiny_llama(1), kv_cache_dtype=asked)
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    print(cache.layers[0].blocks.dtype)
tilewright.llm.optimize(torch.nn.Linear(2, 2).eval())  # a variable is no demand
"""
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    for variable, expected in (("int8", ["i8", "f32", "i8"]), ("auto", ["f32", "f32", "i8"])):
        done = run_python(setup + code, {"TILEWRIGHT_KV_CACHE": variable})
        assert done.stdout.split() == expected


def test_prewarm_fills_the_cache_for_it(
    command: Any, fresh_cache: Path, run_python: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    tiny_llama(2).save_pretrained(directory)
    command("prewarm", str(directory), "--kv-cache-dtype", "int4", code=2)
    command("prewarm", str(directory), "--kv-cache-dtype", "int8")
    use = f"""
import torch, tilewright
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}).eval()
model = tilewright.llm.optimize(model, inplace=True, kv_cache_dtype="int8")
ids = torch.arange(1, 40).reshape(1, -1)
with torch.no_grad():
    model(ids)
model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
stats = tilewright.stats()
assert stats["kernels"]["emitted"] == 0 < stats["kernels"]["loaded"], stats
assert stats["plans"]["captured"] == 0 and stats["plans"]["loaded"] == 2, stats
assert "cache=i8" in str(tilewright.explain(model))
"""
    run_python(use, {"TILEWRIGHT_CACHE_DIR": str(fresh_cache), "TILEWRIGHT_CACHE": "rw"})
