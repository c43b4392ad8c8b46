"""The first step of a large model reads its weights where they are; they are packed before the next
one, and nobody can tell but by the time, and by `explain`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from tiny_models import build, prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import core
from tilewright.decoder import Decoder, decoder_of
from tilewright.model_programs import ModelPrograms
from tilewright.packed import PackedParameter


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models of the tests count as large ones, whatever other tests left in the cache."""
    monkeypatch.setattr(ModelPrograms, "_packs_late", lambda self: True)


def packed_count(model: Any) -> int:
    return sum(isinstance(parameter, PackedParameter) for parameter in model.parameters())


def decoder_in(model: Any) -> Decoder:
    decoder = decoder_of(model)
    assert decoder is not None
    return decoder


def reads_in_place(model: Any) -> bool:
    (executable,) = decoder_in(model).programs()
    return executable.reads_in_place


def optimized(reference: Any) -> Any:
    return tilewright.llm.optimize(copy.deepcopy(reference), inplace=True)


def packed_first(reference: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(ModelPrograms, "_packs_late", lambda self: False)
        model = optimized(reference)
        model(prompt())
    assert not reads_in_place(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_first_step_packs_nothing_and_has_the_same_bits(
    dtype: torch.dtype, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tiny_llama(3, dtype, tie_word_embeddings=tied)
    wanted = packed_first(reference, monkeypatch)
    model = optimized(reference)
    ids = prompt(2, 9)
    packed = core.weight_counters()["packed"]
    logits = model(ids).logits
    assert core.weight_counters()["packed"] == packed and packed_count(model) == 0
    assert reads_in_place(model) and " in place" in str(tilewright.explain(model))
    assert torch.equal(logits, wanted(ids).logits)
    assert torch.equal(model(ids).logits, logits)
    assert core.weight_counters()["packed"] > packed
    assert packed_count(model) == packed_count(wanted) > 0
    assert not reads_in_place(model) and " in place" not in str(tilewright.explain(model))
    assert not decoder_in(model).fallbacks


@torch.no_grad()
def test_generate_packs_before_its_second_token(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_llama(3)
    model = optimized(reference)
    arguments = {"do_sample": False, "pad_token_id": 0}
    ids = prompt(1, 9)
    model.generate(ids, max_new_tokens=1, **arguments)
    assert reads_in_place(model)
    model = optimized(reference)
    made = model.generate(ids, max_new_tokens=12, **arguments)
    assert torch.equal(made, reference.generate(ids, max_new_tokens=12, **arguments))
    assert not reads_in_place(model) and packed_count(model) > 0
    phases = tilewright.explain(model).phases
    assert phases["prefill"]["runs"] == 1 and phases["decode"]["runs"] == 11
    assert phases["decode"]["fallback_calls"] == phases["prefill"]["fallback_calls"] == 0
    decoder = decoder_in(model)
    assert decoder.calls == 12 and not decoder.fallbacks


@torch.no_grad()
def test_steps_by_a_loop_of_the_caller_go_straight_to_the_packed_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tilewright.program import Executable

    straight: list[Any] = []
    repeat = Executable.repeat

    def counted(self: Executable, *arguments: Any) -> None:
        assert not self.reads_in_place
        straight.append(self)
        repeat(self, *arguments)

    monkeypatch.setattr(Executable, "repeat", counted)
    reference = tiny_llama(3)
    model, token = optimized(reference), torch.tensor([[7]])
    ours, theirs = model(prompt(1, 9)), reference(prompt(1, 9))
    for _ in range(4):
        ours = model(input_ids=token, past_key_values=ours.past_key_values)
        theirs = reference(input_ids=token, past_key_values=theirs.past_key_values)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-4)
    assert len(straight) >= 2


@torch.no_grad()
def test_a_prepared_step_that_goes_on_packs_first() -> None:
    reference = tiny_llama(3)
    model = optimized(reference)
    decoder = decoder_in(model)
    prepared = decoder.prepared({"input_ids": prompt(1, 9), "logits_to_keep": 1})
    first = decoder.execute(prepared)[:, -1].argmax(-1, keepdim=True)
    assert prepared.executable.is_spent
    logits = decoder.go_on(prepared, first)
    ids = torch.cat([prompt(1, 9), first], 1)
    torch.testing.assert_close(logits[:, -1], reference(ids).logits[:, -1], rtol=1e-3, atol=1e-4)
    assert packed_count(model) > 0


@torch.no_grad()
def test_another_program_packs_for_both() -> None:
    reference = tiny_llama(3)
    model, ids = optimized(reference), prompt(2, 9)
    decoder = decoder_in(model)
    decoder.prepared({"input_ids": ids, "logits_to_keep": 1})  # made, and not run
    assert reads_in_place(model)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-4)
    assert packed_count(model) > 0
    last = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last[:, 0], reference(ids).logits[:, -1], rtol=1e-3, atol=1e-4)
    assert not any(executable.reads_in_place for executable in decoder.programs())


@pytest.mark.parametrize("how", ["written", "replaced"])
@torch.no_grad()
def test_weights_changed_after_the_first_step_are_honoured(how: str) -> None:
    reference = tiny_llama(3)
    model, ids = optimized(reference), prompt(2, 9)
    model(ids)
    for each in (model, reference):
        projection = each.model.layers[1].mlp.down_proj
        if how == "written":
            projection.weight.mul_(-2)
        else:
            projection.weight = torch.nn.Parameter(projection.weight * -2)
    for _ in range(3):
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-4)
    assert packed_count(model) > 0


@torch.no_grad()
def test_what_cannot_be_packed_leaves_ordinary_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.program import Executable

    reference = tiny_llama(3)
    model, ids = optimized(reference), prompt(2, 9)
    model(ids)

    def refuse(_: Executable) -> None:
        raise core.CoreError("planted")

    monkeypatch.setattr(Executable, "pack", refuse)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-4)
    assert packed_count(model) == 0
    assert tilewright.explain(model).by_parts == "planted"


@torch.no_grad()
def test_packing_that_was_interrupted_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.packed import Releases

    reference = tiny_llama(3)
    model, ids = optimized(reference), prompt(2, 9)
    model(ids)
    finish = Releases.finish

    def interrupted(self: Releases) -> None:
        finish(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Releases, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
    assert packed_count(model) == 0
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-4)
    assert packed_count(model) > 0 and not decoder_in(model).fallbacks


@torch.no_grad()
def test_a_program_in_place_runs_once() -> None:
    model = optimized(tiny_llama(3))
    decoder = decoder_in(model)
    prepared = decoder.prepared({"input_ids": prompt(1, 9), "logits_to_keep": 1})
    decoder.execute(prepared)
    step = prepared.step
    with pytest.raises(core.CoreError, match="packed first"):
        prepared.executable.run(
            [step.input_ids, step.position_ids], {"b": 1, "s": 9}, prepared.caches
        )


@torch.no_grad()
def test_experts_are_packed_at_once() -> None:
    config = MixtralConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = optimized(build(config))
    model(prompt(1, 9))
    assert not reads_in_place(model) and packed_count(model) > 0


@torch.no_grad()
def test_compare_looks_at_packed_weights() -> None:
    model = optimized(tiny_llama(2))
    comparison = tilewright.compare(model, prompt(1, 9))
    assert comparison.first is None and len(comparison.regions) > 10
    assert not any(" in place" in region.kernel for region in comparison.regions)


SETTING = """
import sys

sys.path.insert(0, {tests!r})
import torch, tilewright
from tilewright import core, model_programs
from tiny_models import prompt, tiny_llama

model_programs.LATE_FROM = 0
model = tilewright.llm.optimize(tiny_llama(2), inplace=True)
with torch.no_grad():
    model(prompt())
print(core.weight_counters()["packed"] > 0)
"""


@pytest.mark.parametrize(
    ("variables", "packs"),
    [
        ({}, "False"),
        ({"TILEWRIGHT_PACKING": "first"}, "True"),
        ({"TILEWRIGHT_CACHE_WEIGHTS": "on", "TILEWRIGHT_CACHE": "rw"}, "True"),
    ],
    ids=["default", "first", "kept"],
)
def test_who_keeps_weights_or_says_so_packs_first(
    run_python: Any, tmp_path: Path, variables: dict[str, str], packs: str
) -> None:
    code = SETTING.format(tests=str(Path(__file__).parent))
    done = run_python(code, {"TILEWRIGHT_CACHE_DIR": str(tmp_path), **variables})
    assert done.stdout.split() == [packs]
