"""The cases of single ops: every one computes what PyTorch computes, through our backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench_models import op_cases, ops


def small(case: op_cases.Case) -> op_cases.Case:
    """The same case with sizes that take no time."""
    smaller = {"k": 96, "n": 80, "keys": 24}
    sizes = tuple((name, min(value, smaller.get(name, value))) for name, value in case.sizes)
    rows = min(case.rows, 24)
    return op_cases.Case(case.set, case.name, case.op, case.dtype, rows, sizes)


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Dynamo would keep the programs until the process ends."""
    yield
    torch._dynamo.reset()


CASES = {
    (case.op, case.dtype, case.rows > 1): small(case) for case in op_cases.read_cases(rows=(1, 128))
}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.title)
def test_every_case_runs_in_our_kernels(
    case: op_cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "COLD_BYTES", 3 * case.cold_bytes)
    operands = ops.Operands(case)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[case.dtype]
    assert ops.error_of(ops.aten(operands)(0), operands) < tolerance
    try:
        call = ops.ours(operands)
    except ops.UnableError as reason:
        pytest.skip(f"not in our kernels: {reason}")
    assert ops.error_of(call(0), operands) < tolerance


def test_cold_weights_exceed_a_gigabyte() -> None:
    for case in op_cases.read_cases("matmul"):
        assert ops.copies_of(case) * case.cold_bytes > 1e9
        assert case.flops == 2 * case.rows * case.size("k") * case.size("n")


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="there are attention, matmul, rows"):
        op_cases.read_cases("matmull")
