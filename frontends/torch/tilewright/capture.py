"""Capture: from a Dynamo graph, or from a function over fake tensors, to pre-dispatch ATen.

Pre-dispatch keeps the ops that matter whole (linear, scaled_dot_product_attention, silu, in-place
index_copy_); AOTAutograd would decompose and functionalise them.

Tested by tests/python/test_capture.py.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from tilewright.graph_text import UnsupportedError


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pauses Python's cycle collector. Capture makes many small objects beside torch's millions, so
    collections would take a fifth of its time (0.3 s of 1.4 s, SmolLM2-135M) and free nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undoes what the model assigns to its modules meanwhile: under a trace that is fake tensors.
    CTRL, for one, assigns a buffer in each forward."""
    tables = ("_parameters", "_buffers", "_modules")
    spaces = [
        space
        for module in list(model.modules())
        for space in (module.__dict__, *(module.__dict__[name] for name in tables))
    ]
    kept = [(space, dict(space)) for space in spaces]
    try:
        yield
    finally:
        for space, before in kept:
            for name in [name for name in space if name not in before]:
                del space[name]
            for name, value in before.items():
                if space.get(name) is not value:
                    space[name] = value


def trace(function: Callable[..., Any], fakes: Sequence[Any], fake_mode: Any) -> GraphModule:
    """`function` over `fakes` as a graph of pre-dispatch ATen.

    Real tensors that the function closes over (parameters) become attributes of the graph. Raises
    UnsupportedError with torch's message when the function cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with fake_mode, torch.no_grad():
            return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedError(f"the graph cannot be captured: {reason[0]}") from error


def from_dynamo(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """The graph that Dynamo hands to a backend, as pre-dispatch ATen.

    Dynamo gives real tensors, and its placeholders' own fakes belong to a mode that make_fx cannot
    share; so each input is made fake again with Dynamo's record of its symbols, as AOTAutograd
    does.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise UnsupportedError("called outside of torch.compile")
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes: list[Any] = []
    for value, node in zip(inputs, placeholders, strict=True):
        if isinstance(value, torch.Tensor):
            fakes.append(
                context.fake_mode.from_tensor(
                    value,
                    symbolic_context=context.tensor_to_context.get(value),
                    source=getattr(node, "_dynamo_source", None),
                )
            )
        else:
            fakes.append(node.meta.get("example_value", value))
    return trace(gm, fakes, context.fake_mode)


def written_placeholders(gm: GraphModule) -> set[int]:
    """Positions of the inputs whose memory the graph writes, through whatever view."""
    from tilewright.outputs import storage_key

    written: set[int] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, formal in zip(node.args, node.target._schema.arguments, strict=False):
            if formal.alias_info is not None and formal.alias_info.is_write:
                written.update(
                    storage_key(part.meta["val"])
                    for part in (argument if isinstance(argument, list | tuple) else [argument])
                    if isinstance(part, torch.fx.Node)
                )
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return {
        i
        for i, node in enumerate(placeholders)
        if isinstance(node.meta.get("val"), torch.Tensor)
        and storage_key(node.meta["val"]) in written
    }
