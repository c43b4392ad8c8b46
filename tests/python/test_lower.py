"""Lowering: every entry of the ATen table against eager, with fixed and with symbolic sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graph_evaluator import parse
from lowered_function import LoweredFunction, check
from tilewright import aten, dims
from tilewright.dims import Dim, NotPolynomialError
from tilewright.graph_text import DTYPES, UnsupportedError

torch.manual_seed(0)
X = torch.randn(2, 6, 8)
Y = torch.randn(2, 6, 8)
P = torch.rand(2, 6, 8) + 0.5
W = torch.randn(12, 8)
B = torch.randn(12)
I64 = torch.randint(0, 12, (2, 6))
N = torch.randint(-9, 9, (3, 5))
MASK = torch.rand(2, 6, 8) > 0.5
BF = X.bfloat16()
Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 2, 7, 8)

# name, function, inputs. Each runs with fixed and with symbolic sizes.
CASES = {
    "unary": (
        lambda x: (x.neg(), x.abs(), x.exp(), x.sin(), x.cos(), x.tanh(), x.erf(), x.sigmoid()),
        (X,),
    ),
    "positive": (lambda x: (x.sqrt(), x.rsqrt(), x.reciprocal()), (P,)),
    "activations": (
        lambda x: (F.silu(x), F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh")),
        (X,),
    ),
    "arithmetic": (lambda x, y: (x + y, x - y, x * y, torch.maximum(x, y)), (X, Y)),
    "minimum_div": (lambda x, y: (torch.minimum(x, y), x / y), (X, P)),
    "scalars": (lambda x: (x + 1, 2 - x, x * 0.5, x / 3, 1 / (x + 9)), (X,)),
    "alpha": (lambda x, y: (torch.add(x, y, alpha=2), torch.sub(x, y, alpha=0.5)), (X, Y)),
    "integers": (lambda i: (i + 1, i * 2, i - 3, i / 2, i.float() * 0.5, i * 1.5), (I64,)),
    "mixed": (lambda x, i: (x[:, :, 0] + i, i * x[:, :, 1]), (X, I64)),
    "bf16_scalar": (lambda x: (x + 1e-3, x * 0.1, x + x.float()), (BF,)),
    "zero_dim": (lambda x, y: (x * y[0, 0, 0], x.bfloat16() + y[0, 0, 0]), (X, Y)),
    "pow": (lambda x: (x.pow(2), x.pow(3), x.square(), x.pow(0.5), x.pow(-0.5)), (P,)),
    "clamp": (lambda x: (x.clamp(-1, 1), x.clamp(min=0.1), x.clamp(max=0.2)), (X,)),
    "clamp_one": (lambda x: (torch.clamp_min(x, 0.1), torch.clamp_max(x, 0.1)), (X,)),
    "compare": (lambda x, y: (x < y, x <= 0, x > y, x >= 0.5, x == y, x != 1), (X, Y)),
    "compare_integers": (lambda i: (i < 3, i == 2, i.ne(4)), (I64,)),
    "logic": (lambda m, x: (m & (x > 0), m | (x > 0), ~m, torch.logical_not(m)), (MASK, X)),
    "where": (lambda m, x, y: (torch.where(m, x, y), torch.where(m, x, 0.0)), (MASK, X, Y)),
    "masked_fill": (lambda m, x: x.masked_fill(m, -1e9), (MASK, X)),
    "masked_fill_infinity": (lambda m, x: x.masked_fill(m, float("-inf")), (MASK, X)),
    "convert": (lambda x: (x.to(torch.float64), x.bfloat16(), x.half().float(), x.long()), (X,)),
    "type_as": (lambda x, y: (x.bfloat16() * 2).type_as(y) + y, (X, Y)),
    "reductions": (lambda x: (x.mean(-1), x.mean(-1, keepdim=True), x.sum(-1), x.amax(-1)), (X,)),
    "mean_dtype": (lambda x: x.mean(-1, keepdim=True, dtype=torch.float32), (BF,)),
    "softmax": (lambda x: (x.softmax(-1), F.softmax(x, 1), F.softmax(x, -1, torch.float64)), (X,)),
    "rms_norm": (lambda x, w: (F.rms_norm(x, (8,), w[0], 1e-6), F.rms_norm(x, (8,))), (X, W)),
    "layer_norm": (
        lambda x, w: (F.layer_norm(x, (8,), w[0], w[1]), F.layer_norm(x, (8,), eps=1e-3)),
        (X, W),
    ),
    "linear": (lambda x, w, b: (F.linear(x, w), F.linear(x, w, b)), (X, W, B)),
    "matmul": (lambda x, y: (x @ y.transpose(-1, -2), torch.bmm(x, y.mT)), (X, Y)),
    "mm": (lambda x, w: (torch.mm(x[0], w.t()), x @ w.T), (X, W)),
    "literal": (
        lambda x: x * torch.pow(torch.full((8,), 0.5), torch.arange(8, dtype=torch.int32)),
        (X,),
    ),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 8), w.t()), (X, W, B)),
    "reshape": (lambda x: (x.view(2, 6, 2, 4), x.reshape(-1, 8), x.flatten(1), x.flatten()), (X,)),
    "unflatten": (
        lambda x: (x.unflatten(-1, (2, 4)), x.unsqueeze(1), x[:, :, :1].squeeze(-1)),
        (X,),
    ),
    "permute": (lambda x: (x.permute(2, 0, 1) + 0, x.transpose(1, 2) + 0, x.mT + 0), (X,)),
    "movedim": (lambda x: (x.movedim(0, 2) + 0, x.movedim((0, 1), (1, 0)) * 1), (X,)),
    "strided_outputs": (lambda x: (x * 2).transpose(1, 2), (X,)),
    "expand": (lambda x: x[:, :1].expand(2, 6, 8) * 1 + x[:, None, 0].expand(2, 6, 8), (X,)),
    "slice": (lambda x: (x[:, 1:] * 1, x[:, -2:] * 1, x[..., :-3] + 0, x[:, 1:3] * 1), (X,)),
    "select": (lambda x: (x[:, 0] * 1, x[:, -1] + 0, x[..., 3] * 1), (X,)),
    "split": (
        lambda x: [p * 1 for p in (*x.split(4, -1), *x.chunk(2, -1), *x.split([3, 5], 2))],
        (X,),
    ),
    "unbind": (lambda x: [p * 1 for p in x.unbind(0)], (X,)),
    "narrow": (lambda x: x.narrow(2, 1, 4) * 1, (X,)),
    "cat": (lambda x, y: (torch.cat([x, y], 1), torch.cat([x, y, x], -1)), (X, Y)),
    "cat_empty": (lambda x: torch.cat([torch.tensor([]), x], -2), (X,)),
    "stack": (lambda x, y: (torch.stack([x, y]), torch.stack([x, y], -1)), (X, Y)),
    "repeat": (lambda x: (x.repeat(1, 2, 1), x.repeat(2, 1, 1, 1)), (X,)),
    "index": (lambda w, i: (w[i], w[:, [-2]]), (W, I64)),
    # How transformers reads a padding mask.
    "index_everything": (
        lambda i: (
            i[
                torch.arange(i.shape[0])[:, None, None, None],
                (torch.arange(i.shape[1]) + 0)[None, None, None, :],
            ]
            + 1
        ),
        (I64.clone(),),
    ),
    "gather": (
        lambda w, i: w[None].repeat(2, 1, 1).gather(1, i[:, :, None].repeat(1, 1, w.shape[1])),
        (W, I64),
    ),
    # ... under a sliding window, whose keys begin somewhere.
    "index_later": (
        lambda i: (
            i[
                torch.arange(i.shape[0])[:, None, None, None],
                (torch.arange(3) + (i.shape[1] - 3))[None, None, None, :],
            ]
            + 1
        ),
        (I64.clone(),),
    ),
    "gather_last": (
        lambda x: x.gather(-1, x.abs().topk(3).indices),
        (X,),
    ),
    "scatter": (
        lambda x: (
            x.scatter(-1, x.topk(3).indices, 2.5)
            + torch.zeros_like(x).scatter_(-1, x.topk(1).indices, 1)
        ),
        (X,),
    ),
    "logarithms": (lambda x, p: (p.log(), p.log1p(), x.expm1()), (X, P)),
    "softplus, elu": (
        lambda x: (
            torch.nn.functional.softplus(x),
            torch.nn.functional.softplus(x, 2.0, 1.5),
            torch.nn.functional.elu(x, 0.7),
            torch.nn.functional.selu(x),
            torch.nn.functional.leaky_relu(x, 0.2),
        ),
        (X,),
    ),
    "softplus in 16 bits": (torch.nn.functional.softplus, (BF,)),
    "topk": (lambda x: (*x.topk(3), x.softmax(-1).topk(1).indices), (X,)),
    "topk of NaN": (
        lambda x: x.log().topk(3).indices,
        (torch.tensor([[3.0, -1.0, 2.0, 1.0], [3.0, 1.0, 2.0, -1.0]]),),
    ),
    "largest integers": (lambda n: (n.max() + 1, n.topk(2).values, (n + 2**60).max()), (N,)),
    "cumsum": (lambda x: ((x > 0).cumsum(-1), (x > 0).long().cumsum(2)), (X,)),
    "repeat_interleave": (
        lambda x: (x.repeat_interleave(2, -1), x.repeat_interleave(3, 1), x.repeat_interleave(2)),
        (X,),
    ),
    "embedding": (lambda i, w: F.embedding(i, w), (I64, W)),
    "arange": (
        lambda x: (torch.arange(x.shape[1]) + 1, torch.arange(1, x.shape[1] + 1).float()),
        (X,),
    ),
    "fills": (
        lambda x: (torch.zeros(2, 3) + 1, torch.full((2,), 5.0), x.new_ones(3), torch.ones_like(x)),
        (X,),
    ),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3),
        (Q,),
    ),
    "attention_gqa": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, scale=0.5, enable_gqa=True),
        (Q, K),
    ),
    "attention_one_key_head": (
        lambda q, k: F.scaled_dot_product_attention(q, k[:, :1], k[:, 1:], scale=0.5),
        (Q, K),
    ),
    "attention_mask": (
        lambda q, k: F.scaled_dot_product_attention(
            q, k, k, attn_mask=(torch.arange(7) < 4)[None, :], scale=0.3, enable_gqa=True
        ),
        (Q, K),
    ),
    "attention_float_mask": (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m, scale=0.3),
        (Q, torch.randn(2, 1, 5, 5)),
    ),
    "dropout_and_copies": (
        lambda x: F.dropout(x, 0.5, False).clone().contiguous().detach() * 2,
        (X,),
    ),
    "sizes_as_numbers": (lambda x: x * x.shape[1] + x.shape[0], (X,)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_entry(name: str, dynamic: bool) -> None:
    function, inputs = CASES[name]
    loose = "bf16" in name or name in ("zero_dim", "mean_dtype", "convert", "type_as")
    lowered = check(function, *inputs, dynamic=dynamic, **({"rtol": 8e-3} if loose else {}))
    assert not lowered.externals, lowered.externals


def test_the_table_names_real_overloads() -> None:
    import transformers.integrations.moe  # noqa: F401 - registers one

    missing = []
    for name in aten.TABLE:
        namespace, packet, overload = name.split(".")
        operator = getattr(getattr(torch.ops, namespace), packet, None)
        if operator is None or overload not in operator.overloads():
            missing.append(name)
    assert not missing, missing


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_unknown_ops_become_external(dynamic: bool) -> None:
    lowered = check(lambda x: (x.cumprod(-1) + 1, *x.sort()), X, dynamic=dynamic)
    assert lowered.externals == ["aten.cumprod.default", "aten.sort.default"]
    (graph,) = lowered.graphs
    assert dict(graph.externals)["aten.cumprod.default"] == "no lowering for aten.cumprod.default"


def test_values_outside_an_entry_become_external() -> None:
    lowered = check(lambda x: (x.pow(1.5), x.sum((0, 1))), P)
    assert dict(lowered.graphs[0].externals) == {
        "aten.pow.Tensor_Scalar": "pow with exponent 1.5",
        "aten.sum.dim_IntList": "sum over other axes than the last",
    }


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "symbolic"])
def test_convolutions_of_patches(dynamic: bool) -> None:
    w, b = torch.nn.Parameter(torch.randn(5, 3, 2, 3)), torch.nn.Parameter(torch.randn(5))

    def function(x):
        return (
            F.conv2d(x, w, stride=(2, 3)),  # the last column is not read
            F.conv2d(x, w, b, stride=(2, 3)),
            F.conv1d(x[:, :, 0], w[:, :, :1, 0], b),
            F.conv3d(x[..., None], w[..., None], b, stride=(2, 3, 1)),
        )

    assert not check(function, torch.randn(2, 3, 6, 7), dynamic=dynamic).externals
    others = lambda x: (F.conv2d(x, w), F.conv2d(x, w, stride=(2, 3), padding=1))  # noqa: E731
    assert len(check(others, torch.randn(2, 3, 6, 7)).externals) == 2


def test_what_may_change_is_not_a_literal() -> None:
    def written(x):
        ones = torch.ones(8)
        ones.add_(x[0, 0])
        return x * ones.cumprod(-1)

    of_sizes = lambda x: x * torch.arange(x.shape[-1]).lgamma()  # noqa: E731
    for function in (written, of_sizes, torch.lgamma):
        lowered = check(function, P, dynamic=True)
        assert len(lowered.externals) == 1, lowered.externals


def test_random_numbers_are_not_literals() -> None:
    lowered = LoweredFunction(lambda x: x + torch.randperm(8))
    assert not torch.equal(lowered.compiled(X), lowered.compiled(X))
    assert lowered.externals


def test_an_index_that_is_not_everything_in_order_is_external() -> None:
    rows, columns = torch.arange(W.shape[0]), torch.arange(W.shape[1])
    for first, second in (
        (rows[None, :], columns[:, None]),  # transposed
        (rows[:, None], columns[None, 1:]),
        (rows[:, None], (columns - 1)[None, :]),
    ):
        function = lambda w, a=first, b=second: w[a, b] * 1  # noqa: E731
        assert check(function, W).externals == ["aten.index.Tensor"]


def test_external_arguments_with_symbols() -> None:
    lowered = check(lambda x: torch.nn.functional.pad(x, (0, x.shape[1])), X, dynamic=True)
    assert lowered.externals and "dim" in lowered.graphs[0].text


def test_outputs_alias_inputs() -> None:
    lowered = LoweredFunction(lambda x: (x, x.view(-1), x[:, 1:], x * 2))
    x = X.clone()
    same, flat, part, doubled = lowered.compiled(x)
    assert same is x
    assert flat.data_ptr() == x.data_ptr()
    part.zero_()
    assert x[:, 1:].abs().sum() == 0 and doubled.abs().sum() > 0


def test_outputs_share_memory_with_each_other() -> None:
    def function(x):
        y = x * 2
        return y, y.view(-1), y[1]

    check(function, X)
    whole, flat, row = LoweredFunction(function).compiled(X)
    flat.zero_()
    assert whole.abs().sum() == 0 and row.abs().sum() == 0


def test_the_same_output_twice() -> None:
    one, other = LoweredFunction(lambda x: ((y := x + 1), y)).compiled(X)
    assert one is other
    a, b = LoweredFunction(lambda x: ((y := x + 1), y.clone())).compiled(X)
    assert a.data_ptr() != b.data_ptr()


def test_writes_to_inputs_happen_in_order() -> None:
    def function(cache, position, row):
        before = cache.sum(-1)
        cache.index_copy_(1, position, row)
        after = cache * 2
        position.add_(1)
        cache.index_copy_(1, position, row + 1)
        return before, after, cache

    cache, position = torch.zeros(2, 6, 8), torch.tensor([1])
    lowered = check(function, cache, position, torch.ones(2, 1, 8))
    (graph,) = lowered.graphs
    assert graph.mutated == {0, 1}
    assert lowered.ops().count("index_copy") == 2
    assert [name for name, _ in graph.externals] == ["aten.add_.Tensor"]


def test_writes_to_intermediate_values_stay_inside() -> None:
    def function(x):
        y = x * 2
        y.add_(1)
        z = y.clone()
        z.index_copy_(1, torch.tensor([0]), x[:, 1:2])
        return y, z, x + 0

    lowered = check(function, X)
    assert not lowered.graphs[0].mutated and not lowered.externals


def test_sizes_that_are_not_polynomials() -> None:
    def function(x):
        return x[..., ::2] * 1, x[..., 1::2] * 1, F.scaled_dot_product_attention(x, x, x)

    check(function, X[None])
    check(function, X[None], dynamic=True)


def test_sizes_that_a_call_derives() -> None:
    """A sliding window: from some length on the last rows only."""

    def window(x, first):
        kept = torch.cat([x[:, -5:], first], 1)
        rows = x.shape[1]
        return kept * 2, x[:, max(rows - 3, 0) :] + 1, x[:, : rows // 2] - 1, x[:, 7:] + 2

    lowered = LoweredFunction(window, dynamic=True)
    for rows in (6, 4, 3, 11, 5, 8):
        x, first = torch.randn(2, rows, 4), torch.randn(2, 2, 4)
        for actual, expected in zip(lowered.compiled(x, first), window(x, first), strict=True):
            torch.testing.assert_close(actual, expected)
    assert any(graph.derived for graph in lowered.graphs)
    assert not lowered.externals


@pytest.mark.parametrize("bounds", [(-5, -2), (-5, 3), (2, 4), (-3, None), (9, None), (1, -1)])
def test_slices_of_symbolic_axes(bounds: tuple[int, int | None]) -> None:
    def function(x):
        return x[:, slice(*bounds)] * 2

    lowered = LoweredFunction(function)
    for rows in (12, 7, 6, 4, 3, 2):
        torch._dynamo.reset()
        x = torch.randn(2, rows, 4)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        torch.testing.assert_close(lowered.compiled(x), function(x))


def test_a_mask_that_is_read_up_to_a_length_is_a_slice() -> None:
    """As transformers reads a padding mask while a cache grows; beyond its end is an error."""

    def function(mask, keys):
        rows = torch.arange(mask.shape[0])[:, None]
        return mask[rows, torch.arange(keys.shape[1])] * 2

    lowered = LoweredFunction(function)
    mask = torch.randn(2, 9)
    for length in (7, 4, 9):
        keys = torch.empty(1, length)
        torch._dynamo.mark_dynamic(keys, 1)
        torch.testing.assert_close(lowered.compiled(mask, keys), function(mask, keys))
    assert not lowered.externals
    with pytest.raises(Exception, match="index up to"):
        lowered.compiled(mask, torch.empty(1, 10))


def test_a_view_read_after_a_write_is_refused() -> None:
    def function(x, row):
        view = x[0]
        x.index_copy_(1, torch.tensor([0]), row)
        return view * 2

    with pytest.raises(Exception, match="is read after"):
        LoweredFunction(function).compiled(X.clone(), torch.ones(2, 1, 8))


def test_autocast_is_refused() -> None:
    def function(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ w.t()

    with pytest.raises(Exception, match="autocast"):
        LoweredFunction(function).compiled(X, W)


def test_a_value_that_decides_a_size_is_refused() -> None:
    def function(x):
        return x.nonzero()

    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(Exception, match=r"(?s)unbacked|size|captured|Unsupported"),
    ):
        LoweredFunction(function).compiled(X)


def test_unused_inputs_are_not_parameters() -> None:
    lowered = check(lambda x, y: x + y.shape[0], X, Y)
    assert lowered.graphs[0].inputs == [0]


def test_symbols_that_only_integers_carry() -> None:
    lowered = LoweredFunction(lambda x, n: x * n + n, dynamic=True)
    for n in (3, 5, 9):
        torch.testing.assert_close(lowered.compiled(X, n), X * n + n)
    assert lowered.graphs[-1].shape_inputs


def test_dims_are_canonical() -> None:
    b, s = Dim.symbol("b"), Dim.symbol("s")
    assert str(s + b * s * 2 + 1) == "2*b*s + s + 1"
    assert s * b == b * s and (s - s).constant == 0
    assert str(Dim.of(0) - s) == "-s" and str(s - 3) == "s - 3"
    assert (b * s + 4).evaluate({"b": 3, "s": 5}) == 19
    import sympy

    n = sympy.Symbol("n", integer=True)
    assert str(Dim.of((n + 1) * (n - 1))) == "n*n - 1"
    with pytest.raises(NotPolynomialError):
        Dim.of(n // 2)  # sympy's floor of a rational, which no traced size has
    m = sympy.Symbol("m", integer=True)
    size = Dim.of(2 * sympy.Max(0, n - 15) + m)
    (name,) = size.symbols() - {"m"}
    assert name.isidentifier() and size - m == Dim.symbol(name) * 2
    assert Dim.of(sympy.Max(n - 15, 0)) == Dim.symbol(name), "equal expressions, one symbol"
    assert dims.roots({name, "m"}) == {"n", "m"}
    assert [dims.derived[name].compute(value) for value in (3, 20)] == [0, 5]


def test_types_that_the_graph_has_no_word_for() -> None:
    assert set(DTYPES) == {"f32", "bf16", "f16", "f64", "i64", "i32", "i16", "i8", "u8", "bool"}
    with pytest.raises(Exception, match=r"complex|type"):
        LoweredFunction(lambda x: torch.view_as_complex(x.view(2, 6, 4, 2)) * 2).compiled(X)
    assert issubclass(UnsupportedError, Exception)


def test_text_parses_and_names_are_unique() -> None:
    lowered = check(lambda x, w: F.silu(F.linear(x, w)) + F.linear(x, w), X, W)
    graph = parse(lowered.graphs[0].text)
    names = [name for line in graph.lines for name in line.results]
    assert len(set(names)) == len(names)
