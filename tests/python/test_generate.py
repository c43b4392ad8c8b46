"""generate(): through optimised models, compiled models, and both, with steps counted."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from transformers import LlamaConfig, MistralConfig

from tiny_models import build, llama_config, padded, prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import backend as backends
from tilewright import core, rotary
from tilewright.decoder import decoder_of

NEW = 6


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    yield
    torch._dynamo.reset()


def generate(model: Any, **arguments: Any) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **arguments}
    if "input_ids" not in settings:
        settings["input_ids"] = prompt()
    return model.generate(**settings).tolist()


def compiled_steps(model: Any) -> int:
    parameters = {id(parameter) for parameter in model.parameters()}
    return sum(
        graph.calls
        for graph in backends.graphs
        if graph.owns(parameters) and graph.executable is not None
    )


MODES = {
    "greedy": {},
    "batch": {"input_ids": prompt(3, 7)},
    "left padding": padded([9, 5, 7]),
    "left padding of several blocks": padded([230, 70, 165]),
    "beams": {"num_beams": 3},
    "beams and padding": {**padded([6, 4]), "num_beams": 2},
    "returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "one token": {"input_ids": prompt(1, 1)},
}


@pytest.mark.parametrize("mode", MODES)
def test_optimised_models_generate_like_eager(mode: str) -> None:
    model = tiny_llama(3)
    expected = generate(model, **MODES[mode])
    optimized = tilewright.llm.optimize(model)
    assert generate(optimized, **MODES[mode]) == expected
    decoder = decoder_of(optimized)
    assert decoder is not None and not decoder.fallbacks, decoder.fallbacks
    assert decoder.calls >= NEW


@torch.no_grad()
@pytest.mark.parametrize("stored", ["auto", "int8"])
@pytest.mark.parametrize("window", [0, 300])
def test_a_padded_or_windowed_sequence_has_the_bits_that_it_has_alone(
    stored: str, window: int
) -> None:
    """What is before its first token does not move its blocks, nor what of them is one chunk."""
    settings = llama_config(1, head_dim=64, max_position_embeddings=1024).to_dict()
    if window > 0:
        settings["sliding_window"] = window
    config = MistralConfig(**settings) if window > 0 else LlamaConfig(**settings)
    model = tilewright.llm.optimize(build(config, torch.bfloat16), kv_cache_dtype=stored)
    together = padded([650, 420])
    lonely = together["input_ids"][1:, 230:]
    arguments = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    both, alone = model.generate(**together, **arguments), model.generate(lonely, **arguments)
    assert both.sequences[1, 650:].tolist() == alone.sequences[0, 420:].tolist()
    for of_both, of_one in zip(both.logits, alone.logits, strict=True):
        assert torch.equal(of_both[1], of_one[0])
    decoder = decoder_of(model)
    assert decoder is not None and not decoder.fallbacks, decoder.fallbacks


@torch.no_grad()
@pytest.mark.parametrize("mode", [{"input_ids": prompt(1, 420)}, padded([620, 450])])
def test_tokens_behind_a_window_of_several_parts_are_eagers(mode: dict[str, torch.Tensor]) -> None:
    settings = llama_config(2, max_position_embeddings=1024, sliding_window=300).to_dict()
    model = build(MistralConfig(**settings))
    expected = generate(model, **mode)
    optimized = tilewright.llm.optimize(model)
    assert generate(optimized, **mode) == expected
    decoder = decoder_of(optimized)
    assert decoder is not None and not decoder.fallbacks, decoder.fallbacks


def test_sampling_with_a_seed() -> None:
    model = tiny_llama(3)
    results = []
    for candidate in (model, tilewright.llm.optimize(model)):
        torch.manual_seed(3)
        results.append(generate(candidate, do_sample=True, temperature=0.7))
    assert results[0] == results[1]


def test_a_conversation_continues_in_its_cache() -> None:
    from transformers import DynamicCache

    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    results = []
    for candidate in (model, optimized):
        cache = DynamicCache(config=model.config)
        first = candidate.generate(
            prompt(), max_new_tokens=3, do_sample=False, past_key_values=cache
        )
        more = torch.cat([first, prompt(1, 4)], 1)
        second = candidate.generate(more, max_new_tokens=3, do_sample=False, past_key_values=cache)
        results.append(second.tolist())
    assert results[0] == results[1]
    assert not decoder_of(optimized).fallbacks


def test_cache_operations() -> None:
    from transformers import DynamicCache

    model = tiny_llama(3)
    optimized = tilewright.llm.optimize(model)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for candidate, cache in zip((model, optimized), caches, strict=True):
            candidate(prompt(2, 70), past_key_values=cache)

    def same() -> None:
        theirs, ours = caches
        assert ours.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(theirs.layers, ours.layers, strict=True):
            torch.testing.assert_close(b.keys, a.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(b.values, a.values, rtol=1e-4, atol=1e-4)

    same()
    for operation in (
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([3, 0, 1])),
    ):
        for cache in caches:
            operation(cache)
        same()
    for cache in caches:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys * 2, layer.values * 3
    same()
    with torch.no_grad():
        logits = [
            candidate(prompt(3, 2), past_key_values=cache).logits
            for candidate, cache in zip((model, optimized), caches, strict=True)
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    for cache in caches:
        cache.reset()
    assert caches[1].get_seq_length() == 0


@pytest.mark.parametrize("form", ["torch.compile", "model.compile"])
def test_compiled_models_generate_in_our_programs(form: str) -> None:
    """Plain PyTorch runs torch.compile(model).generate() eagerly, silently."""
    model = tiny_llama(2)
    expected = generate(model)
    if form == "torch.compile":
        compiled = torch.compile(model, backend="tilewright")
    else:
        compiled = model
        model.compile(backend="tilewright")
    assert generate(compiled) == expected
    assert compiled_steps(model) == NEW
    if form == "torch.compile":
        assert model._compiled_call_impl is None
        assert generate(model) == expected and compiled_steps(model) == NEW


def test_no_more_compiles_than_with_another_backend_and_kernels_only_once() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    model = tiny_llama(2)
    model.compile(backend=counter)
    lengths = (9, 4, 17, 1, 6)
    expected = [generate(model, input_ids=prompt(1, n)) for n in lengths]
    torch._dynamo.reset()
    model = tiny_llama(2)
    model.compile(backend="tilewright")
    before = set(backends.graphs)
    assert [generate(model, input_ids=prompt(1, n)) for n in lengths] == expected
    assert 0 < len(set(backends.graphs) - before) <= counter.frame_count
    emitted = core.engine().kernel_counters()["emitted"]
    assert [generate(model, input_ids=prompt(1, n)) for n in lengths] == expected
    assert core.engine().kernel_counters()["emitted"] == emitted
    optimized = tilewright.llm.optimize(tiny_llama(2))
    assert [generate(optimized, input_ids=prompt(1, n)) for n in lengths] == expected
    for known in (False, True):  # a first time for each class of M, whose number is the CPU's
        emitted = core.engine().kernel_counters()["emitted"]
        for n in range(2, 24):
            generate(optimized, input_ids=prompt(1, n))
        assert not known or core.engine().kernel_counters()["emitted"] == emitted


def test_other_backends_are_left_alone() -> None:
    model = tiny_llama(2)
    torch.compile(tiny_llama(2), backend="tilewright")
    compiled = torch.compile(model, backend="eager")
    assert compiled.generate == model.generate


@pytest.mark.parametrize("form", ["torch.compile", "model.compile", "forward"])
def test_both_lines(form: str) -> None:
    model = tiny_llama(3)
    expected = generate(model)
    optimized = tilewright.llm.optimize(model)
    decoder = decoder_of(optimized)
    compiled: Any = optimized
    if form == "torch.compile":
        compiled = torch.compile(optimized, backend="tilewright")
    elif form == "model.compile":
        optimized.compile(backend="tilewright")
    else:
        optimized.forward = torch.compile(optimized.forward, backend="tilewright")
    assert generate(compiled) == expected
    assert decoder is not None and decoder.calls == NEW and not decoder.fallbacks


def test_both_lines_as_one_graph_and_undone() -> None:
    model = tiny_llama(3)
    expected = generate(model)
    optimized = tilewright.llm.optimize(model, inplace=True)
    compiled = torch.compile(optimized, backend="tilewright", fullgraph=True)
    assert generate(compiled) == expected
    assert decoder_of(model).calls == NEW and compiled_steps(model) == 0
    with torch.no_grad():
        assert compiled(prompt()).logits.shape == (1, 9, 160)
    tilewright.llm.restore(model)
    assert generate(compiled) == expected
    assert compiled_steps(model) == NEW


def test_threads_take_turns() -> None:
    import threading

    model = tiny_llama(3)
    expected = [generate(model, input_ids=prompt(1, n)) for n in (4, 6, 8)]
    optimized = tilewright.llm.optimize(model)
    results: dict[int, list[list[int]]] = {}

    def work(index: int, tokens: int) -> None:
        results[index] = generate(optimized, input_ids=prompt(1, tokens))

    threads = [threading.Thread(target=work, args=(i, n)) for i, n in enumerate((4, 6, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(3)] == expected


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_prefix_is_reused_by_copies_of_its_cache(duplicate: Callable[[Any], Any]) -> None:
    """Also of a padded one: a copy knows where its sequences begin."""
    plain, model = tiny_llama(3), tilewright.llm.optimize(tiny_llama(3))
    prefix = padded([9, 5])
    expected, actual = (m(**prefix).past_key_values for m in (plain, model))
    for seed in (3, 4):
        ids = prompt(2, seed)
        mask = torch.cat([prefix["attention_mask"], torch.ones_like(ids)], dim=-1)
        positions = (mask.cumsum(-1) - 1)[:, -seed:]
        logits, wanted = (
            m(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=duplicate(cache),
            ).logits
            for m, cache in ((model, actual), (plain, expected))
        )
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert actual.get_seq_length() == 9
    assert not tilewright.explain(model).fallbacks


def test_only_transformers_rotary_tables_grow() -> None:
    """A user's module may mean anything by these words."""

    class Other(torch.nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.rope_type = kind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    others = torch.nn.ModuleList([Other(kind) for kind in ("dynamic", None, 3, {"a": "dynamic"})])
    assert rotary.growing_tables(others) == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("dynamic", {}),
        ("yarn", {"original_max_position_embeddings": 16}),
        (
            "llama3",
            {
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        (
            "longrope",
            {
                "original_max_position_embeddings": 16,
                "short_factor": [1 + 0.1 * i for i in range(8)],
                "long_factor": [2 + 0.3 * i for i in range(8)],
            },
        ),
    ],
)
def test_scaled_rotary_tables(kind: str, settings: dict[str, Any]) -> None:
    """Also beyond the length that the model was made for, and back."""
    from transformers import LlamaForCausalLM

    config = llama_config(3)
    config.max_position_embeddings = 32
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **settings}
    torch.manual_seed(0)
    eager = LlamaForCausalLM(config).eval()
    ours = tilewright.llm.optimize(copy.deepcopy(eager), inplace=True)
    decoder = decoder_of(ours)
    assert decoder is not None
    steps = []
    for length in (9, 28, 9, 9):
        before = decoder.calls
        ids = prompt(1, length)
        expected = generate(eager, input_ids=ids, max_new_tokens=12)
        assert generate(ours, input_ids=ids, max_new_tokens=12) == expected, length
        assert torch.allclose(ours(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-5)
        steps.append(decoder.calls - before)
    calls = [phase["fallback_calls"] for phase in tilewright.explain(ours).phases.values()]
    assert calls == [0, 0]
    # A dynamic table: five steps within, seven beyond, then one that goes back.
    assert steps == ([13, 5, 13, 13] if kind == "dynamic" else [13] * 4), decoder.fallbacks
