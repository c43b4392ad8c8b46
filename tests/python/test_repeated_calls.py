"""The next step of a cache goes straight to its program, and only while that is right.

Each case changes something between two such steps, in the same way for eager and for ours; what
follows must be what eager gives.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import _core, operators
from tilewright.decoder import decoder_of
from tilewright.program import Executable

TOKEN = torch.tensor([[7], [11]])


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Executable]]:
    """The programs of the steps that went straight to them."""
    programs: list[Executable] = []
    repeat = Executable.repeat

    def counted(self: Executable, *arguments: Any) -> None:
        programs.append(self)
        repeat(self, *arguments)

    monkeypatch.setattr(Executable, "repeat", counted)
    yield programs


class Conversation:
    """A model with a cache of two sequences that has seen a step of decode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.other = model(input_ids=prompt(2, 5), use_cache=True).past_key_values
        self.cache = model(input_ids=prompt(2, 9), use_cache=True).past_key_values
        self.step()
        self.step()

    def step(self, tokens: torch.Tensor = TOKEN, **arguments: Any) -> torch.Tensor:
        output = self.model(input_ids=tokens, past_key_values=self.cache, **arguments)
        assert output.past_key_values is self.cache
        logits: torch.Tensor = output.logits
        return logits


def pair() -> tuple[Conversation, Conversation]:
    eager = tiny_llama(3)
    return Conversation(eager), Conversation(tilewright.llm.optimize(copy.deepcopy(eager)))


def norm(one: Conversation) -> Any:
    return one.model.model.layers[1].input_layernorm


def inner(one: Conversation) -> Any:
    return one.model.model.layers[1].mlp.down_proj


def doubled(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def another_cache(one: Conversation) -> None:
    one.cache = one.other


def layers_of_another(one: Conversation) -> None:
    one.cache.layers = one.other.layers


def keys_assigned(one: Conversation) -> None:
    layer = one.cache.layers[1]
    keys, values = layer.keys.clone(), layer.values.clone()
    layer.keys = keys * 0.5
    layer.values = values * 2


def doubled_weights(one: Conversation) -> None:
    inner(one).weight.mul_(2)


def head_replaced(one: Conversation) -> None:
    one.model.lm_head.weight = nn.Parameter(one.model.lm_head.weight * 2)


CHANGES: dict[str, Callable[[Conversation], Any]] = {
    "nothing": lambda one: None,
    "weights, written": doubled_weights,
    "weights, written as data": lambda one: setattr(
        inner(one).weight, "data", inner(one).weight.data * 2
    ),
    "weights, replaced": head_replaced,
    "a hook inside": lambda one: inner(one).register_forward_hook(doubled),
    "a hook inside, before": lambda one: norm(one).register_forward_pre_hook(
        lambda _, inputs: (inputs[0] * 2,)
    ),
    "a hook of the model": lambda one: one.model.register_forward_hook(
        lambda _, __, output: setattr(output, "logits", output.logits * 2) or output
    ),
    "an attribute": lambda one: setattr(norm(one), "variance_epsilon", 0.5),
    "a forward inside": lambda one: setattr(norm(one), "forward", lambda x: x * 2),
    "the cache, cropped": lambda one: one.cache.crop(-3),
    "the cache, reordered": lambda one: one.cache.reorder_cache(torch.tensor([1, 0])),
    "the cache, reset": lambda one: [layer.reset() for layer in one.cache.layers],
    "another cache": another_cache,
    "layers of another cache": layers_of_another,
    "keys and values, assigned": keys_assigned,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changed_between_steps_counts(change: str, repeated: list[Executable]) -> None:
    results = []
    for one in pair():
        if change == "the cache, reset" and not decoder_of(one.model):
            # transformers' own layers keep their shape: as new ones.
            one.cache = type(one.cache)(config=one.model.config)
        else:
            CHANGES[change](one)
        results.append([one.step() for _ in range(3)])
    decoder = decoder_of(one.model)
    assert repeated, "no step went straight to its program"
    assert bool(decoder.fallbacks) == change.startswith("a hook inside"), decoder.fallbacks
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "one sequence of two": {"tokens": TOKEN[:1]},
    "two tokens": {"tokens": torch.tensor([[7, 8], [11, 12]])},
    "int32": {"tokens": torch.tensor([[7], [0], [11], [0]]).int()[:2]},  # as int64: 7 and 11
    "a column": {"tokens": torch.tensor([[7, 0], [11, 0]])[:, :1]},
    "every logit": {"logits_to_keep": 0},
    "the last logit": {"logits_to_keep": 1},
    "chosen logits": {"logits_to_keep": torch.tensor([0])},
    "logits in a list": {"logits_to_keep": [0]},
    "no number of logits": {"logits_to_keep": -1},
    "an unknown argument": {"output_hidden_states": True},
    "a mask": {"attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12])},
    "positions": {"position_ids": torch.tensor([[40], [41]])},
    "no cache wanted": {"use_cache": False},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@torch.no_grad()
def test_arguments_count(arguments: str, repeated: list[Executable]) -> None:
    """And so does what follows without them: of a padded sequence, say."""
    given, results = ARGUMENTS[arguments], []
    for one in pair():
        steps: list[torch.Tensor | type] = []
        for each in (given, {}, given, {}, {}):
            try:
                steps.append(one.step(**each))
            except (RuntimeError, ValueError) as error:
                steps.append(type(error))
        results.append(steps)
    assert repeated
    for expected, got in zip(*results, strict=True):
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
            assert got.dtype == expected.dtype and got.is_contiguous()
        else:
            assert isinstance(got, type)  # both refuse


def test_states_of_torch_count(repeated: list[Executable]) -> None:
    with torch.no_grad():
        _, ours = pair()
    before = len(repeated)
    assert ours.step().requires_grad
    with torch.no_grad():
        ours.model.train()
        ours.step()
        ours.model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours.step()
        assert len(repeated) == before and len(decoder_of(ours.model).fallbacks) == 3
        for _ in range(2):
            assert not ours.step().is_inference()
        with torch.inference_mode():
            assert ours.step().is_inference()
        assert len(repeated) == before + 3


@torch.no_grad()
def test_who_looks_at_operators_sees_the_step(repeated: list[Executable]) -> None:
    _, ours = pair()
    before = len(repeated)
    with torch.profiler.profile() as profile:
        ours.step()
    assert any(event.key == "tilewright::step" for event in profile.key_averages())
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        ours.step()
    assert operators.step in seen and len(repeated) == before
    ours.step()
    assert len(repeated) == before + 1


@torch.no_grad()
def test_a_program_that_refuses_says_why(
    repeated: list[Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the step is made ready anew, and nothing was appended to the cache."""
    eager, ours = pair()

    def refuse(self: Executable, *_: Any) -> None:
        repeated.append(self)
        raise _core.CoreError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(Executable, "repeat", refuse)
        results = [one.step() for one in (eager, ours)]
    assert repeated and eager.cache.get_seq_length() == ours.cache.get_seq_length()
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_cache_goes_on_in_the_programs_of_new_weights(repeated: list[Executable]) -> None:
    """The program of before is neither run again nor kept alive by the cache."""
    eager, ours = pair()
    (old,) = set(repeated)
    handle = old.program.handle
    del old
    repeated.clear()
    for one in (eager, ours):
        doubled_weights(one)
    for _ in range(3):
        torch.testing.assert_close(ours.step(), eager.step(), rtol=1e-3, atol=1e-3)
    assert len(repeated) == 2
    gc.collect()
    assert _core.ReadyStep.make(handle, [], 2) is None


@torch.no_grad()
def test_each_step_is_of_the_program_that_its_logits_ask_for(repeated: list[Executable]) -> None:
    _, ours = pair()
    of_all = repeated[-1]
    for keep in (0, 1, 1, 0, 0, 1, 1, 1):
        ours.step(logits_to_keep=keep)
    (of_last,) = set(decoder_of(ours.model).programs()) - {of_all}
    runs = [each.program.report()["decode"]["runs"] for each in (of_all, of_last)]
    assert runs == [2 + 3, 5]
    assert repeated[2:] == [of_all, of_last, of_all, of_last, of_last]


@torch.no_grad()
def test_tokens_without_memory_are_the_models_own_affair(repeated: list[Executable]) -> None:
    _, ours = pair()
    before = len(repeated)
    with contextlib.suppress(Exception):
        ours.step(TOKEN.to("meta"))
    assert [*decoder_of(ours.model).fallbacks] == ["input_ids is not a CPU tensor [batch, tokens]"]
    assert len(repeated) == before


@torch.no_grad()
def test_a_rotary_table_that_grows() -> None:
    """At which length that is, only a look at each step tells."""
    from tiny_models import build, llama_config

    config = llama_config(2)
    config.max_position_embeddings = 14
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    eager = build(config)
    pair = Conversation(eager), Conversation(tilewright.llm.optimize(copy.deepcopy(eager)))
    for _ in range(8):
        expected, got = (one.step() for one in pair)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_steps_of_what_is_gone() -> None:
    _, ours = pair()
    (executable,) = decoder_of(ours.model).programs()
    caches = [layer.blocks.handle for layer in ours.cache.layers]
    step = _core.ReadyStep.make(executable.program.handle, caches, 2)
    assert step is not None and step.output == ("f32", [2, 1, 160])
    logits = torch.empty(2, 1, 160)
    length = ours.cache.get_seq_length()
    step.run(TOKEN.data_ptr(), length, logits.data_ptr(), 1)
    assert ours.cache.get_seq_length() == length + 1
    wrong = _core.ReadyStep.make(executable.program.handle, caches, 1)
    with pytest.raises(_core.CoreError, match="holds 2 sequences"):
        wrong.run(TOKEN.data_ptr(), length, logits.data_ptr(), 1)
    del ours.cache
    with pytest.raises(_core.CoreError, match="a cache of this step is gone"):
        step.run(TOKEN.data_ptr(), length, logits.data_ptr(), 1)


@torch.no_grad()
def test_copies_have_next_steps_of_their_own(repeated: list[Executable]) -> None:
    _, ours = pair()
    expected = ours.step()
    for copied in (copy.deepcopy(ours.model), pickle.loads(pickle.dumps(ours.model))):
        one = Conversation(copied)
        assert torch.equal(one.step(), expected)
        assert repeated[-1] in decoder_of(copied).programs()
        doubled_weights(one)
        assert not torch.equal(one.step(), ours.step())
        ours.cache.crop(-1)


# --- through torch.compile


@torch.no_grad()
def test_a_compiled_model_is_called_directly_and_its_hooks_run(repeated: list[Executable]) -> None:
    _, ours = pair()
    expected = ours.step()
    ours.cache.crop(-1)
    model, frames = ours.model, torch._dynamo.utils.counters["frames"]
    ours.model = torch.compile(model, backend="tilewright", fullgraph=True)
    ours.step()  # torch.compile left an attribute in the model, which changes no program
    ours.cache.crop(-1)
    assert decoder_of(model).programs() == [repeated[-1]]
    before, counted = len(repeated), dict(frames)
    assert torch.equal(ours.step(), expected) and len(repeated) == before + 1
    ours.cache.crop(-1)
    called: list[Any] = []
    hooks = [
        ours.model.register_forward_hook(lambda *_: called.append("compiled")),
        model.register_forward_pre_hook(lambda *_: called.append("model")),
    ]
    assert torch.equal(ours.step(), expected) and called == ["model", "compiled"]
    ours.cache.crop(-1)
    for hook in hooks:
        hook.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append("any"))
    try:
        with pytest.warns(UserWarning, match="global hooks"):
            assert torch.equal(ours.step(), expected)
    finally:
        everywhere.remove()
    assert called.count("any") == 2  # of the compiled and of the optimised model
    ours.cache.crop(-1)
    assert dict(frames) == counted
    tilewright.llm.restore(model)
    assert decoder_of(model) is None
    torch.testing.assert_close(
        ours.model(input_ids=prompt(2, 9)).logits,
        model(input_ids=prompt(2, 9)).logits,
        rtol=1e-3,
        atol=1e-3,
    )


@torch.no_grad()
def test_dynamo_does_not_look_into_a_call(repeated: list[Executable]) -> None:
    """Of a function of the caller's that it compiles: that has a graph before and one after."""
    from torch._dynamo.testing import CompileCounter

    eager, ours = pair()
    expected = eager.step() * 3
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def tripled(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + 0
        return ours.step(tokens) * 3

    before = len(repeated)
    torch.testing.assert_close(tripled(TOKEN), expected, rtol=1e-3, atol=1e-3)
    assert len(repeated) == before + 1 and counter.frame_count == 2
    assert not decoder_of(ours.model).fallbacks


# --- what the core compares


def test_marks_of_tensors() -> None:
    def marks(*tensors: torch.Tensor) -> Any:
        return _core.TensorMarks([*tensors], torch.Tensor.data_ptr)

    a, b = torch.ones(3), nn.Parameter(torch.ones(2))
    both = marks(a, b)
    assert marks().are_same() and both.are_same()
    a.add_(1)
    assert not both.are_same() and marks(a, b).are_same()
    both = marks(a, b)
    b.data = torch.zeros(2)
    assert not both.are_same()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="version"):
        marks(torch.ones(2))
    both = marks(a, b)
    del a
    assert not both.are_same()
