"""What a call of an optimised model may ask for: results are eager's, by our path or by eager's.

Two structures: one whose layers are stamped, and one with windows and softcaps, whose layers are
captured one by one and whose cache eager would have cut.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

pytest.importorskip("tilewright._core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "campaign"))

from architectures import ARCHITECTURES, build, prompt

import tilewright
from tilewright.decoder import decoder_of
from tilewright.model_output import model_output

NAMES = ("qwen2", "gemma2")


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    eager = build(ARCHITECTURES[request.param])
    return eager, tilewright.llm.optimize(eager)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


GENERATION: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams with padding": {"num_beams": 2, "batch": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunks of the prompt": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mode", GENERATION)
def test_generation(pair: tuple[Any, Any], mode: str) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **GENERATION[mode]}
    batch = settings.pop("batch", 1)
    given = prompt(batch, 21, padding=batch > 1)
    expected, got = (model.generate(**given, **settings).tolist() for model in pair)
    assert got == expected


def test_assisted_generation(pair: tuple[Any, Any]) -> None:
    eager, ours = pair
    assistant = build(ARCHITECTURES["qwen2"])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = eager.generate(**prompt(1, 21), **settings)
    got = ours.generate(**prompt(1, 21), **settings, assistant_model=assistant)
    assert got.tolist() == expected.tolist()


def test_sampling_with_processors(pair: tuple[Any, Any]) -> None:
    results = []
    for model in pair:
        torch.manual_seed(5)
        settings = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}
        results.append(model.generate(**prompt(2, 9), max_new_tokens=8, **settings).tolist())
    assert results[0] == results[1]


def test_scores_states_and_attentions_of_generate(pair: tuple[Any, Any]) -> None:
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    expected, got = (model.generate(**prompt(2, 20, padding=True), **settings) for model in pair)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(got.scores, expected.scores, strict=True):
        close(a, b)
    close(got.hidden_states[1][-1], expected.hidden_states[1][-1])


def test_hidden_states_attentions_labels_and_embeddings(pair: tuple[Any, Any]) -> None:
    eager, ours = pair
    ids = prompt(2, 19)["input_ids"]
    packed = torch.cat([torch.arange(8), torch.arange(11)])[None].expand(2, -1)
    with torch.no_grad():
        for arguments in (
            {"input_ids": ids, "output_hidden_states": True},
            {"input_ids": ids, "labels": ids},
            {"inputs_embeds": eager.get_input_embeddings()(ids)},
            {"input_ids": ids, "logits_to_keep": 3},
            {"input_ids": ids, "use_cache": False},
            {"input_ids": ids, "return_dict": False},
            {"input_ids": ids, "position_ids": packed, "use_cache": False},
            {"input_ids": ids, "position_ids": packed},
            {"input_ids": ids, "position_ids": torch.arange(19).flip(0)[None].expand(2, -1)},
        ):
            expected, got = eager(**arguments), ours(**arguments)
            if isinstance(expected, tuple):
                close(got[0], expected[0])
                continue
            close(got.logits, expected.logits)
            assert (got.past_key_values is None) == (expected.past_key_values is None)
            if expected.get("loss") is not None:
                close(got.loss, expected.loss)
            for a, b in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
                close(a, b)


def test_attentions(pair: tuple[Any, Any]) -> None:
    eager, ours = pair
    for model in pair:
        model.set_attn_implementation("eager")
    ids = prompt(1, 18)["input_ids"]
    with torch.no_grad():
        expected, got = (model(ids, output_attentions=True) for model in (eager, ours))
    assert len(got.attentions) == len(expected.attentions)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        close(a, b)


def test_what_is_no_cache_is_refused_as_eager_refuses_it(pair: tuple[Any, Any]) -> None:
    eager, model = pair
    tokens = torch.tensor([[3, 5]])
    for given in (((torch.zeros(1, 2, 1, 8),) * 2,), 7):
        refused = []
        for called in (eager, model):
            with torch.inference_mode(), pytest.raises(Exception) as caught:
                called(tokens, past_key_values=given)
            refused.append((caught.type, str(caught.value)))
        assert refused[0] == refused[1]


def test_interleaved_conversations_and_steps_of_several_tokens(pair: tuple[Any, Any]) -> None:
    """Two caches take turns, with 1, 2, 5 and 16 tokens at a time, past the window."""
    from transformers import DynamicCache

    results: list[list[torch.Tensor]] = []
    for model in pair:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        logits = []
        with torch.no_grad():
            for tokens in (3, 1, 2, 16, 5, 1):
                for i, cache in enumerate(caches):
                    ids = prompt(i + 1, tokens)["input_ids"]
                    logits.append(model(ids, past_key_values=cache).logits)
        results.append(logits)
    for a, b in zip(results[1], results[0], strict=True):
        close(a, b)
    assert not decoder_of(pair[1]).fallbacks


def test_a_windowed_cache_that_eager_filled() -> None:
    """It holds the last tokens of each windowed layer only: such a call stays with eager."""
    from transformers import DynamicCache

    eager = build(ARCHITECTURES["gemma2"])
    ours = tilewright.llm.optimize(eager)
    results = []
    for model in (eager, ours):
        cache = DynamicCache(config=eager.config)
        with torch.no_grad():
            eager(prompt(1, 30)["input_ids"], past_key_values=cache)
            results.append(model(prompt(1, 2)["input_ids"], past_key_values=cache).logits)
    close(results[1], results[0])
    (reason,) = decoder_of(ours).fallbacks
    assert "window" in reason


def test_outputs_are_what_their_constructors_make() -> None:
    logits = torch.ones(1, 2, 3)

    @dataclasses.dataclass
    class Own(CausalLMOutputWithPast):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.loss = 7

    @dataclasses.dataclass
    class Reversed(ModelOutput):
        past_key_values: Any = None
        logits: torch.Tensor | None = None

    @dataclasses.dataclass
    class WithDefault(ModelOutput):
        logits: torch.Tensor | None = None
        past_key_values: Any = None
        kind: Any = dataclasses.field(default=None, init=False)

    class Undecorated(CausalLMOutputWithPast):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given, loss=7)

    for kind in (CausalLMOutputWithPast, Own, Reversed, WithDefault, Undecorated):
        for given in ({"logits": logits}, {"logits": logits, "past_key_values": "cache"}):
            expected, made = kind(**given), model_output(kind, **given)
            assert type(made) is kind and vars(made) == vars(expected)
            assert list(made.items()) == list(expected.items())
            assert made.to_tuple() == expected.to_tuple() and made.logits is logits
            made.past_key_values = "another"
            assert made["past_key_values"] == "another"
