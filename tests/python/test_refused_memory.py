"""A system that refuses executable memory: everything runs in PyTorch, right and said once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tilewright._core")

from refused_memory import UNSUPPORTED

HERE = Path(__file__).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == UNSUPPORTED:
        pytest.skip("this kernel does not know how to refuse")
    return done


def refused(how: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command under one of refused_memory.py's refusals."""
    return run(sys.executable, str(HERE / "refused_memory.py"), how, *command)


MODELS = """
import json, logging, torch, tilewright
from tiny_models import prompt, tiny_llama
logging.basicConfig(format="%(message)s")
model = tiny_llama(2)
expected = model.generate(prompt(1, 9), max_new_tokens=6, do_sample=False)
model = tilewright.llm.optimize(model, inplace=True)
assert torch.equal(model.generate(prompt(1, 9), max_new_tokens=6, do_sample=False), expected)
module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
for fast in (tilewright.llm.optimize(module), torch.compile(module, backend="tilewright")):
    with torch.no_grad():
        assert fast(torch.ones(2, 8)).isfinite().all()
explanation = tilewright.explain(model)
assert "no executable memory: mprotect" in explanation.problem
assert explanation.problem in str(explanation)
assert [region["fallback"] for region in explanation.regions] == [True]
assert tilewright.stats()["problem"] == explanation.problem
assert tilewright.stats()["fallbacks"] == {explanation.problem: 8}
from typer.testing import CliRunner
from tilewright.cli import app
data = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
assert data["problems"] == [f"everything runs in PyTorch: {explanation.problem}"]
"""


@pytest.mark.parametrize("how", ["mdwe", "seccomp"])
def test_models_run_in_pytorch_and_one_warning_says_why(how: str) -> None:
    done = refused(how, sys.executable, "-c", MODELS)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "executable memory" in line]
    assert len(warnings) == 1, done.stderr
    assert warnings[0].startswith("everything runs in PyTorch: no executable memory: mprotect")


def test_that_begins_after_the_engine_was_made() -> None:
    """Weights are packed, and given back, before their kernels are refused."""
    code = """
import torch, tilewright
from refused_memory import UNSUPPORTED, refuse
from tiny_models import prompt, tiny_llama
assert not tilewright.stats()["problem"]
model = tiny_llama(1)
expected = model.generate(prompt(1, 9), max_new_tokens=3, do_sample=False)
model = tilewright.llm.optimize(model, inplace=True)
if not refuse("mdwe"):
    raise SystemExit(UNSUPPORTED)
assert torch.equal(model.generate(prompt(1, 9), max_new_tokens=3, do_sample=False), expected)
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_generation_is_right_on_fallbacks() -> None:
    """Part of the unit suite: what compares with PyTorch and does not ask who computed."""
    suite = [
        str(HERE / "test_call_surface.py"),
        "-k",
        "test_generation and qwen2 and (greedy or beams)",
    ]
    done = refused("seccomp", sys.executable, "-m", "pytest", "-q", *suite)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout
