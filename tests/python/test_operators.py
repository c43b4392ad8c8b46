"""torch.ops.tilewright: programs as operators, registered through torch's stable ABI."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("tilewright._core")

from tilewright import _core, backend, operators
from tilewright.program import Executable


@pytest.fixture
def executable() -> Iterator[Executable]:
    """silu(x @ w.T) for any number of rows."""
    torch._dynamo.reset()
    gc.collect()
    before = set(backend.graphs)
    weight = torch.nn.Parameter(torch.randn(48, 32))
    compiled = torch.compile(
        lambda x: F.silu(F.linear(x, weight)), backend=backend.backend, dynamic=True
    )
    with torch.no_grad():
        compiled(torch.randn(5, 32))
    (graph,) = set(backend.graphs) - before
    graph.executable.weight = weight
    yield graph.executable
    torch._dynamo.reset()


def step(executable: Executable, x: torch.Tensor) -> Any:
    # The graph's inputs: the weight is a constant of the program, so x is its only tensor.
    sizes = [int(x.shape[0])] * len(executable.lowered.shape_inputs)
    return torch.ops.tilewright.step(executable.program.handle, [x], sizes, [], False, 1)


def test_the_operator_runs_the_program(executable: Executable) -> None:
    x = torch.randn(9, 32)
    before = executable.program.report()["prefill"]["runs"]
    (y,) = step(executable, x)
    expected = F.silu(F.linear(x, executable.weight.detach()))
    torch.testing.assert_close(y, expected, rtol=2e-4, atol=2e-5)
    assert executable.program.report()["prefill"]["runs"] == before + 1


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    ],
    ids=str,
)  # fmt: skip
def test_results_have_the_dtype_that_eager_gives(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x = torch.randint(0, 2, (70, 3)).to(dtype)

    def shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([x, x], 1), x.clone()

    compiled = torch.compile(shifted, backend=backend.backend)
    for got, expected in zip(compiled(x), shifted(x), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_fake_tensors_and_tracing_see_its_shape(executable: Executable) -> None:
    with FakeTensorMode():
        (y,) = step(executable, torch.empty(11, 32))
        assert tuple(y.shape) == (11, 48) and y.dtype == torch.float32
    x = torch.randn(3, 32)
    traced = make_fx(lambda x: step(executable, x)[0])(x)
    assert any(node.target is operators.step for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), step(executable, x)[0])


def test_wrong_calls_are_errors(executable: Executable) -> None:
    x = torch.randn(3, 32)
    with pytest.raises(RuntimeError, match="this program is gone"):
        torch.ops.tilewright.step(10**9, [x], [], [], False, 1)
    with pytest.raises(RuntimeError, match="tensors given"):
        torch.ops.tilewright.step(executable.program.handle, [], [], [], False, 1)
    with pytest.raises(RuntimeError, match="row-major"):
        step(executable, torch.randn(32, 3).T)
    with pytest.raises(RuntimeError):
        step(executable, torch.randn(3, 31))


def test_the_library_uses_the_stable_abi_only() -> None:
    library = Path(_core.__file__).with_name("_operators.so")
    command = ["nm", "-D", "--undefined-only", "-C", str(library)]
    symbols = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "torch_library_impl" in symbols
    unstable = [line for line in symbols.splitlines() if "at::" in line or "c10::" in line]
    assert not unstable
