"""Bad input: a clear error, or a fallback with a visible reason and the right answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import backend as backends
from tilewright.backend import backend
from tilewright.decoder import decoder_of


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- llm.optimize


@pytest.mark.parametrize(
    "keyword",
    ["quantization_config", "deployment_mode", "sample_inputs", "weights_prepack", "graph_mode"],
)
def test_keywords_of_the_predecessor(keyword: str) -> None:
    with pytest.raises(TypeError, match=f"no argument '{keyword}': "):
        tilewright.llm.optimize(tiny_llama(3), **{keyword: True})


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        tilewright.llm.optimize(tiny_llama(3), speed="more")


def test_quantization_is_not_there_yet() -> None:
    with pytest.raises(NotImplementedError, match="quantization"):
        tilewright.llm.optimize(tiny_llama(3), quantization="int8")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bf16", torch.complex64])
def test_wrong_types(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        tilewright.llm.optimize(tiny_llama(3), dtype=dtype)


def test_what_is_not_a_module() -> None:
    with pytest.raises(TypeError, match="not str"):
        tilewright.llm.optimize("gpt2")


def test_training_mode() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        tilewright.llm.optimize(tiny_llama(3).train())


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4).eval()
    with pytest.raises(ValueError, match="meta device"):
        tilewright.llm.optimize(model)


def test_twice() -> None:
    model = tilewright.llm.optimize(tiny_llama(3))
    with pytest.raises(ValueError, match="optimised already"):
        tilewright.llm.optimize(model)


def test_the_wrong_order() -> None:
    compiled = torch.compile(tiny_llama(3), backend="tilewright")
    with pytest.raises(ValueError, match="optimize the model first"):
        tilewright.llm.optimize(compiled)


def fallback_reason(optimized: Any) -> str:
    decoder = decoder_of(optimized)
    assert decoder is not None and decoder.calls == 0 and len(decoder.fallbacks) == 1
    return next(iter(decoder.fallbacks))


def test_training_mode_later() -> None:
    model = tilewright.llm.optimize(tiny_llama(3), inplace=True)
    model.train()
    with torch.no_grad():
        model(prompt())
    assert "training mode" in fallback_reason(model)
    assert "training mode" in str(tilewright.explain(model))


def test_gradients() -> None:
    model = tilewright.llm.optimize(tiny_llama(3), inplace=True)
    assert model(prompt()).logits.requires_grad
    assert "gradients are enabled" in fallback_reason(model)


def test_autocast_around_an_optimised_model() -> None:
    model = tilewright.llm.optimize(tiny_llama(3), inplace=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(prompt()).logits
        expected = decoder_of(model).original(prompt()).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected)
    assert "autocast" in fallback_reason(model)


@torch.no_grad()
def test_wrong_inputs_fail_as_in_pytorch() -> None:
    model = tilewright.llm.optimize(tiny_llama(3), inplace=True)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(IndexError):
        model(torch.tensor([[100000]]))
    assert model(prompt()).logits.shape == (1, 9, 160)


# --- the backend


def declined(function: Any, *inputs: Any) -> str:
    """Runs and compares; the reason why torch ran it."""
    before = set(backends.graphs)
    compiled = torch.compile(function, backend=backend)
    actual, expected = compiled(*inputs), function(*inputs)
    if expected.layout == torch.strided:
        torch.testing.assert_close(actual, expected)
    (graph,) = set(backends.graphs) - before
    assert graph.executable is None and graph.fallback_calls == 1
    return graph.reason


def test_gradients_in_a_compiled_module() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    assert "gradients are enabled" in declined(layer, x)
    torch.compile(layer, backend=backend)(x).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_autocast_around_a_compiled_module() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast is active" in declined(nn.Linear(8, 8), torch.randn(3, 8))


@torch.no_grad()
def test_autocast_inside_a_compiled_function() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ w

    assert "autocast" in declined(function, torch.randn(4, 8), torch.randn(8, 8))


@torch.no_grad()
def test_complex_numbers() -> None:
    assert "complex" in declined(lambda x: x * 2, torch.randn(3, dtype=torch.complex64))


@torch.no_grad()
def test_sparse_tensors() -> None:
    x = torch.eye(4).to_sparse()
    compiled = torch.compile(lambda x, y: torch.mm(x, y) + 1, backend=backend)
    torch.testing.assert_close(compiled(x, torch.ones(4, 4)), torch.full((4, 4), 2.0))


@torch.no_grad()
def test_meta_inputs() -> None:
    compiled = torch.compile(lambda x: x * 2, backend=backend)
    assert compiled(torch.empty(3, device="meta")).device.type == "meta"


@torch.no_grad()
def test_tensor_subclasses() -> None:
    class Marked(torch.Tensor):
        pass

    x = torch.ones(3).as_subclass(Marked)
    compiled = torch.compile(lambda x: x * 2, backend=backend)
    assert torch.equal(torch.Tensor(compiled(x)), torch.full((3,), 2.0))


# --- the environment, each in a process of its own

STEP = """
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
sys.path.insert(0, {tests!r})
import torch, tilewright
from tiny_models import tiny_llama, prompt
model = tiny_llama(3)
optimized = tilewright.llm.optimize(model)
with torch.no_grad():
    difference = (optimized(prompt()).logits - model(prompt()).logits).abs().max()
assert difference < 1e-3, difference
explanation = tilewright.explain(optimized).to_dict()
print(sum(explanation["fallbacks"].values()), explanation["kernels_emitted"])
print(explanation["notes"], file=sys.stderr)
"""


@pytest.fixture
def step(run_python: Any) -> Any:
    code = STEP.format(tests=str(Path(__file__).parent))
    return lambda environment, **options: run_python(
        code, {"TILEWRIGHT_CACHE": "rw", **environment}, **options
    )


def test_nonsense_as_instruction_set(step: Any) -> None:
    done = step({"TILEWRIGHT_MAX_CPU_ISA": "nonsense"})
    assert "nonsense" in done.stderr and "TILEWRIGHT_MAX_CPU_ISA" in done.stderr
    assert done.stdout.split()[0] == "0"


def test_avx2_only(step: Any) -> None:
    assert step({"TILEWRIGHT_MAX_CPU_ISA": "avx2"}).stdout.split()[0] == "0"


def test_switched_off(step: Any) -> None:
    done = step({"TILEWRIGHT_DISABLE": "1"})
    assert done.stdout.split()[0] == "1" and "TILEWRIGHT_DISABLE" in done.stderr


def test_switched_off_ops_run_in_torch(step: Any) -> None:
    done = step({"TILEWRIGHT_DISABLE": "linear,norm"})
    assert done.stdout.split()[0] == "0"


def test_without_a_cache(step: Any) -> None:
    assert int(step({"TILEWRIGHT_CACHE": "off"}).stdout.split()[1]) > 0


def test_a_cache_directory_that_is_a_file(step: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    done = step({"TILEWRIGHT_CACHE_DIR": str(file)})
    assert "cache" in done.stderr and int(done.stdout.split()[1]) > 0


def test_a_cache_directory_that_others_may_write(step: Any, tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    os.chmod(directory, 0o777)
    done = step({"TILEWRIGHT_CACHE_DIR": str(directory)})
    assert "cache" in done.stderr and int(done.stdout.split()[1]) > 0
    assert not list(directory.iterdir())


def test_broken_entries_are_misses(step: Any, fresh_cache: Path) -> None:
    environment = {"TILEWRIGHT_CACHE_DIR": str(fresh_cache)}
    emitted = int(step(environment).stdout.split()[1])
    files = list(fresh_cache.rglob("*.kernel"))
    assert emitted == len(files) > 0
    assert int(step(environment).stdout.split()[1]) == 0
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[0].chmod(0o600)
    files[0].write_bytes(bytes(data))
    assert int(step(environment).stdout.split()[1]) == 1


def test_strict(run_python: Any) -> None:
    code = """
import torch, tilewright.backend
torch.compile(lambda x: x * 2, backend=tilewright.backend.backend)(torch.ones(3) * 1j)
"""
    done = run_python(code, {"TILEWRIGHT_STRICT": "1"}, check=False)
    assert done.returncode != 0 and "complex" in done.stderr


def test_onednn_that_is_not_there(step: Any) -> None:
    environment = {
        "TILEWRIGHT_DISABLE": "linear,norm,softmax",
        "TILEWRIGHT_FALLBACK": "onednn",
    }
    done = step(environment)
    assert done.stdout.split()[0] == "0"
