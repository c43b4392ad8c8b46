"""Layer groups: decoder layers that are captured once and stamped.

Layers of one nn.ModuleList form a group when they are made alike: same classes, same parameter
shapes and types, same attributes but for `layer_idx`. That alone proves nothing about what
`forward` computes, so the first and the last layer of a group are both captured, and their graphs
must be equal up to the names of their weights (model_capture.py); otherwise every layer is
captured.

Tested by tests/python/test_optimize.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
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
    prefix: str  # of the ModuleList, "model.layers"
    layers: list[nn.Module]
    _template: dict[str, Any] = field(default_factory=dict)

    def traced(self, index: int, both: bool) -> bool:
        return index == 0 or (both and index == len(self.layers) - 1)


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
def recording_layers(groups: list[Group], both: bool) -> Iterator[None]:
    """While it lasts, the groups' layers record markers; only the traced ones compute.

    `both`: the last layer computes too, to be compared with the first.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for group in groups:
            group._template.clear()
            for index, layer in enumerate(group.layers):
                replaced.append((layer, layer.__dict__.get("forward")))
                layer.__dict__["forward"] = _recorder(group, index, layer.forward, both)
        yield
    finally:
        for layer, before in replaced:
            if before is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = before


def _recorder(
    group: Group, index: int, original: Callable[..., Any], both: bool
) -> Callable[..., Any]:
    """The layer's forward between markers, or one marker instead of it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        ops = capture_ops.ops()
        leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=capture_ops.is_opaque)
        tensors = capture_ops.tensors_of(leaves)
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        template = group._template
        if index == 0:
            template.update(tree=tree, others=others)
        elif tree != template["tree"] or not _equal(others, template["others"]):
            raise NotAlikeError(f"{group.prefix}: layer {index} is called with other arguments")
        if not group.traced(index, both):
            results = ops.layer(tensors, template["outputs"], index)
            return _rebuild(template["output_leaves"], template["output_tree"], results)
        begun = ops.layer_begin(tensors, index)
        arguments, keywords = _rebuild(leaves, tree, begun)
        outputs, output_tree = pytree.tree_flatten(
            original(*arguments, **keywords), is_leaf=capture_ops.is_opaque
        )
        results = ops.layer_end(capture_ops.tensors_of(outputs), index)
        if index == 0:
            template.update(outputs=results, output_leaves=outputs, output_tree=output_tree)
        elif output_tree != template["output_tree"]:
            raise NotAlikeError(f"{group.prefix}: layer {index} returns something else")
        return _rebuild(outputs, output_tree, results)

    return forward


def _rebuild(leaves: list[Any], tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The tree with its tensors replaced, in order."""
    given = iter(tensors)
    filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, tree)
