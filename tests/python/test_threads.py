"""Threads of a step: the smallest of torch's, the affinity mask and the quota, at each call."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import core

PROCESSORS = os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, PROCESSORS)


@pytest.mark.skipif(core.thread_limits()["count"] < 2, reason="one thread is all that is allowed")
def test_a_step_follows_what_is_allowed_when_it_begins() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    tokens = prompt(1, 40)

    def of_a_step() -> tuple[int, torch.Tensor]:
        with torch.inference_mode():
            logits = model(tokens).logits
        return tilewright.explain(model).phases["prefill"]["threads"], logits

    allowed = core.thread_limits()["count"]
    threads, logits = of_a_step()
    assert threads == allowed
    os.sched_setaffinity(0, {min(PROCESSORS)})
    assert core.thread_limits()["decided_by"] == "affinity"
    alone, same = of_a_step()
    assert alone == 1 and torch.equal(logits, same)
    os.sched_setaffinity(0, PROCESSORS)
    assert of_a_step()[0] == allowed
    torch.set_num_threads(1)
    assert core.thread_limits()["decided_by"] == "torch"
    assert of_a_step()[0] == 1


def test_callers_at_once_get_the_bits_that_one_gets() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    other = tilewright.llm.optimize(tiny_llama(3))
    tokens = prompt(1, 40)
    with torch.inference_mode():
        expected = model(tokens).logits
    equal: list[bool] = []

    def call(mine: torch.nn.Module) -> None:
        with torch.inference_mode():
            equal.extend(torch.equal(mine(tokens).logits, expected) for _ in range(20))

    callers = [threading.Thread(target=call, args=(mine,)) for mine in (model, other) * 2]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(equal) == 80 and all(equal)


def test_env_names_what_decided(command) -> None:
    def threads(**environment: str) -> tuple[dict[str, object], str]:
        data = json.loads(command("env", "--json", **environment).stdout)
        return data["threads"], command("env", **environment).stdout

    limits, text = threads(TILEWRIGHT_NUM_THREADS="17")
    assert limits["count"] == 17 and limits["decided_by"] == "setting"
    assert "threads: 17 (setting; torch " in text
    limits, text = threads(OMP_NUM_THREADS="1")
    assert limits["count"] == 1 and limits["decided_by"] == "torch"
    assert f"threads: 1 (torch; torch 1, affinity {len(PROCESSORS)}, quota" in text
    os.sched_setaffinity(0, {min(PROCESSORS)})  # the child's, too
    limits, text = threads(OMP_NUM_THREADS="2")
    assert limits["count"] == 1 and limits["affinity"] == 1
    assert "threads: 1 (affinity; torch 2, affinity 1, quota" in text


def test_a_thread_that_openmp_has_bound_is_no_limit(command) -> None:
    """OMP_PROC_BIND leaves the first thread one CPU; its team has the others."""
    data = json.loads(command("env", "--json", OMP_PROC_BIND="true", OMP_NUM_THREADS="2").stdout)
    assert data["threads"]["affinity"] == len(PROCESSORS)
