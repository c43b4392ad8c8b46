"""Plans: a model that has one is not captured and computes the same; whatever capture reads of a
model is in the digest that finds its plan; what is malformed is captured again."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import core, identity, plans
from tilewright.decoder import decoder_of
from tilewright.lowered import RAGGED
from tilewright.model_capture import capture_model
from tiny_models import prompt, tiny_llama


def digest(model: nn.Module, keep: int = 1) -> str:
    return identity.digest_of(model, model.forward, keep)


COUNTS = ("captured", "loaded", "check_failures")


class Shelf:
    """An engine's cache of plans in memory, with the passes of the real one."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.keeps_plans: Callable[[], bool] = lambda: True
        self.plan_key: Callable[[str], str] = core.engine().plan_key
        self.optimize: Callable[[str], str] = core.engine().optimize
        self.load_plan = self.kept.get
        self.remove_plan = self.kept.pop

    def save_plan(self, key: str, name: str, plan: str) -> None:
        assert name == "plan_LlamaForCausalLM"
        self.kept[key] = plan


def counted(shelf: Shelf, model: nn.Module, keep: int = 1) -> tuple[Any, dict[str, int]]:
    """What was planned, and which counters that moved."""
    before = plans.counters()
    planned = plans.planned_model(model, model.forward, keep, lambda captured: captured, shelf)
    after = plans.counters()
    moved = {name: after[name] - before[name] for name in COUNTS}
    return planned, {name: count for name, count in moved.items() if count}


@torch.no_grad()
def test_the_tokens_are_those_of_a_capture() -> None:
    """Through the decoder and the cache of this process."""
    settings = {"max_new_tokens": 6, "do_sample": False}
    make = lambda: tiny_llama(3, intermediate_size=104)  # noqa: E731 - of no other test
    made = []
    for _ in range(2):
        before = plans.counters()
        model = tilewright.llm.optimize(make(), inplace=True)
        made.append(model.generate(prompt(2), **settings))
        made[-1] = torch.cat([made[-1], model(prompt(2)).logits.argmax(-1)], 1)  # weights packed
        after = tilewright.stats()["plans"]
        made.append({name: after[name] - before[name] for name in ("captured", "loaded")})
    assert made[1] == {"captured": 2, "loaded": 0} and made[3] == {"captured": 0, "loaded": 2}
    assert torch.equal(made[0], made[2])
    model = make()
    expected = [model.generate(prompt(2), **settings), model(prompt(2)).logits.argmax(-1)]
    assert torch.equal(made[2], torch.cat(expected, 1))
    assert "from plans" in str(tilewright.explain(model))
    for keep in (0, 1):  # a plan has no weights in it
        key = plans.plan_key(model, model.forward, keep, core.engine())
        assert json.loads(core.engine().load_plan(key).partition("\n")[0])["literals"] == {}


@pytest.mark.parametrize("keep", [0, 1, RAGGED])
def test_a_plan_says_all_that_a_capture_does(keep: int) -> None:
    model, shelf = tiny_llama(3, torch.bfloat16), Shelf()
    captured, counts = counted(shelf, model, keep)
    assert counts == {"captured": 1}
    other = tiny_llama(3, torch.bfloat16)
    loaded, counts = counted(shelf, other, keep)
    assert counts == {"loaded": 1}
    assert loaded.caches == captured.caches and loaded.output_type is captured.output_type
    fields = dict(vars(captured.lowered)), dict(vars(loaded.lowered))
    constants = [field.pop("constants") for field in fields]
    assert fields[0] == fields[1] and fields[0]["has_passed"]
    assert list(constants[0]) == list(constants[1])
    assert all(constants[1][name] is t for name, t in plans.named_tensors(other).items()
               if name in constants[1])  # fmt: skip


class Scaled(nn.Module):
    """A layer that has replaced another, with all that one may hold."""

    def __init__(self, inner: nn.Module, scale: Any) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def scaled(scale: Any) -> Any:
    model = tiny_llama(3)
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp, scale)
    return model


def changed(change: Callable[[Any], Any]) -> Any:
    model = tiny_llama(3)
    change(model)
    return model


def test_a_number_in_the_code_is_in_the_plan() -> None:
    model, shelf = scaled(torch.tensor([1.5, 2.5] * 32)), Shelf()
    counted(shelf, model)
    loaded, counts = counted(shelf, scaled(torch.tensor([1.5, 2.5] * 32)))
    assert counts == {"loaded": 1}
    captured = capture_model(model, model.forward, 1)
    names = plans.named_tensors(model)
    literals = {n: t for n, t in captured.lowered.constants.items() if n not in names}
    assert literals and literals.keys() == captured.literals.keys() == loaded.literals.keys()
    assert all(torch.equal(loaded.lowered.constants[n], t) for n, t in literals.items())


@torch.no_grad()
def test_a_program_keeps_the_numbers_in_its_code() -> None:
    """They are nobody else's: their memory was freed, and the next tensor lay in it."""
    model = scaled(torch.tensor([1.5, 2.5] * 32))
    expected = model(prompt()).logits
    for _ in range(2):  # captured, and from the plan
        optimized = tilewright.llm.optimize(model)
        for _ in range(3):
            logits = optimized(prompt()).logits
            assert (logits - expected).norm() < 1e-4 * expected.norm()
            gc.collect()
            assert [torch.full((64,), 7.0) for _ in range(100)]
        assert not decoder_of(optimized).fallbacks


def test_equal_models_have_one_digest() -> None:
    model = tiny_llama(3)
    before = digest(model)
    capture_model(model, model.forward, 1)
    other = tiny_llama(3)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)  # values of weights do not matter
    other.config._name_or_path = "elsewhere"
    assert before == digest(model) == digest(other)
    # A copy shares weights, but no lists with its original.
    copied = tilewright.llm.optimize(model)
    assert identity.digest_of(copied, decoder_of(copied).original, 1) == before


def _other_function(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def _rotated_otherwise(x: torch.Tensor) -> torch.Tensor:
    return -x


CHANGES: dict[str, Callable[[], Any]] = {
    "a size": lambda: tiny_llama(3, intermediate_size=100),
    "layers": lambda: tiny_llama(4),
    "the type": lambda: tiny_llama(3, torch.bfloat16),
    "untied": lambda: tiny_llama(3, tie_word_embeddings=False),
    "a configuration's value": lambda: changed(lambda m: setattr(m.config, "rms_norm_eps", 1e-3)),
    "an attribute": lambda: changed(
        lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 1e-3)
    ),
    "a buffer": lambda: changed(lambda m: m.model.rotary_emb.inv_freq.mul_(1.01)),
    "a transposed weight": lambda: changed(
        lambda m: setattr(m.model.layers[0].self_attn.q_proj, "weight", nn.Parameter(
            m.model.layers[0].self_attn.q_proj.weight.detach().t().contiguous().t()))
    ),
    "another layer class": lambda: scaled(1.0),
    "its number": lambda: scaled(2.0),
    "its tensor": lambda: scaled(torch.ones(64)),
    "another tensor": lambda: scaled(torch.zeros(64)),
    "a forward of its own": lambda: changed(
        lambda m: setattr(m.model.norm, "forward", _other_function.__get__(m.model.norm))
    ),
}  # fmt: skip


def test_whatever_changes_the_graph_changes_the_digest() -> None:
    digests = {"none": digest(tiny_llama(3)), "logits": digest(tiny_llama(3), 0)}
    digests |= {name: digest(make()) for name, make in CHANGES.items()}
    assert len(set(digests.values())) == len(digests), digests


def test_replaced_functions_count_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    digests = [digest(tiny_llama(3))]
    for owner, name, function in (
        (modeling_llama, "rotate_half", _rotated_otherwise),
        (modeling_llama.LlamaRMSNorm, "forward", _other_function),
        (modeling_llama.LlamaMLP, "__call__", _other_function),  # that it inherited before
        (nn.Linear, "forward", _other_function),
        (nn.functional, "silu", _rotated_otherwise),
        (torch, "matmul", _rotated_otherwise),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function, raising=False)
            digests.append(digest(tiny_llama(3)))
    assert len(set(digests)) == len(digests)
    assert digest(tiny_llama(3)) == digests[0]


def test_adapters_are_part_of_the_model() -> None:
    peft = pytest.importorskip("peft")
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "lora_dropout": 0.0}
    model = peft.get_peft_model(tiny_llama(3), peft.LoraConfig(r=2, **settings), "one").eval()
    model.add_adapter("two", peft.LoraConfig(r=3, **settings))
    inner = model.get_base_model()
    digests = set()
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        digests.add(digest(inner))
    with model.disable_adapter():
        digests.add(digest(inner))
    assert len(digests) == 3


class Opaque:
    __slots__ = ("value",)


UNCERTAIN: dict[str, Callable[[], Any]] = {
    "object": lambda: scaled(Opaque()),
    "iterator": lambda: scaled(iter([1])),
    "hooks": lambda: changed(lambda m: m.model.norm.register_forward_hook(lambda *_: None)),
}


@pytest.mark.parametrize("what", UNCERTAIN)
def test_what_is_uncertain_has_no_plan(what: str) -> None:
    model, shelf = UNCERTAIN[what](), Shelf()
    with pytest.raises(identity.UncertainError, match=what):
        digest(model)
    assert plans.plan_key(model, model.forward, 1, shelf) == ""
    assert any(what in reason for reason in plans.counters()["unplanned"])


def test_malformed_plans_are_captured_again() -> None:
    model, shelf = tiny_llama(3), Shelf()
    captured, _ = counted(shelf, model)
    ((key, good),) = shelf.kept.items()
    line, _, graph = good.partition("\n")

    def with_fields(**fields: Any) -> str:
        return json.dumps(json.loads(line) | fields) + "\n" + graph

    for bad in (
        "",
        "null\n" + graph,
        line[:-1] + "\n" + graph,
        "[" * 100_000,
        with_fields(more=1),
        with_fields(constants=["of.no.model"]),
        with_fields(output=["os", "system"]),
        with_fields(output=["builtins", "list"]),
        with_fields(output=["no.such.module", "Output"]),
        with_fields(caches=[[0, 2]]),
        with_fields(caches=[[0, 2, 16, "f31"]]),
        with_fields(results=[["f32", [[["b"]]]]]),
        with_fields(literals={"number": ["f32", [3], "AAAAAA=="]}),
        with_fields(literals={"number": ["f32", [1], "no base64"]}),
        with_fields(externals=[["aten.add.Tensor"]]),
    ):
        with pytest.raises(plans.MalformedPlanError):
            plans.decode(bad, plans.named_tensors(model), 1)
    shelf.kept[key] = "null"
    planned, counts = counted(shelf, model)
    assert counts == {"captured": 1} and shelf.kept[key] == good
    assert planned.lowered.text == captured.lowered.text
    assert any(reason.startswith("malformed plan") for reason in plans.counters()["unplanned"])


@torch.no_grad()
def test_a_graph_that_the_core_refuses_is_captured_again() -> None:
    """Its digest is right, so nobody but the owner of the cache can have written it."""
    make = lambda: tiny_llama(3, intermediate_size=112)  # noqa: E731 - of no other test
    model = tilewright.llm.optimize(make())
    expected = model(prompt()).logits
    engine = core.engine()
    model = make()
    key = plans.plan_key(model, model.forward, 0, engine)
    plan = engine.load_plan(key)
    bad = plan.replace("rms_norm(", "rms_norms(")
    engine.remove_plan(key)
    engine.save_plan(key, "plan_LlamaForCausalLM", bad)
    assert engine.load_plan(key) == bad != plan
    model = tilewright.llm.optimize(make())
    assert torch.equal(model(prompt()).logits, expected)
    assert not decoder_of(model).fallbacks and engine.load_plan(key) == plan


def test_without_a_cache_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    shelf.keeps_plans = lambda: False
    monkeypatch.setattr(identity, "digest_of", None)
    assert counted(shelf, tiny_llama(2))[1] == {"captured": 1} and not shelf.kept


def test_a_check_finds_a_plan_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shelf = tiny_llama(3), Shelf()
    counted(shelf, model)
    ((key, good),) = shelf.kept.items()
    monkeypatch.setitem(core.settings(), "cache_check", True)
    assert counted(shelf, model)[1] == {"captured": 1}
    shelf.kept[key] = good.replace("eps = 1e-06", "eps = 1e-05")
    assert shelf.kept[key] != good
    planned, counts = counted(shelf, model)
    assert counts == {"captured": 1, "check_failures": 1}
    assert shelf.kept[key] == good and planned.lowered.text == good.partition("\n")[2]


_RUN = """
import json, torch, tilewright
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({directory!r}).eval()
model = tilewright.llm.optimize(model, inplace=True)
ids = torch.arange(1, 20)[None]
made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps([made.tolist(), tilewright.stats()["plans"]]))
"""


def test_another_process_captures_nothing(
    run_python: Any, model_directory: Path, fresh_cache: Path, command: Any
) -> None:
    tokens = []
    for mode, captured in (("rw", 1), ("ro", 0)):
        settings = {"TILEWRIGHT_CACHE": mode, "TILEWRIGHT_CACHE_DIR": str(fresh_cache)}
        done = run_python(_RUN.format(directory=str(model_directory)), settings)
        made, counts = json.loads(done.stdout.splitlines()[-1])
        tokens.append(made)
        assert (counts["captured"], counts["loaded"]) == (captured, 1 - captured), mode
        assert not counts["unplanned"]
    assert tokens[0] == tokens[1]
    (plan,) = fresh_cache.glob("objects/*/*.plan")
    listed = json.loads(command("cache", "ls", "--json").stdout)["entries"]
    (entry,) = (entry for entry in listed if entry["kind"] == "plan")
    assert entry["id"] == plan.stem and entry["name"] == "plan_LlamaForCausalLM"
    assert "rms_norm" in command("cache", "show", plan.stem).stdout
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "0 of 1 plans" in command("cache", "verify", code=1).stdout
