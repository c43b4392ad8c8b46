"""Compiled graphs in the files of torch's precompile: a later process calls them without Dynamo.

    compiled = torch.compile(step, fullgraph=True, backend="tilewright")
    compiled.aot_compile(((model, tokens), {})).save_compiled_function(path)
    torch.compiler.load_compiled_function(file)(model, tokens)               # in another process

and TORCH_CACHING_PRECOMPILE=1 with `torch.compiler.save_cache_artifacts()`. Both ask a backend for
bytes and give them back (SerializableCallable of torch/_dynamo/aot_compile_types.py,
BackendCacheArtifact of precompile_context.py); guards, system and Python versions are torch's to
check. In the bytes: what lowering found of the graph, without weights, which arrive as arguments
again, and torch's own form of the graph, for what we cannot run. No machine code: kernels come from
the cache, or are made for the CPU at hand.

The bytes are a pickle inside of torch's, to be trusted as that file is. Tested by
tests/python/test_precompiled.py.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from tilewright import core
from tilewright.identity import package_digest
from tilewright.lowered import Lowered

if TYPE_CHECKING:
    from tilewright.backend import CompiledGraph

try:  # where torch has no such thing, nothing is saved
    from torch._dynamo import config, precompile_context
    from torch._dynamo.aot_compile_types import (
        GraphModuleSerializableCallable,
        SerializableCallable,
    )
    from torch._dynamo.precompile_context import BackendCacheArtifact

    AVAILABLE = True
except ImportError:
    SerializableCallable = BackendCacheArtifact = object
    AVAILABLE = False


@dataclasses.dataclass(eq=False)
class SavedGraph:
    """What a CompiledGraph needs in another process."""

    build: str  # of whom saved it
    reason: str  # why torch ran this graph, or ""
    lowered: Lowered | None  # without tensors and output_tree; None with a reason
    output_tree: str  # torch's text
    constants: tuple[str, ...]  # names
    frozen: dict[int, str]  # which arguments are constants
    attributes: dict[str, torch.Tensor]  # constants that are no argument
    original: bytes  # torch's

    def unusable(self) -> str:
        """Why torch has to run this graph, or ""."""
        if self.build != _build():
            return "saved by another build of Tilewright: compile and save it again"
        return self.reason

    def dumps(self) -> bytes:
        """Raises RuntimeError if it cannot be saved."""
        try:
            # Another build can read what torch needs, whatever it makes of the rest.
            own = pickle.dumps(dataclasses.replace(self, original=b""))
            return pickle.dumps((self.build, self.original, own))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RuntimeError(f"this graph cannot be saved: {error}") from error

    def with_constants(self, tensors: dict[str, torch.Tensor]) -> Lowered:
        assert self.lowered is not None
        return dataclasses.replace(
            self.lowered,
            constants={name: tensors[name] for name in self.constants},
            output_tree=pytree.treespec_loads(self.output_tree),
        )


class SavedForward:
    """The graph as torch runs it, read when it is needed first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._graph: Callable[..., Any] | None = None

    def forward(self, *arguments: Any) -> Any:
        if self._graph is None:
            self._graph = GraphModuleSerializableCallable.deserialize_compile_artifacts(self._data)
        return self._graph(*arguments)


def _build() -> str:
    """Changes with the text of graphs, and with what is made of them here and in the core."""
    return f"{core.engine().plan_key('a saved graph')}\n{package_digest()}"


def saved_graph(
    original: GraphModule | SavedForward,
    reason: str,
    lowered: Lowered | None,
    frozen: dict[int, str],
    attributes: dict[str, torch.Tensor],
) -> SavedGraph:
    """Of a CompiledGraph that has been compiled, or says why not."""
    if isinstance(original, SavedForward):
        data = original._data
    else:
        # Torch strips the graph's nodes; those that Dynamo gave us stay as they are.
        graph = Graph()
        graph.output(graph.graph_copy(original.graph, {}))
        stripped = GraphModuleSerializableCallable(GraphModule(original, graph))
        data = GraphModuleSerializableCallable.serialize_compile_artifacts(stripped)
    return SavedGraph(
        build=_build(),
        reason=reason,
        lowered=lowered and dataclasses.replace(lowered, constants={}, output_tree=None),
        output_tree="" if lowered is None else pytree.treespec_dumps(lowered.output_tree),
        constants=() if lowered is None else tuple([*frozen.values(), *attributes]),
        frozen=frozen,
        attributes={name: tensor.detach().clone() for name, tensor in attributes.items()},
        original=data,
    )


def loads(data: bytes) -> SavedGraph:
    build, original, own = pickle.loads(data)
    if build != _build():
        return SavedGraph(build, "", None, "", (), {}, {}, original)
    saved = pickle.loads(own)
    assert isinstance(saved, SavedGraph)
    return dataclasses.replace(saved, original=original)


class GraphArtifact(BackendCacheArtifact):
    """A graph in torch's own cache of compiled functions."""

    def after_deserialization(self) -> CompiledGraph:
        from tilewright.backend import CompiledGraph

        return CompiledGraph.deserialize_compile_artifacts(self.content)


def record(gm: GraphModule, graph: CompiledGraph) -> None:
    """For TORCH_CACHING_PRECOMPILE=1, if that is set: what cannot be saved is not."""
    if not AVAILABLE or not config.caching_precompile or "backend_id" not in gm.meta:
        return
    try:
        content = type(graph).serialize_compile_artifacts(graph)
    except RuntimeError as error:
        core.log.info("not precompiled: %s", error)
        return
    precompile_context.PrecompileContext.record_artifact(
        GraphArtifact(key=gm.meta["backend_id"], content=content)
    )
