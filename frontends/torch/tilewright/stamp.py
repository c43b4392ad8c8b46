"""Layer groups: decoder layers that are captured once and stamped.

Layers of one nn.ModuleList form a group when they are made alike: same classes, same parameter
shapes and types, same attributes but for `layer_idx`. That alone proves nothing about what
`forward` computes, so the first and the last layer of a group are both captured, and their graphs
must be equal up to the names of their weights (model_capture.py); otherwise every layer is
captured.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright import capture_ops
from tilewright.graph_text import UnsupportedError

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MODULE_DICTIONARIES = frozenset(nn.Module().__dict__)
MINIMUM = 3  # layers; fewer are captured as they are


class NotAlikeError(UnsupportedError):
    """The layers of a group turned out to differ while they were called."""


@dataclass
class Group:
    """A list of layers that are alike, and what their calls looked like while being recorded."""

    prefix: str  # of the ModuleList, "model.layers"
    layers: list[nn.Module]
    # How layers after the first get their tensors: ("out", i) of the layer before, ("in", i) of the
    # first layer. Found by chain().
    wiring: list[tuple[str, int]] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)  # the first layer's call

    @property
    def last(self) -> int:
        return len(self.layers) - 1


def find_groups(model: nn.Module) -> list[Group]:
    """Outermost module lists of at least MINIMUM layers that are alike."""
    groups: list[Group] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < MINIMUM:
            continue
        if any(name.startswith(group.prefix + ".") for group in groups):
            continue
        layers = list(module)
        if all(alike(layers[0], layer, 0, i) for i, layer in enumerate(layers[1:], 1)):
            groups.append(Group(name, layers))
    return groups


def alike(a: Any, b: Any, a_index: int, b_index: int) -> bool:
    """Equal modules, but that `layer_idx` is a_index here and b_index there."""
    if type(a) is not type(b):
        return False
    if not isinstance(a, nn.Module):
        return _equal(a, b)
    for registry in ("_parameters", "_buffers"):
        ours, theirs = getattr(a, registry), getattr(b, registry)
        if ours.keys() != theirs.keys():
            return False
        if not all(_same_tensor_type(ours[name], theirs[name]) for name in ours):
            return False
    if a._modules.keys() != b._modules.keys():
        return False
    if any(len(getattr(m, hooks)) for m in (a, b) for hooks in _HOOKS if hasattr(m, hooks)):
        return False
    plain_a, plain_b = _attributes(a), _attributes(b)
    if plain_a.keys() != plain_b.keys():
        return False
    for name, value in plain_a.items():
        if name == "layer_idx" and (value, plain_b[name]) == (a_index, b_index):
            continue
        if not _equal(value, plain_b[name]):
            return False
    return all(alike(a._modules[name], b._modules[name], a_index, b_index) for name in a._modules)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in _MODULE_DICTIONARIES} | {
        "training": module.training
    }


def _same_tensor_type(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.shape, a.dtype, a.stride(), type(a)) == (b.shape, b.dtype, b.stride(), type(b))


def _equal(a: Any, b: Any) -> bool:
    """Certainly equal: the same object, or plain data with equal contents."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return False


@contextmanager
def recording_layers(group: Group | None, markers: bool) -> Iterator[None]:
    """While it lasts, only the first layer of the group computes.

    `markers`: each other layer leaves a marker in the graph, so that chain() can see how layers are
    connected, and the last one computes too, to be compared with the first. Without, layers after
    the first return the first one's results; that is cheaper, and right once `wiring` is known.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    layers = group.layers if group is not None else []
    try:
        for index, layer in enumerate(layers):
            assert group is not None
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = _recorder(group, index, layer.forward, markers)
        yield
    finally:
        for layer, before in replaced:
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before


def _recorder(
    group: Group, index: int, original: Callable[..., Any], markers: bool
) -> Callable[..., Any]:
    """What stands for the layer's forward."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        ops = capture_ops.ops()
        leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=capture_ops.is_opaque)
        tensors = capture_ops.tensors_of(leaves)
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        seen = group.seen
        if index == 0:
            seen.clear()
            seen.update(tree=tree, others=others, inputs=tensors)
        elif tree != seen["tree"] or not _equal(others, seen["others"]):
            raise NotAlikeError(f"{group.prefix}: layer {index} is called with other arguments")
        elif [_shape(x) for x in tensors] != [_shape(x) for x in seen["inputs"]]:
            raise NotAlikeError(f"{group.prefix}: layer {index} is called with other shapes")
        if index != 0 and not (markers and index == group.last):
            if markers:
                results = ops.layer(tensors, seen["outputs"], index)
            else:
                _check_wiring(group, index, tensors)
                results = seen["outputs"]
            return _rebuild(seen["output_leaves"], seen["output_tree"], results)
        arguments, keywords = _rebuild(leaves, tree, ops.layer_begin(tensors, index))
        outputs, output_tree = pytree.tree_flatten(
            original(*arguments, **keywords), is_leaf=capture_ops.is_opaque
        )
        results = ops.layer_end(capture_ops.tensors_of(outputs), index)
        if index == 0:
            seen.update(outputs=results, output_leaves=outputs, output_tree=output_tree)
        elif output_tree != seen["output_tree"]:
            raise NotAlikeError(f"{group.prefix}: layer {index} returns something else")
        return _rebuild(outputs, output_tree, results)

    return forward


def _shape(tensor: torch.Tensor) -> Any:
    return tensor.shape, tensor.dtype


def _check_wiring(group: Group, index: int, tensors: list[torch.Tensor]) -> None:
    sources = {"out": group.seen["outputs"], "in": group.seen["inputs"]}
    for tensor, (kind, position) in zip(tensors, group.wiring, strict=True):
        if sources[kind][position] is not tensor:
            raise NotAlikeError(f"{group.prefix}: layer {index} is connected differently")


def _rebuild(leaves: list[Any], tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The tree with its tensors replaced, in order."""
    given = iter(tensors)
    filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, tree)


def chain(gm: GraphModule, group: Group) -> list[tuple[str, int]]:
    """How the layers are connected, from a graph with markers.

    Raises NotAlikeError unless each layer gets its tensors from the layer before it or from what
    the first layer got, all in the same way, and nobody but the next layer reads its results.
    """
    ops = capture_ops.ops()
    calls: dict[int, Node] = {}  # what gets the layer's inputs
    results: dict[Node, tuple[int, int]] = {}  # getitem node -> layer, position
    for node in gm.graph.nodes:
        if node.target in (ops.layer.default, ops.layer_begin.default):
            calls[node.args[-1]] = node
        elif node.target is operator.getitem:
            made = node.args[0]
            if made.target in (ops.layer.default, ops.layer_end.default):
                results[node] = (made.args[-1], node.args[1])
    first = {node: i for i, node in reversed(list(enumerate(calls[0].args[0])))}
    wirings = set()
    for index in range(1, len(group.layers)):
        wiring = []
        for node in calls[index].args[0]:
            if results.get(node, (None, 0))[0] == index - 1:
                wiring.append(("out", results[node][1]))
            elif node in first:
                wiring.append(("in", first[node]))
            else:
                raise NotAlikeError(f"{group.prefix}: layer {index} reads %{node.name}")
        wirings.add(tuple(wiring))
    if len(wirings) != 1:
        raise NotAlikeError(f"{group.prefix}: layers are connected differently")
    for node, (layer, _) in results.items():
        readers = {user for user in node.users if user is not calls.get(layer + 1)}
        # Markers name the first layer's results to know their shapes.
        readers = {user for user in readers if not (layer == 0 and _names_shape(user, node, ops))}
        if layer != group.last and readers:
            raise NotAlikeError(f"{group.prefix}: the result of layer {layer} is read elsewhere")
    return list(wirings.pop())


def _names_shape(user: Node, node: Node, ops: Any) -> bool:
    return user.target is ops.layer.default and node not in user.args[0]
