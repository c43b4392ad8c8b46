"""transformers' continuous batching (`generate_batch`) on our kernels: each request gets the tokens
that eager gives it alone, prompts and decode steps of all lengths in one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig

import tilewright
from tilewright.decoder import Decoder, decoder_of
from tiny_models import VOCABULARY, build, llama_config, prompt, tiny_llama

LENGTHS = (3, 90, 1, 17, 40, 16, 7, 33)
NEW = 9


def prompts() -> list[list[int]]:
    return [prompt(1, length)[0].tolist() for length in LENGTHS]


def lonely(model: Any, given: list[list[int]], **arguments: Any) -> list[list[int]]:
    """Each request alone, by transformers' loop."""
    arguments = {"do_sample": False, "max_new_tokens": NEW, **arguments}
    return [
        model.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist() for ids in given
    ]


def batched(
    model: Any, given: list[list[int]], generation: dict[str, Any] | None = None, **config: Any
) -> list[list[int]]:
    """max_batch_tokens: prompts longer than that come in pieces, beside steps of decode."""
    config = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 48, **config}
    outputs = model.generate_batch(
        given,
        generation_config=GenerationConfig(
            **{"do_sample": False, "max_new_tokens": NEW, "eos_token_id": -1, **(generation or {})}
        ),
        continuous_batching_config=ContinuousBatchingConfig(**config),
    )
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


def only_ours(model: Any) -> Decoder:
    """Its decoder, after steps that were all ours."""
    decoder = decoder_of(model)
    assert decoder is not None and decoder.fallbacks == {} and decoder.calls > 0
    reports = [executable.program.report() for executable in decoder.programs()]
    assert all(r[phase]["fallback_calls"] == 0 for r in reports for phase in ("prefill", "decode"))
    return decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_request_gets_its_lonely_tokens(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    optimized = tilewright.llm.optimize(model)
    # Eager rounds bf16 in other places: there, what the optimised model gives each one alone.
    wanted = lonely(model if dtype == torch.float32 else optimized, prompts())
    before = optimized.forward.calls
    assert batched(optimized, prompts()) == wanted
    decoder = only_ours(optimized)
    # Steps of one token per request beside prompts: fewer than one request after the other takes.
    assert decoder.calls - before < len(LENGTHS) * NEW / 2
    whole = {"max_batch_tokens": 512, "page_size": 4, "num_blocks": 256}
    assert batched(optimized, prompts(), **whole) == wanted
    # No new programs: the same captured ones served both.
    assert len(decoder.programs()) <= 3


def test_an_inplace_model_keeps_its_packed_weights() -> None:
    model = tiny_llama()
    wanted = lonely(model, prompts())
    optimized = tilewright.llm.optimize(model, inplace=True)
    assert batched(optimized, prompts()) == wanted
    only_ours(optimized)
    assert batched(torch.compile(optimized, backend="tilewright"), prompts()) == wanted
    only_ours(optimized)


def test_the_way_attention_is_switched_makes_no_new_program() -> None:
    """An eager model's attention function is another while requests run."""
    model = tiny_llama(attn_implementation="eager")
    optimized = tilewright.llm.optimize(model)
    wanted = lonely(model, prompts())
    assert batched(optimized, prompts()) == wanted
    programs = only_ours(optimized).programs()
    assert batched(optimized, prompts()) == wanted
    assert lonely(optimized, prompts()[:2]) == wanted[:2]
    assert only_ours(optimized).programs()[: len(programs)] == programs


def test_prefixes_are_shared_and_requests_fork() -> None:
    model = tiny_llama()
    optimized = tilewright.llm.optimize(model)
    start = prompt(1, 64)[0].tolist()
    given = [start + tail for tail in ([5], [6, 7], [8, 9, 10])]
    # One after the other: the second request finds the pages of the first.
    config = {"max_requests_per_batch": 1, "page_size": 16}
    assert batched(optimized, given, **config) == lonely(model, given)
    one = lonely(model, given[:1])[0]
    certain = {"do_sample": True, "top_k": 1}  # transformers forks no greedy requests
    several = batched(optimized, given[:1], {"num_return_sequences": 3, **certain})
    assert several == [one] * 3
    only_ours(optimized)


def test_a_model_without_chosen_logits() -> None:
    """Logits of all tokens, of which transformers takes what it needs."""
    model = tiny_llama()
    model._supports_logits_to_keep = lambda: False
    optimized = tilewright.llm.optimize(model)
    assert batched(optimized, prompts()) == lonely(model, prompts())
    only_ours(optimized)


@pytest.mark.filterwarnings("ignore")
def test_rings_of_windows_stay_with_pytorch() -> None:
    settings = llama_config().to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    config = MistralConfig(
        **{name: settings[name] for name in (*keep, *heads)}, sliding_window=8, eos_token_id=None
    )
    model = build(config)
    optimized = tilewright.llm.optimize(model)
    assert batched(optimized, prompts()) == lonely(model, prompts())
    decoder = decoder_of(optimized)
    assert decoder is not None
    assert set(decoder.fallbacks) == {"a paged cache of layers with a window"}


def test_sampled_tokens_are_tokens() -> None:
    optimized = tilewright.llm.optimize(tiny_llama())
    tokens = batched(optimized, prompts(), {"do_sample": True, "temperature": 1.5})
    assert all(len(row) == NEW and max(row) < VOCABULARY for row in tokens)
    only_ours(optimized)
