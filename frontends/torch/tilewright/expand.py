"""Expansion: the body of the first decoder layer, copied for every layer of its group.

A captured graph holds the body once, between `layer_input` and `layer_output` nodes, which only
exist until here. Each copy gets its own weights and its own cache; stamp.py has proved that this is
what the model computes.

Tested by tests/python/test_capture.py (against captures of every layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilewright import graph_text
from tilewright.graph_text import GraphBuilder, Value
from tilewright.stamp import Group, NotAlikeError


def body_of(builder: GraphBuilder) -> list[graph_text.Node]:
    """The nodes of the first layer, its input and output nodes included."""
    positions = [
        i for i, node in enumerate(builder.nodes) if node.op in ("layer_input", "layer_output")
    ]
    return builder.nodes[positions[0] : positions[-1] + 1]


def expand_layers(
    builder: GraphBuilder, group: Group, names: Mapping[int, str], caches: list[int]
) -> list[int]:
    """Replaces the body by one copy per layer, in place.

    names: the weights' names by their tensors' identity. caches: the layers of the cache
    parameters. Returns the same for the expanded graph.
    """
    return _Expansion(builder, group, names, caches).run()


class _Expansion:
    def __init__(
        self, builder: GraphBuilder, group: Group, names: Mapping[int, str], caches: list[int]
    ) -> None:
        self.builder, self.group, self.names = builder, group, names
        self.body = body_of(builder)
        start = next(i for i, node in enumerate(builder.nodes) if node is self.body[0])
        self.before = builder.nodes[:start]
        self.after = builder.nodes[start + len(self.body) :]
        self.sources = {id(n.results[0]): n for n in builder.nodes if graph_text.is_source(n)}
        parameters = [value for value in builder.parameters if value.type.is_cache]
        self.caches = dict(zip(caches, parameters, strict=True))
        self.layer_of_cache = {id(value): layer for layer, value in self.caches.items()}
        self.weights: list[graph_text.Node] = []

    def run(self) -> list[int]:
        builder = self.builder
        inputs = {
            int(node.attributes["index"]): node.operands[0]
            for node in self.body
            if node.op == "layer_input"
        }
        first = inputs
        builder.nodes = []
        outputs: dict[int, Value] = {}
        for layer in range(len(self.group.layers)):
            if layer > 0:
                wiring = enumerate(self.group.wiring)
                inputs = {i: (outputs if kind == "out" else first)[j] for i, (kind, j) in wiring}
            outputs = self._copy(layer, inputs)
        body = builder.nodes
        replaced = {
            id(node.results[0]): outputs[int(node.attributes["index"])]
            for node in self.body
            if node.op == "layer_output"
        }
        for node in self.after:
            node.operands = [replaced.get(id(value), value) for value in node.operands]
        builder.outputs = [replaced.get(id(value), value) for value in builder.outputs]
        builder.nodes = [*self.before, *self.weights, *body, *self.after]
        builder.remove_dead_nodes()
        return list(self.caches)

    def _copy(self, layer: int, inputs: dict[int, Value]) -> dict[int, Value]:
        """Appends the body for one layer; returns its outputs."""
        values: dict[int, Value] = {}
        outputs: dict[int, Value] = {}
        for node in self.body:
            index = int(node.attributes.get("index", -1))  # of marker nodes
            if node.op == "layer_input":
                values[id(node.results[0])] = inputs[index]
                continue
            operands = [self._value(operand, layer, values) for operand in node.operands]
            if node.op == "layer_output":
                outputs[index] = operands[0]
                continue
            types = [result.type for result in node.results]
            name = node.results[0].name.split(".")[0]
            made = self.builder.append_many(node.op, operands, types, name, **node.attributes)
            values.update(zip(map(id, node.results), made, strict=True))
        return outputs

    def _value(self, value: Value, layer: int, values: dict[int, Value]) -> Value:
        found = values.get(id(value))
        if found is not None:
            return found
        if id(value) in self.layer_of_cache:
            found = self._cache(self.layer_of_cache[id(value)] + layer, value)
        elif id(value) in self.sources:
            found = self._weight(self.sources[id(value)], layer)
        else:
            raise NotAlikeError(f"a layer reads %{value.name} of the model")
        values[id(value)] = found
        return found

    def _cache(self, layer: int, like: Value) -> Value:
        if layer not in self.caches:
            self.caches[layer] = self.builder.parameter(f"cache.{layer}", like.type)
        return self.caches[layer]

    def _weight(self, node: graph_text.Node, layer: int) -> Value:
        """The same weight of another layer; what is not the first layer's own is shared."""
        prefix = f"{self.group.prefix}.0."
        name = str(node.attributes.get("source", ""))
        if layer == 0 or not name.startswith(prefix):
            return node.results[0]
        tensor: Any = self.group.layers[layer]
        for part in name.removeprefix(prefix).split("."):
            tensor = getattr(tensor, part)
        assert isinstance(tensor, torch.Tensor)
        before = len(self.builder.nodes)
        value = self.builder.constant(self.names[id(tensor)], tensor)
        self.weights += self.builder.nodes[before:]
        del self.builder.nodes[before:]
        return value
