"""The cases of single ops: one table, tests/op_cases.json, for this benchmark and for the tests.

A case is a shape and an op; rows (M), dtype and what is special about its weights (FORMS) multiply
it. Here it becomes a module, its inputs, and how many bytes and operations one call needs. Tested
by tests/python/test_bench_ops.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench_models.places import REPOSITORY

TABLE = REPOSITORY / "tests" / "op_cases.json"
ROWS = (1, 4, 16, 128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Form:
    """What a case asks of its weights besides their dtype, and of whom."""

    dtype: str
    rows: tuple[int, ...]
    choices: str = ""  # for the engine, a JSON object
    exact: bool = False  # fp32 values that fit bf16
    warm: bool = False  # one copy of the weights, which stays in the caches where it fits
    isa: str = ""  # only where the machine has it


# Every matmul is measured as the machine would run it ("") unless two other forms stand for that.
FORMS = {
    "16 bits": Form("bf16", (1, 4), f'{{"twelve_bits_from": {(1 << 63) - 1}}}'),
    "12 bits": Form("bf16", (1, 4), '{"twelve_bits_from": 0}'),
    "exact": Form("fp32", (1,), exact=True),
    "warm": Form("fp32", (512,), warm=True),
    "warm bf16": Form("bf16", (512,), warm=True),
    "by AMX": Form("fp32", (512,), '{"fp32_products": 6}', isa="amx_bf16"),
    "exact by AMX": Form("fp32", (512,), '{"fp32_products": 3}', exact=True, isa="amx_bf16"),
}
_PLAIN = Form("", ())


class Gated(nn.Module):
    """What stands between the projections of a gated MLP."""

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up


class Softmax(nn.Module):
    """Over the last axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)


class Attention(nn.Module):
    """Causal for a prompt; one row sees all keys."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)


@dataclass(frozen=True)
class Case:
    """One op at one number of rows in one dtype."""

    set: str
    name: str
    op: str
    dtype: str
    rows: int
    sizes: tuple[tuple[str, int], ...]
    form_name: str = ""

    @property
    def form(self) -> Form:
        return FORMS.get(self.form_name, _PLAIN)

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes)
        form = f" {self.form_name}" if self.form_name else ""
        return f"{self.op} {self.name} ({sizes}) M={self.rows} {self.dtype}{form}"

    def module(self) -> nn.Module:
        """With weights of its own."""
        dtype = DTYPES[self.dtype]
        if self.op == "linear":
            linear = nn.Linear(self.size("k"), self.size("n"), bias=False, dtype=dtype)
            with torch.no_grad():
                linear.weight.normal_(0.0, 0.02)
                if self.form.exact:
                    linear.weight.copy_(linear.weight.bfloat16())
            return linear
        if self.op == "rms_norm":
            return nn.RMSNorm(self.size("k"), eps=1e-5, dtype=dtype)
        if self.op == "attention":
            return Attention(causal=self.rows > 1)
        return {"gated": Gated, "softmax": Softmax}[self.op]()

    def inputs(self) -> list[torch.Tensor]:
        """Fresh random ones."""
        dtype = DTYPES[self.dtype]
        if self.op == "attention":
            head = self.size("head")
            shapes = [
                (1, self.size("heads"), self.rows, head),
                (1, self.size("kv_heads"), self.size("keys"), head),
                (1, self.size("kv_heads"), self.size("keys"), head),
            ]
            return [torch.randn(shape).to(dtype) for shape in shapes]
        count = 2 if self.op == "gated" else 1
        return [torch.randn(self.rows, self.size("k")).to(dtype) for _ in range(count)]

    @property
    def cold_bytes(self) -> float:
        """What comes from memory: weights, or keys and values. 0 where nothing is rotated."""
        size = DTYPES[self.dtype].itemsize
        if self.op == "linear":
            return float(size * self.size("k") * self.size("n"))
        if self.op == "attention":
            return 2.0 * size * self.size("kv_heads") * self.size("keys") * self.size("head")
        return 0.0

    @property
    def bytes(self) -> float:
        """All operands once."""
        size = DTYPES[self.dtype].itemsize
        if self.op == "linear":
            return self.cold_bytes + size * self.rows * (self.size("k") + self.size("n"))
        if self.op == "attention":
            return self.cold_bytes + 2.0 * size * self.size("heads") * self.rows * self.size("head")
        return size * self.rows * self.size("k") * (3.0 if self.op == "gated" else 2.0)

    @property
    def flops(self) -> float:
        """Of the linear algebra; 0 for ops that memory limits."""
        if self.op == "linear":
            return 2.0 * self.rows * self.size("k") * self.size("n")
        if self.op == "attention":
            keys = self.size("keys")
            seen = keys * (keys + 1) / 2 if self.rows > 1 else keys
            return 4.0 * self.size("heads") * self.size("head") * seen
        return 0.0


def read_cases(
    wanted: str = "all",
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    rows: tuple[int, ...] = (),
    isa: str = "",
) -> list[Case]:
    """Of one set, or all, on a machine with these extensions ("avx2+fma+...", "" for none).
    Attention has the prompt's rows and one row."""
    entries: list[dict[str, Any]] = json.loads(TABLE.read_text())
    sets = sorted({entry["set"] for entry in entries})
    if wanted not in (*sets, "all"):
        raise ValueError(f"no set '{wanted}'; there are {', '.join(sets)}")
    cases = []
    for entry in entries:
        if wanted not in (entry["set"], "all"):
            continue
        sizes = {k: v for k, v in entry.items() if isinstance(v, int)}
        for dtype in dtypes:
            of_op = (1, sizes["keys"]) if entry["op"] == "attention" else rows or ROWS
            for m in of_op:
                names = _forms(dtype, m, isa) if entry["op"] == "linear" else [""]
                cases += [
                    Case(entry["set"], entry["name"], entry["op"], dtype, m,
                         tuple(sizes.items()), name)
                    for name in names
                ]  # fmt: skip
    return cases


def _forms(dtype: str, rows: int, isa: str) -> list[str]:
    found = [
        name
        for name, form in FORMS.items()
        if form.dtype == dtype and rows in form.rows and (not form.isa or form.isa in isa)
    ]
    return found if "12 bits" in found else ["", *found]
