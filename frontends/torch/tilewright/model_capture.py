"""Capture of a whole causal language model: (input_ids, position_ids, caches) -> logits; or of its
ragged step (ragged.py), which is one row of tokens of several sequences and takes the indices of
the tokens whose logits are wanted, too.

The model's own forward is traced over fake tensors, with transformers' extension points recording
cache appends and attention, and with one decoder layer computed and the others stamped (stamp.py,
expand.py).

Sizes become symbols by comparison: the model is traced at three pairs (batch, tokens), and a size
that is 3, 5, 1 there is `b`, one that is 67, 97, 1 is `s`. Tracing at concrete sizes is several
times faster than with symbolic ones, and says more: had the model taken another branch for one
token than for many, the graphs would differ, and it is refused.

Tested by tests/python/test_capture.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright import capture, capture_ops, graph_text, rotary, stamp
from tilewright.expand import body_of, expand_layers
from tilewright.graph_text import Type, UnsupportedError, Value
from tilewright.lower import Call, Lowerer, result_types
from tilewright.lowered import RAGGED, CacheShape, CapturedModel, lowered_model
from tilewright.unify import CHOSEN, SAMPLES, unify

_OTHER_MASK = "a mask that is neither causal nor a window"
_NAMESPACE = "tilewright_capture"
_RESULTS = ("logits", "past_key_values")


def capture_model(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    stored: torch.dtype | None = None,
) -> CapturedModel:
    """`forward`: the model's own. logits_to_keep: 0 (all), a number of the last tokens, or RAGGED.
    stored: the type of keys and values in the caches; None: the model's.
    Raises UnsupportedError with the reason.

    Not thread-safe: while it runs, the model's attention and layers record instead of computing.
    """
    groups = stamp.find_groups(model)
    with capture.no_collection():
        if len(groups) == 1:
            try:
                return _capture(model, forward, logits_to_keep, stored, groups[0])
            except stamp.NotAlikeError:
                pass  # then every layer is captured
        return _capture(model, forward, logits_to_keep, stored, None)


def _capture(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    stored: torch.dtype | None,
    group: stamp.Group | None,
) -> CapturedModel:
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    output_type: type = tuple
    lowerers = []
    ragged = logits_to_keep == RAGGED
    for i, sizes in enumerate(SAMPLES):
        if ragged:
            sizes = (1, *sizes[1:])
        gm, output_type = _trace(model, forward, logits_to_keep, group, sizes, markers=i == 0)
        if group is not None and i == 0:
            group.wiring = stamp.chain(gm, group)
        lowerer = ModelLowerer(gm, group, names, stored)
        lowerer.run_model()
        lowerers.append(lowerer)
    builder = unify([lowerer.builder for lowerer in lowerers])
    layers = list(lowerers[0].caches)
    if group is not None:
        layers = expand_layers(builder, group, names, layers)
    appended = {
        id(node.operands[0]): node.operands[1].dtype
        for node in builder.nodes
        if node.op == "kv_append"
    }
    caches = [
        CacheShape(layer, *_cache_sizes(value.type), appended[id(value)], value.dtype)
        for layer, value in zip(
            layers, (v for v in builder.parameters if v.type.is_cache), strict=True
        )
    ]
    constants = builder.constants()
    literals = {name: tensor for name, tensor in constants.items() if id(tensor) not in names}
    lowered = lowered_model(
        builder.text(),
        constants,
        [value.type for value in builder.outputs],
        lowerers[0].externals,
        logits_to_keep,
    )
    return CapturedModel(lowered, output_type, caches, literals)


def _cache_sizes(type_: Type) -> tuple[int, int]:
    heads, head_dim = (size.constant for size in type_.shape)
    assert heads is not None and head_dim is not None
    return heads, head_dim


def _trace(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    group: stamp.Group | None,
    sizes: tuple[int, int, int],
    markers: bool,
) -> tuple[GraphModule, type]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, tokens, past = sizes
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    returned: list[type] = []

    def step(
        input_ids: torch.Tensor, position_ids: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        cache = capture_ops.recording_cache(model.config, past, tokens)
        result = forward(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep if chosen is None else chosen,
            return_dict=True,
        )
        extra = [k for k, v in result.items() if v is not None and k not in _RESULTS]
        if extra:
            raise UnsupportedError(f"the model returns {', '.join(extra)}")
        returned.append(type(result))
        return result.logits

    with mode:
        fakes = [torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2)]
        if logits_to_keep == RAGGED:
            count = CHOSEN[[tokens for _, tokens, _ in SAMPLES].index(tokens)]
            fakes.append(torch.zeros(count, dtype=torch.int64))
    with (
        capture.unchanged(model),
        rotary.as_they_are(rotary.growing_tables(model)),
        capture_ops.recording_attention(model),
        capture_ops.recording_experts(model),
        stamp.recording_layers(group, markers),
    ):
        # The number of parameters must be that of the inputs.
        traced = step if logits_to_keep == RAGGED else lambda ids, positions: step(ids, positions)
        return capture.trace(traced, fakes, mode), returned[0]


class ModelLowerer(Lowerer):
    """Lowers one sample. Markers become caches and attention; the layers of a group become the body
    of the first one, between `layer_input` and `layer_output` nodes."""

    def __init__(
        self,
        gm: GraphModule,
        group: stamp.Group | None,
        names: Mapping[int, str],
        stored: torch.dtype | None,
    ) -> None:
        super().__init__(gm, "model", {}, keep_views=True)
        self._stored = stored
        self.group = group
        self.attributes = dict(names)
        self.caches: dict[int, Value] = {}
        self._cache_now: dict[int, Value] = {}  # after its last append
        self._outputs: list[Value] = []  # of the first layer
        self._started = 0
        self._caches_of: dict[int, Value] = {}  # by the identity of their keys and values
        self._windows: dict[int, int] = {}  # of masks, by the identity of their values

    def run_model(self) -> None:
        result = self.walk({})
        (leaf,) = pytree.tree_leaves(result.args[0])
        self.builder.outputs.append(self.environment[leaf])
        self.builder.remove_dead_nodes()
        if any(node.op == "other_mask" for node in self.builder.nodes):
            raise UnsupportedError(_OTHER_MASK)
        self._sort_sources()
        used = {id(v) for node in self.builder.nodes for v in node.operands}
        self.caches = {i: v for i, v in self.caches.items() if id(v) in used}
        self.builder.parameters = [
            v for v in self.builder.parameters if id(v) in used or not v.type.is_cache
        ]
        alive = {node.attributes.get("function") for node in self.builder.nodes}
        self.externals = [(name, why) for name, why in self.externals if name in alive]

    def _sort_sources(self) -> None:
        """Constants first, in order of use: where they were made depends on what is stamped."""
        sources = {id(n.results[0]): n for n in self.builder.nodes if graph_text.is_source(n)}
        first: dict[int, graph_text.Node] = {}
        for node in self.builder.nodes:
            for operand in node.operands:
                if id(operand) in sources:
                    first.setdefault(id(operand), sources[id(operand)])
        others = [node for node in self.builder.nodes if not graph_text.is_source(node)]
        self.builder.nodes = [*first.values(), *others]

    def call(self, node: Node) -> None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == _NAMESPACE:
            marker: Callable[..., Any] = getattr(self, "_" + target._schema.name.split("::")[1])
            self.environment[node] = marker(node, *(self.operand(a) for a in node.args))
            return
        if target is torch.ops.aten.index.Tensor and len(self.placeholders) == 3:
            x, indices = (self.operand(a) for a in node.args)
            chosen = self.environment[self.placeholders[2]]
            if len(indices) == 2 and indices[0] is None and indices[1] is chosen:
                self.environment[node] = self._chosen_rows(node, x, chosen)
                return
        super().call(node)

    def _chosen_rows(self, node: Node, x: Value, chosen: Value) -> Value:
        """x[:, chosen] of one row of tokens."""
        call = Call(self.builder, "chosen_rows", node.name, result_types(node))
        row = call.reshape(x, x.shape[1:])
        rows = call.append("embedding", [row, chosen], Type(x.dtype, call.type.shape[1:]))
        return call.reshape(rows, call.type.shape)

    # --- markers

    def _kv_append(self, node: Node, k: Value, v: Value, length: Value, layer: int) -> Any:
        """Keys and values are tensors for models that compute attention themselves; the passes
        make one attention of it, or the core refuses the graph."""
        if k.shape != v.shape:
            raise UnsupportedError("keys and values of different shape")
        if layer not in self.caches:
            type_ = Type(self._stored or k.dtype, (k.shape[1], k.shape[3]), is_cache=True)
            self.caches[layer] = self.builder.parameter(f"cache.{layer}", type_)
        before = self._cache_now.get(layer, self.caches[layer])
        after = self.builder.append("kv_append", [before, k, v], before.type, "kv")
        self._cache_now[layer] = after
        whole = Type(k.dtype, (k.shape[0], k.shape[1], length.shape[0], k.shape[3]))
        shape = list(whole.shape)
        kept = [
            self.builder.append(
                op,
                [after],
                whole,
                "kept",
                shape=shape,
                dtype=k.dtype if after.dtype != k.dtype else None,
            )
            for op in ("cache_keys", "cache_values")
        ]
        self._caches_of.update((id(value), after) for value in kept)
        return kept

    def _mask(self, node: Node, like: Value, padding: Value | None, window: int) -> Value:
        # Padding is the cache's affair. Some models make a mask of ones where they are given none.
        if padding is not None:
            made = self._literals.value(cast(Node, node.args[1]))
            if made is None or not bool(made.all()):
                raise UnsupportedError("a mask that depends on the input")
        if window == capture_ops.OTHER_MASK:
            return self.builder.append("other_mask", [], like.type, node.name)
        mask = self.builder.append(
            "causal_mask",
            [],
            like.type,
            node.name,
            shape=list(like.shape),
            window=window or None,
            dtype=None if like.dtype == torch.float32 else like.dtype,
        )
        self._windows[id(mask)] = window
        return mask

    def _attention(
        self,
        node: Node,
        q: Value,
        k: Value,
        v: Value,
        mask: Value | None,
        sinks: Value | None,
        scale: float,
        softcap: float,
    ) -> Value:
        cache = self._caches_of.get(id(k))
        if cache is None or self._caches_of.get(id(v)) is not cache or k is v:
            raise UnsupportedError("attention over keys that are not the cache's")
        if mask is not None and id(mask) not in self._windows:
            made = self.builder.producer(mask)
            other = made is not None and made.op == "other_mask"
            raise UnsupportedError(
                _OTHER_MASK if other else "attention with a mask of the model's own"
            )
        call = Call(self.builder, "attention", node.name, [q.type])
        operands = [q, cache]
        if sinks is not None:
            operands.append(call.convert(call.reshape(sinks, (q.shape[1],)), torch.float32))
        return call.emit(
            "attention",
            *operands,
            scale=scale,
            causal=True,
            window=(self._windows[id(mask)] if mask is not None else 0) or None,
            softcap=softcap or None,
            sinks=True if sinks is not None else None,
        )

    def _expert_linear(
        self,
        node: Node,
        x: Value,
        weights: Value,
        indices: Value,
        bias: Value | None,
        transposed: bool,
    ) -> Value:
        call = Call(self.builder, "expert_linear", node.name, result_types(node))
        indices = call.convert(indices, torch.int64)
        operands = [x, weights, indices] + ([bias] if bias is not None else [])
        flags = {"bias": bias is not None or None, "transposed": transposed or None}
        return call.emit("expert_linear", *operands, **flags)

    def _layer_begin(self, node: Node, inputs: list[Value], layer: int) -> list[Value]:
        self._started = len(self.builder.nodes)
        made = []
        for i, value in enumerate(inputs):
            made.append(self.builder.append("layer_input", [value], value.type, "input", index=i))
            if id(value) in self._windows:
                self._windows[id(made[-1])] = self._windows[id(value)]
        return made

    def _layer_end(self, node: Node, outputs: list[Value], layer: int) -> list[Value]:
        made = [
            self.builder.append("layer_output", [value], value.type, "output", index=i)
            for i, value in enumerate(outputs)
        ]
        if layer == 0:
            self._outputs = made
        else:
            last = self.builder.nodes[self._started :]
            del self.builder.nodes[self._started :]
            first = body_of(self.builder)
            if self._signature(last, layer) != self._signature(first, 0):
                raise stamp.NotAlikeError(f"layer {layer} computes something else than the first")
            self.builder.nodes += [n for n in last if graph_text.is_source(n)]
        return self._outputs

    def _layer(
        self, node: Node, inputs: list[Value], _like: list[Value], layer: int
    ) -> list[Value]:
        return self._outputs

    def _signature(self, body: list[graph_text.Node], layer: int) -> list[Any]:
        """The body of a layer with every name replaced by what it means within the layer."""
        assert self.group is not None
        prefix = f"{self.group.prefix}.{layer}."
        caches = {id(value): i - layer for i, value in self.caches.items()}
        sources = {
            id(n.results[0]): n for n in (*self.builder.nodes, *body) if graph_text.is_source(n)
        }
        meaning: dict[int, Any] = {}

        def describe(value: Value) -> Any:
            if id(value) in meaning:
                return meaning[id(value)]
            if id(value) in caches:
                return ("cache", caches[id(value)])
            node = sources.get(id(value))
            if node is None:
                raise stamp.NotAlikeError(f"a layer reads %{value.name} of the model")
            if node.op == "scalar":
                return ("scalar", graph_text.print_attributes(node.attributes))
            name = node.attributes["source"]
            return ("weight", name.removeprefix(prefix), name.startswith(prefix), str(value.type))

        lines: list[Any] = []
        for node in body:
            if graph_text.is_source(node):
                continue
            is_input = node.op == "layer_input"
            operands = [] if is_input else [describe(operand) for operand in node.operands]
            for j, result in enumerate(node.results):
                meaning[id(result)] = (len(lines), j)
            types = [str(result.type) for result in node.results]
            lines.append((node.op, operands, types, graph_text.print_attributes(node.attributes)))
        return lines
