"""`generate` of an optimised model: our loop gives transformers' tokens, where it may run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

import tilewright
from tilewright.decoder import Decoder, NotRunnableError, decoder_of
from tilewright.generation import Generate
from tiny_models import prompt, tiny_llama


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model as it is, and optimised."""
    model = tiny_llama()
    return model, tilewright.llm.optimize(model)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step had that transformers prepared."""
    original = GenerationMixin.prepare_inputs_for_generation
    steps: list[int] = []

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(self, *args, **kwargs)
        steps.append(inputs["input_ids"].shape[1])
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    return steps


def generated(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(3)
    arguments = {"do_sample": False, "max_new_tokens": 12, **arguments}
    result: torch.Tensor = model.generate(ids, **arguments)
    return result


def padded(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * 7).view(rows, 7) % 90 + 3
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row + 1] = 0
    return {"ids": ids * mask, "attention_mask": mask}


OURS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "positional": {"generation_config": None},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3, "min_new_tokens": 5, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7]]},
    "time": {"max_time": 60.0},
    "cut short": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("case", OURS)
def test_tokens_are_those_of_transformers(models: Any, prepared: list[int], case: str) -> None:
    model, optimized = models
    for arguments in ({"ids": prompt()}, padded(3)):
        wanted = generated(model, **arguments, **OURS[case])
        prepared.clear()
        assert torch.equal(generated(optimized, **arguments, **OURS[case]), wanted)
        # The prompt, and the first step; from then on it is ours.
        steps = [arguments["ids"].shape[1], 1][: OURS[case].get("max_new_tokens", 2)]
        assert prepared == steps
    assert decoder_of(optimized).fallbacks == {}  # type: ignore[union-attr]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each search in the core took."""
    original = Decoder.search
    taken: list[int] = []

    def search(self: Decoder, *args: Any) -> torch.Tensor:
        rows = original(self, *args)
        taken.append(len(rows))
        return rows

    monkeypatch.setattr(Decoder, "search", search)
    return taken


def test_greedy_steps_go_on_in_the_core(models: Any, searches: list[int]) -> None:
    _, optimized = models
    generated(optimized, prompt())
    assert sum(searches) == 10  # the prompt gives the first token, a step of Python the second
    searches.clear()
    generated(optimized, **padded(3))
    assert sum(searches) == 10
    searches.clear()
    generated(optimized, prompt(), streamer=TextStreamer(Tokenizer()))  # type: ignore[arg-type]
    assert searches == [1] * 10  # a streamer gets each token when it is there
    searches.clear()
    for case in ("sampling", "processors", "time"):
        generated(optimized, prompt(), **OURS[case])
    assert searches == []


def test_sequences_end_one_by_one(models: Any, prepared: list[int]) -> None:
    model, optimized = models
    free = generated(model, **padded(3), max_new_tokens=20)[:, 7:]
    # The third token of the first row, and a late one of the last: rows end at different times.
    for pad in (0, int(free[0, 2])):
        ends = {"eos_token_id": [int(free[0, 2]), int(free[2, 9])], "pad_token_id": pad}
        wanted = generated(model, **padded(3), max_new_tokens=20, **ends)
        assert torch.equal(generated(optimized, **padded(3), max_new_tokens=20, **ends), wanted)
    assert wanted.shape[1] <= 27


class Kept(BaseStreamer):
    """What a streamer gets."""

    def __init__(self) -> None:
        self.got: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.got.append([])


class Tokenizer:
    """As much of one as TextStreamer needs."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids)) + " "


def test_streaming(models: Any, prepared: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    streams = []
    for each in models:
        kept = Kept()
        tokens = generated(each, prompt(), streamer=kept)
        streams.append(kept.got)
        assert [token for piece in kept.got for token in piece] == tokens.reshape(-1).tolist()
    assert streams[0] == streams[1]
    assert prepared.count(1) == 11 + 1  # transformers' loop, and our first step
    texts = []
    for each in models:
        prepared.clear()
        generated(each, prompt(), streamer=TextStreamer(Tokenizer()))  # type: ignore[arg-type]
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert prepared.count(1) == 1


class Seven(LogitsProcessor):
    """Prefers a token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 7] += 1.5
        return scores


class LastAsWell(StoppingCriteria):
    """Ends behind a token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert scores is None
        return input_ids[:, -1] == 7


def test_code_of_the_users_own_runs_between_our_steps(models: Any, prepared: list[int]) -> None:
    model, optimized = models
    for arguments in (
        {"logits_processor": LogitsProcessorList([Seven()])},
        {"stopping_criteria": StoppingCriteriaList([LastAsWell()])},
    ):
        wanted = generated(model, prompt(), **arguments)
        prepared.clear()
        assert torch.equal(generated(optimized, prompt(), **arguments), wanted)
        assert prepared == [9, 1]


class Meddler(Kept):
    """Changes a model when it gets the fourth piece, the third token."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self._change = change

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.got) == 4:
            self._change()


def scale(model: Any, _: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= -3


def replace(model: Any, _: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(-2 * layer.weight.detach())


def hook(model: Any, _: Any) -> None:
    def negate(module: Any, args: Any, output: Any) -> Any:
        output.logits = -output.logits
        return output

    model.register_forward_hook(negate)


@pytest.mark.parametrize("change", [scale, replace, hook])
def test_a_change_between_two_steps_is_seen(change: Any, prepared: list[int]) -> None:
    got = []
    for optimize in (False, True):
        model = tiny_llama()
        if optimize:
            model = tilewright.llm.optimize(model)
        prepared.clear()
        cache = DynamicCache()
        meddler = Meddler(lambda model=model, cache=cache: change(model, cache))
        got.append(generated(model, prompt(), streamer=meddler, past_key_values=cache))
    assert torch.equal(got[0], got[1])
    # Made ready anew once, or called by steps from there.
    assert prepared == [9, 1, 1] if change is not hook else prepared[:4] == [9, 1, 1, 1]
    assert not torch.equal(got[0], generated(tiny_llama(), prompt())), "the change shows"


def test_a_least_number_of_tokens_is_kept_in_the_core(models: Any, searches: list[int]) -> None:
    model, optimized = models
    free = generated(model, **padded(3))[:, 7:]
    ends = {"eos_token_id": [int(free[0, 2]), int(free[2, 9])], "pad_token_id": 0}
    for least in ({"min_new_tokens": 6}, {"min_length": 12, "min_new_tokens": 2}):
        wanted = generated(model, **padded(3), **ends, **least, max_new_tokens=20)
        searches.clear()
        given = generated(optimized, **padded(3), **ends, **least, max_new_tokens=20)
        assert torch.equal(given, wanted)
        assert sum(searches) == wanted.shape[1] - 7 - 2
        assert not torch.equal(wanted, generated(model, **padded(3), **ends, max_new_tokens=20))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2, "repetition_penalty": 1.2},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
    ],
)
def test_other_loops_are_transformers_own(
    models: Any, prepared: list[int], arguments: dict[str, Any]
) -> None:
    model, optimized = models
    wanted = generated(model, prompt(), **arguments)
    prepared.clear()
    assert torch.equal(generated(optimized, prompt(), **arguments), wanted)
    assert len(prepared) > 3


def repeating(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """An optimised model, and a prompt of which it repeats something: it said it itself."""
    optimized = tilewright.llm.optimize(tiny_llama(dtype=dtype))
    said = generated(optimized, prompt(), max_new_tokens=40)[:, 9:]
    return optimized, torch.cat([prompt(), said, prompt(), said[:, :5]], dim=1)


def decode_runs(decoder: Decoder) -> int:
    reports = (executable.program.report() for executable in decoder.programs())
    return sum(report["decode"]["runs"] for report in reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_lookup_gives_the_tokens_of_greedy_search(
    dtype: torch.dtype, prepared: list[int]
) -> None:
    optimized, ids = repeating(dtype)
    settings = {"max_new_tokens": 60}
    wanted = generated(optimized, ids, **settings)
    end = int(wanted[0, -20])
    ended = generated(optimized, ids, **settings, eos_token_id=end)
    decoder = decoder_of(optimized)
    assert decoder is not None
    for guesses in (1, 3, 10, 100):
        prepared.clear()
        given = {**settings, "prompt_lookup_num_tokens": guesses}
        cache = DynamicCache()
        assert torch.equal(generated(optimized, ids, **given, past_key_values=cache), wanted)
        assert cache.get_seq_length() == wanted.shape[1] - 1
        assert prepared == [ids.shape[1], 1]
        assert torch.equal(generated(optimized, ids, **given, eos_token_id=end), ended)
    kept = Kept()
    streamed = {**given, "streamer": TextStreamer(Tokenizer())}
    assert torch.equal(generated(optimized, ids, **streamed), wanted)
    assert torch.equal(generated(optimized, ids, **given, streamer=kept), wanted)
    runs = decode_runs(decoder)
    generated(optimized, ids, **settings, prompt_lookup_num_tokens=10)
    assert 30 < decode_runs(decoder) - runs < 57, "some guesses are right"
    assert not decoder.fallbacks


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_several_tokens_has_the_bits_of_steps_of_one(dtype: torch.dtype) -> None:
    """On it rests that guesses change no token."""
    optimized = tilewright.llm.optimize(tiny_llama(dtype=dtype))
    ids = prompt(1, 100)
    optimized(ids[:, :9])
    (executable,) = decoder_of(optimized).programs()  # type: ignore[union-attr]
    most = executable.program.alike_tokens
    assert 8 <= most <= 16
    for past in (1, 55, 64):
        single = DynamicCache()
        optimized(ids[:, :past], past_key_values=single)
        each = [
            optimized(ids[:, at : at + 1], past_key_values=single).logits
            for at in range(past, past + most)
        ]
        for count in range(2, most + 1):
            cache = DynamicCache()
            optimized(ids[:, :past], past_key_values=cache)
            logits = optimized(ids[:, past : past + count], past_key_values=cache).logits
            assert torch.equal(logits, torch.cat(each[:count], dim=1)), (past, count)
            for several, one in zip(cache.layers, single.layers, strict=True):
                assert torch.equal(several.keys, one.keys[:, :, : past + count])
                assert torch.equal(several.values, one.values[:, :, : past + count])


def test_outputs_and_hooks(models: Any) -> None:
    model, optimized = models
    wanted = model.generate(
        prompt(), max_new_tokens=4, output_scores=True, return_dict_in_generate=True
    )
    got = optimized.generate(
        prompt(), max_new_tokens=4, output_scores=True, return_dict_in_generate=True
    )
    assert torch.equal(got.sequences, wanted.sequences) and len(got.scores) == 4
    calls = []
    handle = optimized.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(generated(optimized, prompt()), generated(model, prompt()))
    handle.remove()
    assert len(calls) == 12


def test_a_step_that_fails_goes_on_in_pytorch(
    models: Any, prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimized = models
    wanted = generated(model, **padded(2), do_sample=True)
    execute = Decoder.execute
    steps = []

    def failing(self: Decoder, *args: Any) -> Any:
        steps.append(1)
        if len(steps) in (4, 5):  # going on, and the ordinary call after it
            raise NotRunnableError("planted")
        return execute(self, *args)

    monkeypatch.setattr(Decoder, "execute", failing)
    prepared.clear()
    assert torch.equal(generated(optimized, **padded(2), do_sample=True), wanted)
    decoder = decoder_of(optimized)
    assert decoder is not None and decoder.fallbacks.pop("planted") == 1
    assert prepared.count(1) == 3  # the first step, the failed one, and the one after it


def test_a_search_that_fails_goes_on_by_steps(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimized = models
    wanted = generated(model, **padded(2))
    original = Decoder.search
    searched = []

    def search(self: Decoder, *args: Any) -> Any:
        searched.append(1)
        if len(searched) % 2 == 1:
            raise NotRunnableError("planted")
        prepared, tokens, ends, most, *rest = args
        return original(self, prepared, tokens, ends, min(most, 3), *rest)

    monkeypatch.setattr(Decoder, "search", search)
    assert torch.equal(generated(optimized, **padded(2)), wanted)
    assert len(searched) == 6  # a step, three in the core, a step, three, a step, the last
    assert decoder_of(optimized).fallbacks == {}  # type: ignore[union-attr]


def test_changes_between_generations_are_seen() -> None:
    optimized = tilewright.llm.optimize(tiny_llama())
    before = generated(optimized, prompt())
    with torch.no_grad():
        optimized.model.layers[1].mlp.down_proj.weight *= -3
    assert torch.equal(generated(optimized, prompt()), generated(tiny_changed(), prompt()))
    assert not torch.equal(generated(optimized, prompt()), before)


def tiny_changed() -> Any:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= -3
    return model


def test_a_cache_goes_on_from_one_generation_to_the_next(models: Any) -> None:
    results = []
    for each in models:
        cache = DynamicCache()
        first = generated(each, prompt(), past_key_values=cache)
        more = torch.cat([first, torch.tensor([[9, 8, 7]])], dim=1)
        results.append(generated(each, more, past_key_values=cache))
        assert cache.get_seq_length() == results[-1].shape[1] - 1
    assert torch.equal(*results)


def test_copies_restoring_and_compiling(prepared: list[int]) -> None:
    optimized = tilewright.llm.optimize(tiny_llama())
    wanted = generated(optimized, prompt())
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert isinstance(other.generate, Generate)
        assert other.generate._decoder is decoder_of(other) is not decoder_of(optimized)
        assert torch.equal(generated(other, prompt()), wanted)
    compiled = torch.compile(optimized, backend="tilewright")
    prepared.clear()
    assert torch.equal(generated(compiled, prompt()), wanted)
    assert prepared.count(1) == 1
    tilewright.llm.restore(optimized)
    assert "generate" not in optimized.__dict__
    assert torch.equal(generated(optimized, prompt()), wanted)
