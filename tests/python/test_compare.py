"""compare: right models are within their bounds, and a planted wrong weight is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import padded, prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimised_model_is_right(dtype: torch.dtype) -> None:
    model = tilewright.llm.optimize(tiny_llama(2, dtype))
    comparison = tilewright.compare(model, {"input_ids": prompt(2, 9)})
    assert comparison.first is None, str(comparison)
    names = " ".join(region.name for region in comparison.regions)
    for name in ("linear", "rms_norm", "attention", "gated_mlp_up", "kv_append"):
        assert name in names
    assert all(not region.reason for region in comparison.regions), str(comparison)
    if dtype == torch.float32:  # results in bf16 are often equal
        assert any(region.error > 0 for region in comparison.regions)
    assert "every compared region is within its bound" in str(comparison)


@torch.no_grad()
def test_a_decode_step_leaves_the_callers_cache() -> None:
    model = tilewright.llm.optimize(tiny_llama(2))
    cache = model(prompt(2, 9)).past_key_values
    inputs = {"input_ids": prompt(2, 1), "past_key_values": cache}
    comparison = tilewright.compare(model, inputs)
    assert comparison.first is None and comparison.regions, str(comparison)
    assert cache.get_seq_length() == 9


def test_packed_weights_stay_packed() -> None:
    model = tilewright.llm.optimize(tiny_llama(2), inplace=True)
    comparison = tilewright.compare(model, {"input_ids": prompt()})
    assert comparison.first is None, str(comparison)
    weight: Any = model.model.layers[0].mlp.down_proj.weight
    assert weight.token is not None


def test_compiled_modules() -> None:
    layers = (
        torch.nn.Linear(32, 64),
        torch.nn.GELU(),
        torch.nn.Linear(64, 8),
        torch.nn.Softmax(-1),
    )
    model = torch.compile(torch.nn.Sequential(*layers).eval(), backend="tilewright")
    comparison = tilewright.compare(model, torch.randn(5, 32))
    assert comparison.first is None and len(comparison.regions) >= 2, str(comparison)


def test_a_padded_cache_is_named() -> None:
    model = tilewright.llm.optimize(tiny_llama(2))
    comparison = tilewright.compare(model, padded([9, 4]))
    left_out = [region for region in comparison.regions if region.reason]
    assert len(left_out) == 2 and all("padded cache" in str(region) for region in left_out)
    assert "2 x attention: not compared" in str(comparison)
    assert comparison.first is None


def test_what_runs_in_pytorch_is_named() -> None:
    comparison = tilewright.compare(torch.nn.Linear(3, 3).eval(), torch.randn(2, 3))
    assert "nothing ran in a program of ours" in str(comparison)
    assert callable(tilewright.explain)  # the function, though compare's module imports explain's
    with pytest.raises(ValueError, match="no region differs"):
        comparison.save("never.graph")


def test_a_wrong_region_is_found_and_reproduced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The down projection of layer 1 computes with another weight than the reference is given."""
    from tilewright.program import Weights

    right = Weights.readable

    def planted(self: Weights, store: Any) -> dict[str, torch.Tensor]:
        tensors = right(self, store)
        (name,) = [name for name in tensors if "layers.1.mlp.down_proj" in name]
        changed = tensors[name].clone()
        changed[5, 7] += 0.01
        return {**tensors, name: changed}

    model = tilewright.llm.optimize(tiny_llama(3))
    monkeypatch.setattr(Weights, "readable", planted)
    comparison = tilewright.compare(model, {"input_ids": prompt()})
    first = comparison.first
    assert first is not None and "linear" in first.name and "down_proj" in first.graph
    assert sum(region.differs for region in comparison.regions) == 1
    assert f"first beyond its bound: {first}" in str(comparison)

    file = tmp_path / "region.graph"
    comparison.save(file)
    twc = [sys.executable, "-c", "from tilewright.twc import main; main()"]
    run = subprocess.run([*twc, "run", str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "output 0: element" in run.stderr, run.stderr
    assert "instead of" in run.stderr
