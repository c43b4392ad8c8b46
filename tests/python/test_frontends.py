"""torch.export programs and TorchScript come to torch.compile's graphs, and run in our code."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("tilewright._core")

import tilewright
from tilewright.backend import backend, graphs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)) * 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.first, self.second, self.mlp = nn.LayerNorm(32), nn.LayerNorm(32), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 8, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = self.first(x + self.out(y.transpose(1, 2).reshape(2, 8, 32)))
        return self.second(x + self.mlp(x))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(32, 32, False), nn.Linear(32, 32, False)
        self.k, self.v = nn.Linear(32, 16, False), nn.Linear(32, 16, False)
        self.gate, self.up = nn.Linear(32, 64, False), nn.Linear(32, 64, False)
        self.down = nn.Linear(64, 32, False)
        self.first, self.second = nn.RMSNorm(32, 1e-6), nn.RMSNorm(32, 1e-6)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos + half * sin

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        q = self.turn(self.q(h).view(2, 8, 4, 8).transpose(1, 2), cos, sin)
        k = self.turn(self.k(h).view(2, 8, 2, 8).transpose(1, 2), cos, sin)
        v = self.v(h).view(2, 8, 2, 8).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(2, 8, 32))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 32), nn.RMSNorm(32, 1e-6)
        self.layers = nn.ModuleList([DecoderLayer(), DecoderLayer()])
        self.head = nn.Linear(32, 50, False)
        angles = torch.outer(torch.arange(8.0), 10000 ** (-torch.arange(4) / 4)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (Mlp, (3, 32)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 8, 8)),
    "encoder": (Encoder, (2, 8, 32)),
    "decoder": (Decoder, (2, 8)),
}


def example(name: str) -> torch.Tensor:
    shape = CASES[name][1]
    return torch.randint(50, shape) if name == "decoder" else torch.randn(shape)


def normalised(text: str) -> str:
    """Values renamed by first use; constants at the end, without their names."""
    constant = re.compile(r'^ *(%[\w.]+) = const "[^"]*" : (.*)\n', re.MULTILINE)
    types = dict(constant.findall(text))
    names: dict[str, str] = {}
    body = re.sub(
        r"%[\w.]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), constant.sub("", text)
    )
    return body + "\n".join(sorted(f"{names[name]} : {type_}" for name, type_ in types.items()))


def text_of(optimized: Any) -> str:
    (graph,) = optimized.graphs
    assert graph.executable is not None, graph.reason
    assert graph.fallback_calls == 0
    return normalised(graph.executable.lowered.text)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_three_front_ends_one_graph(name: str, tmp_path: Path) -> None:
    model, x = CASES[name][0]().eval(), example(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # a freeze would merge norms that are all ones
    expected = model(x)
    torch._dynamo.reset()
    before = set(graphs)
    torch.testing.assert_close(
        torch.compile(model, backend=backend, dynamic=False)(x), expected, rtol=2e-4, atol=2e-5
    )
    (compiled,) = set(graphs) - before
    assert compiled.executable is not None
    wanted = normalised(compiled.executable.lowered.text)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
        torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
        programs: dict[str, Any] = {
            "export": torch.export.load(tmp_path / "m.pt2"),
            "trace": torch.jit.load(tmp_path / "traced.pt"),
            "script": torch.jit.load(tmp_path / "scripted.pt"),
        }
        programs["frozen"] = torch.jit.freeze(programs["trace"].eval())
    for kind, program in programs.items():
        optimized = tilewright.optimize(program)
        torch.testing.assert_close(optimized(x), expected, rtol=2e-4, atol=2e-5)
        assert text_of(optimized) == wanted, kind
        if name == "decoder":
            assert tilewright.explain(optimized).own_flops_share >= 0.95


@torch.no_grad()
def test_export_with_a_symbolic_batch() -> None:
    model = Mlp().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 32),), dynamic_shapes=({0: batch},))
    optimized = tilewright.optimize(program)
    for rows in (4, 2, 64, 9):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(optimized(x), model(x), rtol=2e-4, atol=2e-5)
    assert len(optimized.graphs) == 1 and optimized.graphs[0].calls == 4
    with pytest.raises((RuntimeError, AssertionError), match="64"):
        optimized(torch.randn(65, 32))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x + 1
        return x - 1


@pytest.mark.parametrize("kind", ["export", "script"])
@torch.no_grad()
def test_buffers_that_are_written_stay_with_torch(kind: str) -> None:
    x = torch.zeros(2)
    module = Counting()
    program: Any = torch.export.export(module, (x,)) if kind == "export" else None
    optimized = tilewright.optimize(program or torch.jit.script(module))
    assert [optimized(x)[0].item() for _ in range(3)] == [1, 2, 3]
    assert any("count" in reason for reason in tilewright.explain(optimized).fallbacks)


@torch.no_grad()
def test_control_flow_on_data_stays_with_torch() -> None:
    optimized = tilewright.optimize(torch.jit.script(Branching()))
    assert optimized(torch.ones(2)).tolist() == [2, 2]
    assert optimized(-torch.ones(2)).tolist() == [-2, -2]
    assert any("data" in reason for reason in tilewright.explain(optimized).fallbacks)


@torch.no_grad()
def test_a_written_weight_is_honoured() -> None:
    model, x = Mlp().eval(), torch.randn(3, 32)
    scripted = torch.jit.script(model)
    optimized = tilewright.optimize(scripted)
    optimized(x)
    model.up.weight.mul_(2)
    torch.testing.assert_close(optimized(x), model(x), rtol=2e-4, atol=2e-5)


class Moded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.training else x - 1


@torch.no_grad()
def test_a_changed_attribute_is_honoured() -> None:
    optimized = tilewright.optimize(torch.jit.script(Moded()))
    assert optimized(torch.ones(2)).tolist() == [2, 2]
    optimized.eval()
    assert optimized(torch.ones(2)).tolist() == [0, 0]


def test_other_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="ScriptModule"):
        tilewright.optimize(Mlp())
