"""ModuleState: whatever is changed about a model is noticed, and what stays equal is not.

The core compares versions of dicts where Python has them, so each way in which Python writes to a
dict is tried here, after the interpreter has specialised the instruction that does it.
"""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import _core
from tilewright.decoder import decoder_of
from tilewright.module_state import ModuleState

OFTEN = 100  # more than the interpreter waits until it specialises


def norm(model: Any) -> Any:
    return model.model.layers[1].input_layernorm


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute replaced": lambda m: setattr(norm(m), "variance_epsilon", 0.5),
    "attribute added": lambda m: setattr(norm(m), "new", 1),
    "attribute removed": lambda m: delattr(norm(m), "variance_epsilon"),
    "training": lambda m: norm(m).train(),
    "forward": lambda m: setattr(norm(m), "forward", lambda x: x),
    "parameter replaced": lambda m: setattr(norm(m), "weight", nn.Parameter(torch.ones(64))),
    "parameter added": lambda m: m.model.layers[1].register_parameter("p", nn.Parameter(None)),
    "parameter removed": lambda m: delattr(norm(m), "weight"),
    "bias": lambda m: m.model.layers[1].mlp.up_proj.register_parameter(
        "bias", nn.Parameter(torch.ones(96))
    ),
    "buffer replaced": lambda m: setattr(m.model.rotary_emb, "inv_freq", torch.ones(8)),
    "buffer added": lambda m: norm(m).register_buffer("b", torch.ones(2)),
    "module replaced": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.ReLU()),
    "module added": lambda m: norm(m).add_module("inner", nn.ReLU()),
    "module of a list": lambda m: m.model.layers.append(nn.ReLU()),
    "modules swapped": lambda m: m.model.layers._modules.update(
        {"0": m.model.layers[1], "1": m.model.layers[0]}
    ),
    "configuration": lambda m: setattr(m.config, "rms_norm_eps", 0.5),
    "list, item": lambda m: norm(m).names.__setitem__(0, "b"),
    "list, appended": lambda m: norm(m).names.append("b"),
    "dict, item": lambda m: norm(m).scales.__setitem__("a", 2.0),
    "dict, added": lambda m: norm(m).scales.__setitem__("b", 1.0),
    "set": lambda m: norm(m).kinds.add("b"),
    "set, same size": lambda m: (norm(m).kinds.clear(), norm(m).kinds.add("b")),
    "tensor of a dict": lambda m: norm(m).tables.__setitem__("a", torch.ones(3)),
}


def model_with_containers() -> Any:
    model = tiny_llama(2)
    vars(norm(model)).update(names=["a"], scales={"a": 1.0}, kinds={"a"})
    norm(model).tables = {"a": torch.ones(3)}
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    model = model_with_containers()
    state = ModuleState(model)
    for _ in range(2):
        assert state.is_current()
    CHANGES[change](model)
    for _ in range(2):
        assert not state.is_current()


def test_equal_values_are_no_change() -> None:
    model = model_with_containers()
    state = ModuleState(model)
    norm(model).variance_epsilon = norm(model).variance_epsilon * 2 / 2
    norm(model).scales["a"] = float("1.0")
    norm(model).names[:] = [str(b"a", "ascii")]
    norm(model).kinds = norm(model).kinds
    model.config._attn_implementation_internal = "another"
    assert state.is_current()
    norm(model).scales["a"] = 2.0
    assert not state.is_current()
    norm(model).scales["a"] = 1.0
    assert state.is_current()


def test_hooks_of_inner_modules() -> None:
    model = tiny_llama(2)
    state = ModuleState(model)
    assert state.hooked() == ""
    hook = norm(model).register_forward_hook(lambda *_: None)
    for _ in range(2):
        assert state.hooked() == "model.layers.1.input_layernorm" and state.is_current()
    hook.remove()
    model.register_forward_hook(lambda *_: None)
    assert state.hooked() == ""


# --- the core's snapshot


class Plain:
    def __init__(self, value: Any) -> None:
        self.first = None
        self.value = value


def store(target: Any, values: list[Any]) -> None:
    for value in values:
        target.value = value


WRITES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "item": lambda d: d.__setitem__("value", 2),
    "new item": lambda d: d.__setitem__("new", 2),
    "deletion": lambda d: d.__delitem__("value"),
    "update": lambda d: d.update(value=2),
    "in place or": lambda d: d.__ior__({"value": 2}),
    "setdefault": lambda d: d.setdefault("new", 2),
    "pop": lambda d: d.pop("value"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
}


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("write", WRITES)
def test_each_write_to_a_dict(write: str, kind: type) -> None:
    watched = kind(first=None, value=1)
    snapshot = _core.Snapshot([{}, watched], [{}, watched.copy()])
    assert snapshot.moved() == [] == snapshot.moved()
    WRITES[write](watched)
    assert snapshot.moved() == [1] == snapshot.moved()


@pytest.mark.parametrize("kind", [Plain, nn.Module])
@pytest.mark.parametrize("looked_at", [False, True])
def test_each_store_of_an_attribute(kind: type, looked_at: bool) -> None:
    """looked_at: the instance has a dict already when the interpreter specialises its store."""
    first, values = object(), [object() for _ in range(OFTEN)]
    made = [Plain(0) if kind is Plain else nn.Module() for _ in range(OFTEN)]
    for each in made:
        if looked_at:
            assert vars(each)
        store(each, [*values, first])
    for each in made:
        snapshot = _core.Snapshot([vars(each)], [dict(vars(each))])
        assert snapshot.moved() == []
        for value in values:
            store(each, [value])
            assert snapshot.moved() == [0]
            store(each, [first])
            assert snapshot.moved() == []
        store(each, values)
        assert snapshot.moved() == [0]


def test_a_store_in_one_hot_loop() -> None:
    """Written and compared in the same function, so that nothing between specialises anew."""
    each = Plain(0)
    snapshot = _core.Snapshot([vars(each)], [dict(vars(each))])
    zero = each.value
    for i in range(10 * OFTEN):
        each.value = object()
        assert snapshot.moved() == [0], i
        each.value = zero
        assert snapshot.moved() == [], i


def test_order_counts_and_copies_may_be_replaced() -> None:
    watched = {"a": 1, "b": 2}
    then = [dict(watched)]
    snapshot = _core.Snapshot([watched], then)
    watched["a"] = watched.pop("a")
    assert snapshot.moved() == [0]
    then[0] = dict(watched)
    assert snapshot.moved() == []


@torch.no_grad()
def test_a_model_that_nobody_holds_goes() -> None:
    model = tilewright.llm.optimize(tiny_llama(2), inplace=True)
    cache = model(prompt()).past_key_values
    model(prompt()[:, :1], past_key_values=cache)
    assert decoder_of(model) is not None
    gone = [weakref.ref(model), weakref.ref(decoder_of(model)), weakref.ref(cache.layers[0])]
    del cache
    assert gone[2]() is None  # at once: the collector may come late, and keys are much memory
    del model
    gc.collect()
    assert [each() for each in gone] == [None] * 3
