"""The cases of single ops: every one computes what PyTorch computes, through our backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from bench_models import goals, op_cases, ops
from tilewright import program


def small(case: op_cases.Case) -> op_cases.Case:
    """The same case with sizes that take no time."""
    smaller = {"k": 96, "n": 80, "keys": 24}
    sizes = tuple((name, min(value, smaller.get(name, value))) for name, value in case.sizes)
    rows = min(case.rows, 24)
    return dataclasses.replace(case, rows=rows, sizes=sizes)


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Dynamo would keep the programs until the process ends."""
    yield
    torch._dynamo.reset()


CASES = {
    (case.op, case.dtype, case.rows > 1, case.form_name): small(case)
    for case in op_cases.read_cases(rows=(1, 512))
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
        if case.form.warm:
            assert ops.copies_of(case) == 1
            continue
        assert ops.copies_of(case) * case.cold_bytes > 1e9
        assert case.flops == 2 * case.rows * case.size("k") * case.size("n")


def test_unknown_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="there are attention, matmul, rows"):
        op_cases.read_cases("matmull")


def test_forms_are_computed_in_the_form_that_they_name() -> None:
    """16 and 12 bits, and fp32 weights that fit bf16, differ in what a call reads."""
    by_form = {}
    for case in op_cases.read_cases("matmul", rows=(1,)):
        if case.name != "135m gate and up":
            continue
        operands = ops.Operands(small(case))
        operands.weights = operands.weights[:1]
        programs: list[Any] = []
        with mock.patch.object(program, "Executable", recording(programs)):
            ops.ours(operands)
        (kernel,) = {region["kernel"] for region in programs[-1].program.report()["regions"]}
        by_form[case.form_name] = kernel
    assert "weight=f32" in by_form[""]
    assert "weight=bf16" in by_form["exact"]
    assert "weight=bf16" in by_form["16 bits"]
    assert "twelve_bits" not in by_form["16 bits"]
    assert "twelve_bits" in by_form["12 bits"]


def recording(made: list[Any]) -> Any:
    """Executable, whose instances are kept."""
    original = program.Executable

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(original(*arguments, **options))
        return made[-1]

    return make


def test_forms_of_amx_need_it() -> None:
    without = {case.form_name for case in op_cases.read_cases("matmul")}
    with_it = {case.form_name for case in op_cases.read_cases("matmul", isa="avx512f+amx_bf16")}
    assert with_it - without == {"by AMX", "exact by AMX"}


def test_goals_take_the_better_peer_and_say_what_was_not_measured() -> None:
    def case(dtype: str, rows: int, form: str, share: float, ratio: float) -> dict[str, Any]:
        of_peer = {"ratio": {"median": ratio}}
        own = {"share_of_limit": share}
        peers = {"aten": of_peer, "onednn": {"ratio": {"median": ratio + 1}}}
        return {"set": "matmul", "dtype": dtype, "rows": rows, "form": form,
                "implementations": {"tilewright": own, **peers}}  # fmt: skip

    record = {
        "isa": "avx2",
        "cases": [case("bf16", 1, "12 bits", 1.2, 1.5), case("bf16", 1, "12 bits", 1.1, 1.7)],
    }
    standing = {row.goal.title: row for row in goals.standing(record)}
    assert standing["GEMV bf16 in 12 bits"].shares == [1.2, 1.1]
    assert standing["GEMV bf16 in 12 bits"].ratios == [1.5, 1.7]
    assert standing["GEMV fp32"].reason == "no case was measured"
    assert standing["bf16 by AMX, warm"].reason == "this machine has no amx_bf16"
