"""Conversations of several turns that take turns on one model, step by step, in batches and from
threads: each one gets the tokens that it gets alone.

Eager rounds bf16 in other places: there, alone means alone on the optimised model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import tilewright
from tilewright import backend as backends
from tilewright.decoder import decoder_of
from tiny_models import prompt, tiny_llama

NEW = 5
# Each conversation's turns: the tokens that its user says. The lengths lie on both sides of what
# attention computes token by token, of a block of the cache, and of the rows of linear kernels.
ALONE = [(9, 3), (1, 20, 2), (40,), (70, 1), (17, 5, 4)]
# These share a cache, padded on the left; their later turns are equally long. (Not fewer than 9
# tokens: AMX multiplies more than 8 rows, and with other bits.)
TOGETHER = [(10, 9, 18), (30, 9, 18), (13, 9, 18)]


@dataclass
class Talk:
    """Conversations in one cache."""

    turns: list[list[torch.Tensor]]  # [turn][conversation] of tokens
    said: list[list[int]]  # by the model, [conversation]


def talk(lengths: list[tuple[int, ...]], seed: int) -> Talk:
    turns = [
        [prompt(10 * seed + row, count)[0] for row, count in enumerate(turn, 1)]
        for turn in zip(*lengths, strict=True)
    ]
    return Talk(turns, [[] for _ in lengths])


def all_talks() -> list[Talk]:
    return [talk([lengths], seed) for seed, lengths in enumerate(ALONE)] + [talk(TOGETHER, 8)]


def apart(talks: list[Talk]) -> list[Talk]:
    """The same, each conversation in a cache of its own."""
    return [
        Talk([[turn[row]] for turn in each.turns], [[]])
        for each in talks
        for row in range(len(each.said))
    ]


@torch.inference_mode()
def steps(model: Any, conversation: Talk) -> Iterator[None]:
    """Greedy tokens, a call of the model at a time."""
    cache = DynamicCache()
    width = max(len(row) for row in conversation.turns[0])
    mask = torch.stack(
        [(torch.arange(width) >= width - len(row)).long() for row in conversation.turns[0]]
    )
    tokens = torch.zeros(len(mask), 0, dtype=torch.long)
    for turn in conversation.turns:
        width = max(len(row) for row in turn)
        said = [torch.nn.functional.pad(row, (width - len(row), 0)) for row in turn]
        tokens = torch.cat([tokens, torch.stack(said)], dim=1)
        for _ in range(NEW):
            keys = cache.get_seq_length() + tokens.shape[1]
            mask = torch.nn.functional.pad(mask, (0, keys - mask.shape[1]), value=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            tokens = model(tokens, **given, logits_to_keep=1).logits[:, -1:].argmax(-1)
            for row, token in zip(conversation.said, tokens[:, 0].tolist(), strict=True):
                row.append(token)
            yield


def generated(model: Any, conversation: Talk) -> None:
    """The same of one conversation, by `generate`."""
    cache = DynamicCache()
    (ids,) = torch.zeros(1, 0, dtype=torch.long)
    for (turn,) in conversation.turns:
        ids = torch.cat([ids, turn])
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        longer = model.generate(ids[None], past_key_values=cache, **settings)[0]
        conversation.said[0] += longer[len(ids) :].tolist()
        ids = longer


def in_threads(work: Callable[[Any], object], given: list[Any]) -> None:
    problems: list[BaseException] = []
    begin = threading.Barrier(len(given))

    def run(each: Any) -> None:
        try:
            begin.wait()
            work(each)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(each,)) for each in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems


def lonely(model: Any) -> list[list[int]]:
    """What each conversation gets when no other runs."""
    talks = apart(all_talks())
    for each in talks:
        for _ in steps(model, each):
            pass
    return said(talks)


def said(talks: list[Talk]) -> list[list[int]]:
    return [row for each in talks for row in each.said]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_of_eight_conversations_gets_its_lonely_tokens(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    optimized = tilewright.llm.optimize(model)
    expected = lonely(model if dtype == torch.float32 else optimized)
    assert len({tuple(row) for row in expected}) == 8

    talks = all_talks()
    running = [steps(optimized, each) for each in talks]
    while running:  # a step of each, then the next step of each
        running = [each for each in running if next(each, "done") is None]
    assert said(talks) == expected

    talks = all_talks()
    in_threads(lambda each: sum(1 for _ in steps(optimized, each)), talks)
    assert said(talks) == expected

    talks = apart(all_talks())
    in_threads(lambda each: generated(optimized, each), talks)
    assert said(talks) == expected
    decoder = decoder_of(optimized)
    assert decoder is not None and not decoder.fallbacks, decoder.fallbacks


class Waits(BaseStreamer):
    """Holds its generation up at its first token until somebody else is somewhere."""

    def __init__(self, announces: threading.Event, awaits: threading.Event) -> None:
        self._announces, self._awaits = announces, awaits

    def put(self, value: torch.Tensor) -> None:
        self._announces.set()
        assert self._awaits.wait(300)

    def end(self) -> None:
        pass


def test_who_finishes_first_does_not_send_the_others_to_pytorch() -> None:
    """Of the threads that generate on one compiled model."""
    model = tiny_llama(2)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    ids = [prompt(1, tokens) for tokens in (9, 12)]
    expected = [model.generate(each, **settings).tolist() for each in ids]
    compiled = torch.compile(model, backend="tilewright")
    before = backends.calls()
    first_began, second_began, first_ended = (threading.Event() for _ in range(3))
    answers: dict[int, list[list[int]]] = {}

    def first() -> None:
        waits = Waits(first_began, second_began)
        answers[0] = compiled.generate(ids[0], **settings, streamer=waits).tolist()
        first_ended.set()

    def second() -> None:
        assert first_began.wait(300)
        waits = Waits(second_began, first_ended)
        answers[1] = compiled.generate(ids[1], **settings, streamer=waits).tolist()

    in_threads(lambda work: work(), [first, second])
    assert [answers[0], answers[1]] == expected
    assert backends.calls() - before == 2 * NEW
    assert model._compiled_call_impl is None
