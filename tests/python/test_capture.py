"""Capture: what Dynamo and whole models give us."""

from __future__ import annotations

import pytest
import torch

import graph_evaluator
from graph_evaluator import Cache, parse
from lowered_function import LoweredFunction
from tilewright import capture, model_capture, stamp, unify
from tilewright.dims import Dim
from tilewright.graph_text import UnsupportedError
from tilewright.lowered import CapturedModel
from tiny_models import build, llama_config, prompt, tiny_llama


def test_pre_dispatch_keeps_whole_ops() -> None:
    model = tiny_llama(1)
    lowered = LoweredFunction(lambda ids: model(ids, use_cache=False).logits)
    with torch.no_grad():
        expected = model(prompt(), use_cache=False).logits
        torch.testing.assert_close(lowered.compiled(prompt()), expected, rtol=1e-4, atol=1e-4)
    ops = lowered.ops()
    assert ops.count("linear") == 8 and ops.count("attention") == 1 and "silu" in ops


def test_outside_of_torch_compile() -> None:
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(UnsupportedError, match=r"outside of torch\.compile"):
        capture.from_dynamo(gm, [torch.ones(2)])


def run_steps(captured: CapturedModel, ids: torch.Tensor, steps: int) -> list[int]:
    """Greedy tokens through the graph evaluator."""
    caches = [Cache() for _ in captured.caches]
    positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    tokens: list[int] = []
    for _ in range(steps):
        (logits,) = graph_evaluator.evaluate(
            captured.lowered.text, captured.lowered.constants, [ids, positions], caches
        )
        ids = logits[:, -1].argmax(-1, keepdim=True)
        positions = positions[:, -1:] + 1
        tokens += ids.flatten().tolist()
    return tokens


@pytest.mark.parametrize("keep", [0, 1])
def test_a_whole_model_decodes_like_eager(keep: int) -> None:
    model = tiny_llama()
    captured = model_capture.capture_model(model, model.forward, keep)
    with torch.no_grad():
        expected = model.generate(prompt(), max_new_tokens=5, do_sample=False)[0, 9:].tolist()
        assert run_steps(captured, prompt(), 5) == expected
    assert captured.output_type.__name__ == "CausalLMOutputWithPast"
    assert [(c.layer, c.kv_heads, c.head_dim) for c in captured.caches] == [
        (i, 2, 16) for i in range(4)
    ]
    assert not captured.lowered.externals


def test_stamped_layers_equal_captured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(5)
    (group,) = stamp.find_groups(model)
    assert group.prefix == "model.layers" and len(group.layers) == 5
    stamped = model_capture.capture_model(model, model.forward, 1).lowered
    monkeypatch.setattr(stamp, "find_groups", lambda model: [])
    whole = model_capture.capture_model(model, model.forward, 1).lowered
    assert stamped.constants.keys() == whole.constants.keys()
    # Weights stand in another order; everything else must be the same, name by name.
    lines = [
        [
            (line.op, line.attributes, line.types)
            for line in parse(graph.text).lines
            if line.operands
        ]
        for graph in (stamped, whole)
    ]
    assert lines[0] == lines[1]
    weights = [
        [
            [name for name in line.operands if name.startswith("w.")]
            for line in parse(graph.text).lines
        ]
        for graph in (stamped, whole)
    ]
    assert [w for w in weights[0] if w] == [w for w in weights[1] if w]


def test_layers_that_differ_are_all_captured() -> None:
    model = tiny_llama(4)
    model.model.layers[2].mlp.act_fn = torch.nn.ReLU()
    assert not stamp.find_groups(model)
    captured = model_capture.capture_model(model, model.forward, 1)
    ops = [line.op for line in parse(captured.lowered.text).lines]
    assert ops.count("silu") == 3 and ops.count("relu") == 1


def test_layers_that_use_their_index_are_all_captured() -> None:
    """Attributes are alike, but forward reads layer_idx: only comparing the graphs can tell."""
    model = tiny_llama(4)
    attention = type(model.model.layers[0].self_attn)

    class Scaled(attention):
        def forward(self, hidden_states, **kwargs):
            output, weights = super().forward(hidden_states, **kwargs)
            return output / (self.layer_idx + 1), weights

    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    captured = model_capture.capture_model(model, model.forward, 1)
    with torch.no_grad():
        expected = model.generate(prompt(), max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    assert run_steps(captured, prompt(), 4) == expected
    values = {
        line.attributes["value"]
        for line in parse(captured.lowered.text).lines
        if line.op == "scalar"
    }
    assert {"2.0", "3.0", "4.0"} <= values


def test_layers_called_differently_are_all_captured() -> None:
    model = tiny_llama(4)
    original = model.model.layers[2].forward
    model.model.layers[2].forward = lambda x, **kwargs: original(x * 0.5, **kwargs)
    captured = model_capture.capture_model(model, model.forward, 1)
    with torch.no_grad():
        expected = model.generate(prompt(), max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    assert run_steps(captured, prompt(), 4) == expected


def test_the_model_is_as_before() -> None:
    model = tiny_llama()
    model_capture.capture_model(model, model.forward, 1)
    assert model.config._attn_implementation == "sdpa"
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_what_a_forward_assigns_is_undone() -> None:
    model = tiny_llama()
    model.model.register_buffer("scale", torch.ones(()))
    embed = model.model.embed_tokens.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        model.model.scale = model.model.scale * 1
        model.model.seen = ids.shape
        return embed(ids) * model.model.scale

    before = model.model.scale
    model.model.embed_tokens.forward = forward
    model_capture.capture_model(model, model.forward, 1)
    assert model.model.scale is before and not hasattr(model.model, "seen")


def test_sizes_become_symbols() -> None:
    b, s = Dim.symbol("b"), Dim.symbol("s")
    values = {
        (3, 5, 1): b,
        (67, 97, 1): s,
        (201, 485, 1): b * s,
        (64, 64, 64): Dim.of(64),
        (402, 970, 2): b * s * 2,
        (66, 96, 0): s - 1,
    }
    for sizes, expected in values.items():
        assert unify.solve(sizes) == expected
    with pytest.raises(UnsupportedError, match="not understood"):
        unify.solve((67, 98, 1))


def test_a_branch_on_the_number_of_tokens_is_refused() -> None:
    model = tiny_llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) * 2 if x.shape[1] > 1 else head(x)
    with pytest.raises(UnsupportedError, match="for one token than for many"):
        model_capture.capture_model(model, model.forward, 0)


def test_models_without_the_attention_interface() -> None:
    from transformers import MptConfig

    model = build(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2))
    with pytest.raises(UnsupportedError):
        model_capture.capture_model(model, model.forward, 1)


def test_sliding_windows_are_captured() -> None:
    from transformers import MistralConfig

    config = MistralConfig(**{**llama_config().to_dict(), "sliding_window": 8})
    config.model_type = "mistral"
    model = build(config)
    text = model_capture.capture_model(model, model.forward, 1).lowered.text
    assert text.count("window = 8") == config.num_hidden_layers
    assert "causal_mask" not in text and "cache_keys" not in text
