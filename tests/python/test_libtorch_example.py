"""The C++ example program (tests/torchscript_example.cpp) on a decoder that Python traced.

`./dev test` builds it before the Python tests run.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import tiny_models


class Logits(torch.nn.Module):
    """TorchScript knows tensors only: no cache, no output object."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits


def test_a_traced_decoder_runs_in_our_code_in_a_cpp_program(
    source_directory: Path, tmp_path: Path
) -> None:
    program = source_directory / "build" / "dev" / "tests" / "torchscript_example"
    if not program.exists():
        pytest.fail(f"{program} is not built: run cmake --build --preset dev")
    model = Logits(tiny_models.build(tiny_models.llama_config())).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.zeros(2, 9, dtype=torch.int64)).save(tmp_path / "model.pt")
    done = subprocess.run(
        [program, tmp_path / "model.pt", "2", "9", "64"],
        env={**os.environ, "TILEWRIGHT_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = dict(line.split() for line in done.stdout.splitlines())
    assert report["runs"] == "1"
    assert float(report["own_flops_share"]) >= 0.95
    assert report["fallback_calls"] == "0"
    assert float(report["largest_difference"]) < 1e-4
