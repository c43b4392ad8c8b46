"""The torch.compile backend: results, aliasing, symbols, weights, fallbacks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_models import prompt, tiny_llama

pytest.importorskip("tilewright._core")

import tilewright
from tilewright import backend as backends
from tilewright.backend import backend


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    for graph in list(backends.graphs):  # of other tests' models
        backends.graphs.discard(graph)
    yield
    torch._dynamo.reset()


def graphs() -> list[Any]:
    return sorted(backends.graphs, key=lambda graph: graph.calls)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


@torch.no_grad()
def test_a_module_runs_in_our_program() -> None:
    model, x = Block().eval(), torch.randn(2, 7, 64)
    compiled = torch.compile(model, backend=backend)
    close(compiled(x), model(x))
    (graph,) = graphs()
    assert graph.executable is not None and graph.calls == 1 and graph.fallback_calls == 0
    report = graph.executable.program.report()
    assert report["prefill"]["runs"] == 1 and report["prefill"]["fallback_calls"] == 0
    assert report["prefill"]["own_flops"] > 0


@torch.no_grad()
def test_rotary_embedding_of_tokens_first() -> None:
    """Gemma 4 turns [b, tokens, heads, d], before heads come first."""

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return (x * cos[:, :, None] + turned * sin[:, :, None]).transpose(1, 2)

    inputs = (torch.randn(2, 5, 4, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16))
    compiled = torch.compile(rotate, backend=backend)
    close(compiled(*inputs), rotate(*inputs))
    (graph,) = graphs()
    assert graph.executable is not None
    regions = graph.executable.program.report()["regions"]
    assert [r["name"] for r in regions if "rope" in r["name"]], regions
    assert not any(r["fallback"] for r in regions), regions


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_grouped_products_of_experts(dynamic: bool) -> None:
    """transformers' own, over rows sorted by expert. The second expert has no row, and the last row
    no expert."""
    import transformers.integrations.moe  # noqa: F401 - registers the operator

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.Parameter(torch.randn(3, 64, 8))
            self.transposed = nn.Parameter(torch.randn(3, 8, 64))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> Any:
            grouped = torch.ops.transformers.grouped_mm_fallback
            return grouped(x, self.transposed, ends), grouped(x, self.stored.mT, ends)

    model = Experts()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for rows in (6, 9):
        x, ends = torch.randn(rows, 8), torch.tensor([2, 2, rows - 1], dtype=torch.int32)
        for ours, theirs in zip(compiled(x, ends), model(x, ends), strict=True):
            close(ours, theirs)
    assert all(g.executable is not None and not g.executable.lowered.externals for g in graphs())
    assert tilewright.explain(compiled).own_flops_share == 1.0


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [(40, 4096, 64), (4, 4096, 128), (1, 4096, 64), (40, 130, 256)],
)
def test_long_attention_is_as_exact_as_eager(queries: int, keys: int, head_dim: int) -> None:
    """Small scores: then all keys count alike, and the sum is long."""

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, scale=0.01)

    q, k = torch.randn(1, 4, queries, head_dim), torch.randn(1, 4, keys, head_dim)
    exact = attend(q.double(), k.double())
    ours = torch.compile(attend, backend=backend)(q, k)
    errors = [(result.double() - exact).square().mean() for result in (ours, attend(q, k))]
    assert errors[0] <= 1.25**2 * errors[1], errors


def test_patches_are_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), nn.GELU(), nn.Linear(16, 5)).eval()
    compiled = torch.compile(model, backend="tilewright")
    x = torch.randn(2, 3, 16, 16)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight.mul_(scale)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    explanation = tilewright.explain(compiled)
    assert explanation.own_flops_share == 1.0, str(explanation)
    assert explanation.phases["prefill"]["fallback_calls"] == 0, str(explanation)


def test_symbolic_sizes_are_bound_at_each_call() -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, tokens in ((2, 7), (3, 5), (4, 33), (2, 100)):
        x = torch.randn(batch, tokens, 64)
        close(compiled(x), model(x))
    assert len(graphs()) == 1


@torch.no_grad()
def test_weights_are_packed_once_for_all_graphs_of_a_model() -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    compiled(torch.randn(1, 4, 64))
    (first,) = graphs()
    packed = first.executable.store.bytes
    compiled(torch.randn(1, 5, 64))
    assert len(graphs()) == 2
    assert {graph.executable.store for graph in graphs()} == {first.executable.store}
    assert first.executable.store.bytes == packed > 0


@torch.no_grad()
def test_models_of_one_class_keep_a_program_each() -> None:
    """Dynamo hands all of them to one graph."""
    models = [Block().eval() for _ in range(3)]
    compiled = [torch.compile(model, backend=backend, dynamic=False) for model in models]
    x = torch.randn(1, 4, 64)
    for turn in range(3):
        for model, fast in zip(models, compiled, strict=True):
            close(fast(x), model(x))
        if turn == 1:  # a change of one is nobody else's, counted by torch or not
            models[1].up.weight.mul_(2)
            models[2].up.weight.data.mul_(2)
    graph = next(graph for graph in graphs() if graph.calls == 9)
    assert graph.refreshes == 2 and graph.fallback_calls == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.up.weight.mul_(2),
        lambda model: setattr(model.up.weight, "data", model.up.weight.data * 2),
        lambda model: model.up.weight.data.mul_(2),
        lambda model: setattr(model.up, "weight", nn.Parameter(model.up.weight * 2)),
        lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
        lambda model: model.load_state_dict(
            {k: v * 2 for k, v in model.state_dict().items()}, assign=True
        ),
    ],
    ids=["in place", "data replaced", "data in place", "parameter replaced", "loaded", "assigned"],
)
def test_changed_weights_are_noticed(change: Any) -> None:
    model, x = Block().eval(), torch.randn(2, 7, 64)
    compiled = torch.compile(model, backend=backend)
    close(compiled(x), model(x))
    before = model(x)
    change(model)
    assert not torch.equal(model(x), before)
    close(compiled(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("in_between", ["another graph", "a reset"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.up.weight.mul_(2),
        lambda model: model.up.weight[:, ::2].mul_(2),
        lambda model: model.up.weight.data.mul_(2),
    ],
    ids=["in place", "part", "data in place"],
)
def test_a_later_graph_does_not_find_what_was_packed_before_a_change(
    change: Any, in_between: str
) -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    x = torch.randn(1, 4, 64)
    compiled(x)
    change(model)
    if in_between == "a reset":
        torch._dynamo.reset()
        gc.collect()
    else:
        x = torch.randn(1, 5, 64)
    close(compiled(x), model(x))
    close(compiled(x[:, :4]), model(x[:, :4]))
    stores = {graph.executable.store for graph in graphs() if graph.executable is not None}
    packed = sum(store.bytes for store in stores)
    assert packed <= 2 * 4 * 2 * 64 * 96, "one copy of what is current, and a program's own old one"


@torch.no_grad()
def test_a_compiled_graph_does_not_keep_a_model_alive() -> None:
    model = Block().eval()
    torch.compile(model, backend=backend)(torch.randn(2, 7, 64))
    weight = weakref.ref(model.up.weight)
    del model
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_outputs_alias_inputs_as_traced() -> None:
    compiled = torch.compile(lambda x: (x, x[:, 1:], x * 2, (x + 1).mT), backend=backend)
    x = torch.randn(3, 4)
    same, part, doubled, turned = compiled(x)
    assert same is x and part.data_ptr() == x[:, 1:].data_ptr() and part.stride() == (4, 1)
    assert turned.stride() == (x + 1).mT.stride()
    close(doubled, x * 2)
    part.zero_()
    assert x[:, 1:].abs().sum() == 0


@torch.no_grad()
def test_writes_to_inputs() -> None:
    def step(cache: torch.Tensor, position: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, row)
        position.add_(1)
        return cache.sum(-1)

    compiled = torch.compile(step, backend=backend)
    ours = [torch.zeros(2, 6, 8), torch.tensor([2])]
    theirs = [tensor.clone() for tensor in ours]
    for _ in range(3):
        row = torch.randn(2, 1, 8)
        close(compiled(*ours, row), step(*theirs, row))
    close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_activations_run_in_our_kernel(dtype: torch.dtype) -> None:
    """Batched, broadcast, transposed and strided; attention that no pattern knows."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2))  # heads of q broadcast over one of k
        weights = scores.abs().sqrt() * 0.1
        return torch.matmul(weights.to(v.dtype), v[..., 1:]) @ v[0, 0, :9, :5]

    compiled = torch.compile(function, backend=backend, dynamic=True)
    for tokens, keys in ((7, 20), (1, 33)):
        q = torch.randn(2, 3, tokens, 16, dtype=dtype)
        k, v = torch.randn(2, 1, keys, 16, dtype=dtype), torch.randn(2, 3, keys, 10, dtype=dtype)
        wanted = function(q.double(), k.double(), v.double())
        scale, unit = wanted.abs().max(), 1e-6 if dtype == torch.float32 else 2e-2
        assert (compiled(q, k, v).double() - wanted).abs().max() < unit * scale
    for graph in graphs():
        assert graph.executable is not None
        report = graph.executable.program.report()
        matmuls = [r for r in report["regions"] if r["name"].startswith("matmul")]
        assert len(matmuls) == 3 and not any(region["reason"] for region in matmuls)


def test_unknown_ops_run_in_torch_and_are_counted() -> None:
    compiled = torch.compile(lambda x: (x * 3).cumsum(-1) * 2, backend=backend)
    x = torch.randn(3, 64)
    close(compiled(x), (x * 3).cumsum(-1) * 2)
    (graph,) = graphs()
    report = graph.executable.program.report()
    assert report["prefill"]["fallback_calls"] == 1
    assert "there is no kernel for aten.cumsum.default" in [r["reason"] for r in report["regions"]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models(dtype: torch.dtype) -> None:
    model, x = Block().to(dtype).eval(), torch.randn(2, 7, 64).to(dtype)
    actual = torch.compile(model, backend=backend)(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, model(x), rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_a_language_model_with_each_cache(cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    model = tiny_llama(2)
    expected = model.generate(prompt(), max_new_tokens=6, do_sample=False)
    model.compile(backend=backend)
    arguments: dict[str, Any] = {"use_cache": cache != "none"}
    if cache == "dynamic":
        arguments["past_key_values"] = DynamicCache(config=model.config)
    if cache == "static":
        arguments["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
    actual = model.generate(prompt(), max_new_tokens=6, do_sample=False, **arguments)
    assert actual.tolist() == expected.tolist()
    assert graphs() and all(graph.executable is not None for graph in graphs())
    assert sum(graph.calls for graph in graphs()) == 6


@torch.no_grad()
def test_static_caches_are_not_frozen() -> None:
    """Two caches, one graph: the second one's keys must not be the first one's."""
    from transformers import StaticCache

    model = tiny_llama(2)
    expected = [
        model.generate(prompt(1, n), max_new_tokens=4, do_sample=False).tolist() for n in (9, 9)
    ]
    model.compile(backend=backend)
    for result in expected:
        cache = StaticCache(config=model.config, max_cache_len=32)
        tokens = model.generate(
            prompt(1, 9), max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        assert tokens.tolist() == result


@torch.no_grad()
def test_sizes_that_a_program_is_not_for_run_in_torch_even_if_it_writes() -> None:
    """Nothing has run then, so the fallback may; other sizes go on in our program."""

    def read(cache: torch.Tensor, mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        cache.add_(1)
        return mask[torch.arange(2)[:, None], torch.arange(keys.shape[1])] * 2

    compiled = torch.compile(read, backend=backend)
    cache, mask = torch.zeros(3), torch.randn(2, 9)
    for length in (7, 4, 10, 9):
        keys = torch.empty(1, length)
        torch._dynamo.mark_dynamic(keys, 1)
        if length == 10:
            with pytest.raises(IndexError):
                compiled(cache, mask, keys)
        else:
            close(compiled(cache, mask, keys), mask[:, :length] * 2)
    (graph,) = [graph for graph in graphs() if graph.calls == 4]
    assert graph.fallback_calls == 1 and graph.executable is not None
    assert "index up to" in graph.reason


def test_by_its_name() -> None:
    assert "tilewright" in torch._dynamo.list_backends()
    with torch.no_grad():
        compiled = torch.compile(lambda x: x * 2 + 1, backend="tilewright", mode="reduce-overhead")
        close(compiled(torch.ones(3)), torch.full((3,), 3.0))


@torch.no_grad()
def test_options_of_inductor_mean_nothing() -> None:
    compiled = torch.compile(
        lambda x: x * 2, backend=backend, options={"epilogue_fusion": True, "anything": 1}
    )
    close(compiled(torch.ones(3)), torch.full((3,), 2.0))
