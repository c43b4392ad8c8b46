"""Experts against a loop over them: every kind of weight, many rows and few, several threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tilewright._core")

from tilewright import core, host
from tilewright.dims import Dim
from tilewright.graph_text import DTYPE_NAMES, Type
from tilewright.lowered import Lowered
from tilewright.program import Executable


def loop(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = [
        F.linear(x[i].double(), weights[e].double(), None if bias is None else bias[e].double())
        for i, chosen in enumerate(indices.tolist())
        for e in chosen
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_against_a_loop(dtype: torch.dtype, rows: int, transposed: bool, biased: bool) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 160).to(dtype)
    weights = torch.randn(3, 96, 160).to(dtype)
    bias = torch.randn(3, 96).to(dtype) if biased else None
    # The last expert gets nothing when there are few rows.
    indices = torch.randint(0, 3 if rows > 5 else 2, (rows, 2))
    stored = weights.transpose(1, 2).contiguous() if transposed else weights
    name, shape = DTYPE_NAMES[dtype], "160, 96" if transposed else "96, 160"
    flags = [f"{flag} = true" for flag, on in (("bias", biased), ("transposed", transposed)) if on]
    text = f"""graph experts(%x: {name}[r, 160], %i: i64[r, 2]) -> ({name}[2*r, 96]) {{
  %w = const "w" : {name}[3, {shape}]
  {f'%b = const "b" : {name}[3, 96]' if biased else ""}
  %y = expert_linear(%x, %w, %i{", %b" if biased else ""}) {{{", ".join(flags)}}}
  return %y
}}
""".replace(" {}", "")
    constants = {"w": stored} | ({"b": bias} if bias is not None else {})
    two_r = Dim.symbol("r") * 2
    lowered = Lowered(
        text,
        constants,
        [0, 1],
        [],
        {"r": (0, 0)},
        [],
        None,
        [Type(dtype, (two_r, Dim.of(96)))],
        None,
        frozenset(),
    )
    executable = Executable(lowered, constants)
    (got,) = executable.run([x, indices], {"r": rows})
    assert not any(region["fallback"] for region in executable.program.report()["regions"])
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    expected = loop(x, weights, indices, bias)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance / 4, atol=tolerance)
    fallback = torch.empty_like(got)
    host.run(
        "expert_linear",
        "{" + ", ".join(flags) + "}",
        [x, stored, indices] + ([bias] if bias is not None else []),
        [fallback],
        {"r": rows},
    )
    torch.testing.assert_close(fallback.double(), expected, rtol=tolerance / 4, atol=tolerance)


def test_an_expert_that_does_not_exist() -> None:
    text = """graph experts(%x: f32[r, 8], %i: i64[r, 1]) -> (f32[r, 32]) {
  %w = const "w" : f32[2, 32, 8]
  %y = expert_linear(%x, %w, %i)
  return %y
}
"""
    constants = {"w": torch.randn(2, 32, 8)}
    result = [Type(torch.float32, (Dim.symbol("r"), Dim.of(32)))]
    lowered = Lowered(
        text, constants, [0, 1], [], {"r": (0, 0)}, [], None, result, None, frozenset()
    )
    executable = Executable(lowered, constants)
    with pytest.raises(core.CoreError, match="out of range"):
        executable.run([torch.randn(3, 8), torch.tensor([[0], [2], [1]])], {"r": 3})
