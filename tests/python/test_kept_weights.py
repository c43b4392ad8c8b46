"""Packed weights on disk: a model whose weights were kept packs nothing and computes the same bits;
whatever changed a weight, it is packed anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import core
from tilewright.kept_weights import keep_weights
from tilewright.packed import PackedParameter
from tiny_models import prompt, tiny_llama


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    """The same weights each time, which no other test has."""
    return tiny_llama(2, dtype, intermediate_size=88)


def made_by(model: Any) -> dict[str, int]:
    """Optimises and runs it; how many weights were packed and mapped for that."""
    before = core.weight_counters()
    tilewright.llm.optimize(model, inplace=True)
    logits(model)
    after = core.weight_counters()
    return {name: after[name] - before[name] for name in ("packed", "mapped")}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        step: torch.Tensor = model(prompt()).logits
    return step


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


def test_a_warm_start_packs_nothing(dtype: torch.dtype) -> None:
    cold = make_model(dtype)
    counts = made_by(cold)
    assert counts["packed"] > 0 and counts["mapped"] == 0
    written = keep_weights(tilewright.llm.optimize(make_model(dtype)))
    assert written["written"] >= counts["packed"] and not written["write_failures"]

    warm = make_model(dtype)
    assert made_by(warm) == {"packed": 0, "mapped": counts["packed"]}
    assert torch.equal(logits(warm), logits(cold))
    explanation = tilewright.explain(warm)
    assert explanation.weights_mapped >= counts["packed"]
    assert "mapped from the cache" in str(explanation)
    assert tilewright.stats()["weights"]["mapped"] >= counts["packed"]

    # The mapped weight is the only copy now, and it reads as the original.
    weight = warm.model.layers[0].mlp.down_proj.weight
    assert type(weight) is PackedParameter and weight.token is not None
    for name, expected in make_model(dtype).state_dict().items():
        assert torch.equal(warm.state_dict()[name], expected), name


def test_a_changed_weight_is_not_found() -> None:
    dtype = torch.float32
    keep_weights(tilewright.llm.optimize(make_model(dtype)))
    model = make_model(dtype)
    weight = model.model.layers[1].mlp.down_proj.weight
    version = weight._version
    weight.data[5, 7] += 0.5
    assert weight._version == version  # what torch would not tell
    expected = logits(model)
    counts = made_by(model)
    assert counts["packed"] == 1 and counts["mapped"] > 1
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()

    # Also after its program was made: mapped weights unpack, change, and are packed again.
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(2)
    before = core.weight_counters()["packed"]
    changed = logits(model)
    assert core.weight_counters()["packed"] > before
    assert not torch.equal(changed, logits(make_model(dtype)))
    reference = make_model(dtype)
    reference.load_state_dict(model.state_dict())
    assert (changed - logits(reference)).abs().max() <= 1e-4 * changed.abs().max()


def test_the_command_writes_and_verifies(command, model_directory: Path, fresh_cache: Path) -> None:
    written = json.loads(command("cache", "weights", str(model_directory), "--json").stdout)
    assert written["written"] > 0 and written["mapped"] == 0
    listed = json.loads(command("cache", "ls", "--json").stdout)["weights"]
    assert len(listed) == written["written"]
    again = json.loads(command("cache", "weights", str(model_directory), "--json").stdout)
    assert again["written"] == 0 and again["mapped"] == written["written"]
    explained = json.loads(
        command("explain", str(model_directory), "--prompt", "abc", "--json").stdout
    )
    assert explained["weights_packed"] == 0 and explained["weights_mapped"] > 0

    damaged = fresh_cache / listed[0]["file"]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.chmod(0o600)
    damaged.write_bytes(content)
    bad = json.loads(command("cache", "verify", "--json", code=1).stdout)["bad"]
    assert [(row["file"], row["problem"]) for row in bad] == [(listed[0]["file"], "wrong content")]
