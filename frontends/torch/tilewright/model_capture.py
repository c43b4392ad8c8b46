"""Capture of a whole causal language model: (input_ids, position_ids, caches) -> logits.

The model's own forward is traced over fake tensors, with transformers' extension points recording
cache appends and attention, and with one decoder layer computed and the others stamped (stamp.py).

Sizes become symbols by comparison: the model is traced at three pairs (batch, tokens), and a size
that is 3, 5, 1 there is `b`, one that is 67, 97, 1 is `s`. Tracing at concrete sizes is several
times faster than with symbolic ones, and says more: had the model taken another branch for one
token than for many, the graphs would differ, and it is refused.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright import capture, capture_ops, graph_text, stamp
from tilewright.dims import Dim
from tilewright.graph_text import GraphBuilder, Type, UnsupportedError, Value
from tilewright.lower import Call, Lowered, Lowerer

# (batch, tokens, earlier tokens). The last pair must be (1, 1): it also gives the coefficients.
SAMPLES = ((3, 67, 131), (5, 97, 211), (1, 1, 37))
_NAMESPACE = "tilewright_capture"


@dataclass
class CapturedModel:
    lowered: Lowered
    output_type: type  # what the model's forward returns
    caches: list[CacheShape] = field(default_factory=list)  # the program's, in order


@dataclass(frozen=True)
class CacheShape:
    layer: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass
class Template:
    """The nodes of a layer that was computed, over its formal inputs."""

    layer: int
    formals: list[Value]
    nodes: list[graph_text.Node]
    outputs: list[Value]


def capture_model(
    model: nn.Module, forward: Callable[..., Any], logits_to_keep: int
) -> CapturedModel:
    """`forward`: the model's own. Raises UnsupportedError with the reason.

    Not thread-safe: while it runs, the model's attention and layers record instead of computing.
    """
    groups = stamp.find_groups(model)
    try:
        return _capture(model, forward, logits_to_keep, groups)
    except stamp.NotAlikeError:
        return _capture(model, forward, logits_to_keep, [])


def _capture(
    model: nn.Module, forward: Callable[..., Any], logits_to_keep: int, groups: list[stamp.Group]
) -> CapturedModel:
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    output_type: type = tuple
    lowerers = []
    for i, (batch, tokens, past) in enumerate(SAMPLES):
        gm, output_type = _trace(
            model, forward, logits_to_keep, groups, (batch, tokens, past), both=i == 0
        )
        lowerer = ModelLowerer(gm, groups, names)
        lowerer.run_model()
        lowerers.append(lowerer)
    builder = unify([lowerer.builder for lowerer in lowerers])
    first = lowerers[0]
    caches = [
        CacheShape(layer, *_cache_sizes(value.type), value.dtype)
        for layer, value in first.caches.items()
    ]
    lowered = Lowered(
        text=builder.text(),
        constants=builder.constants(),
        inputs=[0, 1],
        shape_inputs=[],
        bindings={"b": (0, 0), "s": (0, 1)},
        outputs=[],
        output_tree=None,
        results=[value.type for value in builder.outputs],
        tokens=Dim.symbol("s"),
        mutated=frozenset(),
        externals=first.externals,
    )
    return CapturedModel(lowered, output_type, caches)


def _cache_sizes(type_: Type) -> tuple[int, int]:
    heads, head_dim = (size.constant for size in type_.shape)
    assert heads is not None and head_dim is not None
    return heads, head_dim


def _trace(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    groups: list[stamp.Group],
    sizes: tuple[int, int, int],
    both: bool,
) -> tuple[GraphModule, type]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, tokens, past = sizes
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    returned: list[type] = []

    def step(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        cache = capture_ops.recording_cache(model.config, past, tokens)
        result = forward(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            return_dict=True,
        )
        extra = [k for k, v in result.items() if v is not None and k not in _RESULTS]
        if extra:
            raise UnsupportedError(f"the model returns {', '.join(extra)}")
        returned.append(type(result))
        return result.logits

    with mode:
        fakes = [torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2)]
    with capture_ops.recording_attention(model), stamp.recording_layers(groups, both):
        return capture.trace(step, fakes, mode), returned[0]


_RESULTS = ("logits", "past_key_values")


class ModelLowerer(Lowerer):
    """Lowers one sample: markers become caches, attention and stamped layers."""

    def __init__(
        self, gm: GraphModule, groups: list[stamp.Group], names: Mapping[int, str]
    ) -> None:
        super().__init__(gm, "model", {}, keep_views=True)
        self.groups = groups
        self.attributes = dict(names)
        self.caches: dict[int, Value] = {}
        self._cache_now: dict[int, Value] = {}  # after its last append
        self._template: Template | None = None
        self._open: Template | None = None
        self._started = 0

    def run_model(self) -> None:
        result = self.walk({})
        (leaf,) = pytree.tree_leaves(result.args[0])
        self.builder.outputs.append(self.environment[leaf])
        self.builder.remove_dead_nodes()
        self._sort_sources()
        alive = {node.attributes.get("function") for node in self.builder.nodes}
        self.externals = [(name, why) for name, why in self.externals if name in alive]

    def _sort_sources(self) -> None:
        """Constants first, in order of use: where they were made depends on what is stamped."""
        sources = self._sources()
        first: dict[int, graph_text.Node] = {}
        for node in self.builder.nodes:
            for operand in node.operands:
                if id(operand) in sources:
                    first.setdefault(id(operand), sources[id(operand)])
        others = [n for n in self.builder.nodes if n.op not in ("constant", "scalar")]
        self.builder.nodes = [*first.values(), *others]

    def call(self, node: Node) -> None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == _NAMESPACE:
            marker: Callable[..., Any] = getattr(self, "_" + target._schema.name.split("::")[1])
            self.environment[node] = marker(node, *(self.operand(a) for a in node.args))
            return
        for argument in node.all_input_nodes:
            value = self.environment.get(argument)
            is_getitem = not isinstance(target, torch._ops.OpOverload)
            if isinstance(value, Value) and value.type.is_cache and not is_getitem:
                raise UnsupportedError("keys and values are used outside of the attention function")
        super().call(node)

    # --- markers

    def _kv_append(self, node: Node, k: Value, v: Value, _length: Value, layer: int) -> Any:
        if k.shape != v.shape:
            raise UnsupportedError("keys and values of different shape")
        if layer not in self.caches:
            type_ = Type(k.dtype, (k.shape[1], k.shape[3]), is_cache=True)
            self.caches[layer] = self.builder.parameter(f"cache.{layer}", type_)
        before = self._cache_now.get(layer, self.caches[layer])
        after = self.builder.append("kv_append", [before, k, v], before.type, "kv")
        self._cache_now[layer] = after
        return [after, after]

    def _attention(self, node: Node, q: Value, k: Value, v: Value, scale: float, _: int) -> Value:
        if k is not v or not k.type.is_cache:
            raise UnsupportedError("attention over keys that are not the cache's")
        call = Call(self.builder, "attention", node.name, [q.type])
        return call.emit("attention", q, k, scale=scale, causal=True)

    def _layer_begin(self, node: Node, inputs: list[Value], layer: int) -> list[Value]:
        formals = [Value(self.builder.unique("formal"), value.type) for value in inputs]
        self._open = Template(layer, formals, [], [])
        self._actual = inputs
        self._started = len(self.builder.nodes)
        return formals

    def _layer_end(self, node: Node, outputs: list[Value], layer: int) -> list[Value]:
        template = self._open
        assert template is not None and template.layer == layer
        self._open = None
        body = self.builder.nodes[self._started :]
        template.nodes = [n for n in body if n.op not in ("constant", "scalar")]
        template.outputs = outputs
        del self.builder.nodes[self._started :]
        self.builder.nodes += [n for n in body if n.op in ("constant", "scalar")]
        if self._template is None:
            self._check_closed(template)
            self._template = template
        elif self._signature(template) != self._signature(self._template):
            raise stamp.NotAlikeError(f"layer {layer} computes something else than the first one")
        return self._instantiate(self._actual, layer)

    def _layer(
        self, node: Node, inputs: list[Value], _like: list[Value], layer: int
    ) -> list[Value]:
        return self._instantiate(inputs, layer)

    # --- stamping

    def _check_closed(self, template: Template) -> None:
        known = {id(v) for v in template.formals} | {id(v) for v in self.caches.values()}
        known |= {id(v) for node in template.nodes for v in node.results}
        sources = self._sources()
        for node in template.nodes:
            for operand in node.operands:
                if id(operand) not in known and id(operand) not in sources:
                    raise stamp.NotAlikeError(f"a layer reads %{operand.name} of the model")

    def _sources(self) -> dict[int, graph_text.Node]:
        return {
            id(result): node
            for node in self.builder.nodes
            if node.op in ("constant", "scalar")
            for result in node.results
        }

    def _prefix(self, layer: int) -> str:
        return f"{self._group().prefix}.{layer}."

    def _group(self) -> stamp.Group:
        if len(self.groups) != 1:
            raise stamp.NotAlikeError("several lists of layers")
        return self.groups[0]

    def _signature(self, template: Template) -> list[Any]:
        """The body with every name replaced by what it means within the layer."""
        sources = self._sources()
        layers = {id(value): layer for layer, value in self.caches.items()}
        meaning: dict[int, Any] = {id(v): ("in", i) for i, v in enumerate(template.formals)}

        def describe(value: Value) -> Any:
            if id(value) in meaning:
                return meaning[id(value)]
            if id(value) in layers:
                return ("cache", layers[id(value)] - template.layer)
            node = sources[id(value)]
            if node.op == "scalar":
                return ("scalar", graph_text.print_attributes(node.attributes))
            name = node.attributes["source"]
            prefix = self._prefix(template.layer)
            return ("weight", name.removeprefix(prefix), name.startswith(prefix), str(value.type))

        lines: list[Any] = []
        for i, node in enumerate(template.nodes):
            operands = [describe(operand) for operand in node.operands]
            for j, result in enumerate(node.results):
                meaning[id(result)] = ("node", i, j)
            types = [str(result.type) for result in node.results]
            lines.append((node.op, operands, types, graph_text.print_attributes(node.attributes)))
        lines.append([describe(output) for output in template.outputs])
        return lines

    def _instantiate(self, inputs: list[Value], layer: int) -> list[Value]:
        """A copy of the template for `layer`, with its weights and its cache."""
        template = self._template
        assert template is not None
        if [v.type for v in inputs] != [v.type for v in template.formals]:
            raise stamp.NotAlikeError(f"layer {layer} is called with other shapes")
        values = dict(zip(map(id, template.formals), inputs, strict=True))
        sources = self._sources()
        caches = {id(value): index for index, value in self.caches.items()}

        def actual(value: Value) -> Value:
            if id(value) not in values:
                if id(value) in caches:
                    moved = self._cache(caches[id(value)] - template.layer + layer, value.type)
                else:
                    moved = self._weight(sources[id(value)], template.layer, layer)
                values[id(value)] = moved
            return values[id(value)]

        for node in template.nodes:
            operands = [actual(operand) for operand in node.operands]
            types = [result.type for result in node.results]
            name = node.results[0].name.split(".")[0]
            results = self.builder.append_many(node.op, operands, types, name, **node.attributes)
            for result, made in zip(node.results, results, strict=True):
                values[id(result)] = made
        return [actual(output) for output in template.outputs]

    def _cache(self, layer: int, type_: Type) -> Value:
        if layer not in self.caches:
            self.caches[layer] = self.builder.parameter(f"cache.{layer}", type_)
        return self.caches[layer]

    def _weight(self, node: graph_text.Node, first: int, layer: int) -> Value:
        """The same weight of another layer; a weight of the whole model is shared."""
        if node.op == "scalar":
            return node.results[0]
        name = str(node.attributes["source"])
        prefix = self._prefix(first)
        if not name.startswith(prefix):
            return node.results[0]
        tensor: Any = self._group().layers[layer]
        for part in name.removeprefix(prefix).split("."):
            tensor = getattr(tensor, part)
        return self.constant(self.attributes[id(tensor)], tensor)


# --- sizes as symbols


def unify(builders: Sequence[GraphBuilder]) -> GraphBuilder:
    """One graph with symbols from graphs of SAMPLES' sizes. UnsupportedError if they differ."""
    first = builders[0]
    if len({len(builder.nodes) for builder in builders}) != 1:
        raise UnsupportedError("the model computes something else for one token than for many")
    result = GraphBuilder(first.name)
    made: dict[int, Value] = {}
    ordinals = [_ordinals(builder) for builder in builders]

    def value(values: Sequence[Value]) -> Value:
        return Value(values[0].name, _unify_types([v.type for v in values]))

    for parameters in zip(*(builder.parameters for builder in builders), strict=True):
        made[id(parameters[0])] = value(parameters)
        result.parameters.append(made[id(parameters[0])])
    for nodes in zip(*(builder.nodes for builder in builders), strict=True):
        positions = {
            tuple(order[id(v)] for v in node.operands)
            for node, order in zip(nodes, ordinals, strict=True)
        }
        if len({node.op for node in nodes}) != 1 or len(positions) != 1:
            raise UnsupportedError("the model computes something else for one token than for many")
        node = nodes[0]
        results = [value(values) for values in zip(*(n.results for n in nodes), strict=True)]
        made.update(zip(map(id, node.results), results, strict=True))
        attributes = {
            key: _unify_attribute([n.attributes.get(key) for n in nodes]) for key in node.attributes
        }
        operands = [made[id(v)] for v in node.operands]
        result.nodes.append(graph_text.Node(node.op, operands, results, attributes, node.source))
    result.outputs = [made[id(v)] for v in first.outputs]
    return result


def _ordinals(builder: GraphBuilder) -> dict[int, int]:
    values = [*builder.parameters, *(v for node in builder.nodes for v in node.results)]
    return {id(value): i for i, value in enumerate(values)}


def _unify_types(types: Sequence[Type]) -> Type:
    if len({(t.dtype, len(t.shape), t.is_cache) for t in types}) != 1:
        raise UnsupportedError("the model computes something else for one token than for many")
    shape = tuple(
        solve(tuple(size.constant or 0 for size in sizes))
        for sizes in zip(*(t.shape for t in types), strict=True)
    )
    return Type(types[0].dtype, shape, types[0].is_cache)


def _unify_attribute(values: Sequence[Any]) -> Any:
    if values[0] and isinstance(values[0], list) and isinstance(values[0][0], Dim):
        if len({len(value) for value in values}) != 1:
            raise UnsupportedError("shapes of different rank for one token and for many")
        return [
            solve(tuple(size.constant or 0 for size in sizes))
            for sizes in zip(*values, strict=True)
        ]
    if any(value != values[0] for value in values[1:]):
        raise UnsupportedError(f"a number that depends on the input's size: {values}")
    return values[0]


@functools.cache
def solve(values: tuple[int, ...]) -> Dim:
    """The size that has these values at SAMPLES: a number, c*b, c*s, c*b*s, or one of them + c."""
    if len(set(values)) == 1:
        return Dim.of(values[0])
    b, s = Dim.symbol("b"), Dim.symbol("s")
    for monomial in (b, s, b * s):
        sizes = [monomial.evaluate({"b": batch, "s": tokens}) for batch, tokens, _ in SAMPLES]
        factor, rest = values[-1], values[-1] - 1
        if all(value == factor * size for value, size in zip(values, sizes, strict=True)):
            return monomial * factor
        if all(value == size + rest for value, size in zip(values, sizes, strict=True)):
            return monomial + rest
    raise UnsupportedError(f"a size that depends on the input's in a way not understood: {values}")
