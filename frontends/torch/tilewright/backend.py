"""The torch.compile backend `tilewright`.

It never raises (but with TILEWRIGHT_STRICT=1): a graph that we cannot take keeps Dynamo's own
`forward`, with the reason in the log and in `explain`. Parameters and buffers arrive as graph
inputs; they become constants, packed once per model, and every call checks that they are still the
same.

Tested by tests/python/test_backend.py, tests/python/test_bad_input.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright import capture, core, precompiled, routing
from tilewright.graph_text import UnsupportedError
from tilewright.lower import lower
from tilewright.program import Executable

# Every graph that Dynamo gave us and that is still alive, for explain().
graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def calls() -> int:
    """How often a graph of ours was called so far."""
    return sum(graph.calls for graph in list(graphs))


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Dynamo's contract: a callable with the graph's inputs and results.

    `mode` and `options` are Inductor's; transformers passes them to every backend, so they are
    accepted, and mean nothing here.
    """
    graph = CompiledGraph(gm, example_inputs)
    try:
        graph.compile(example_inputs)
    except Exception as error:
        if core.settings()["strict"]:
            raise
        graph.decline(first_line(error))
    precompiled.record(gm, graph)
    return graph


class CompiledGraph(precompiled.SerializableCallable):
    """What Dynamo calls instead of one graph; saved and loaded as precompiled.py says.
    Thread-safe."""

    def __init__(self, gm: Any, inputs: Sequence[Any]) -> None:
        """`gm.forward` takes the graph's inputs and is what runs if we cannot."""
        self._gm = gm
        self.executable: Executable | None = None
        self._saved: precompiled.SavedGraph | None = None  # until the first call after loading
        self._others: list[Executable] = []  # the same program, of other models' weights
        self._lock = threading.RLock()
        self.reason = ""  # why torch runs this graph
        self.calls = 0
        self.fallback_calls = 0
        self.refreshes = 0
        self._parameters = weakref.WeakSet([x for x in inputs if isinstance(x, torch.nn.Parameter)])
        self._frozen: dict[int, str] = {}
        self._attributes: dict[str, torch.Tensor] = {}
        graphs.add(self)

    @classmethod
    def serialize_compile_artifacts(cls, fn: CompiledGraph) -> bytes:
        """Raises RuntimeError if it cannot be saved."""
        with fn._lock:
            lowered = None if fn.executable is None else fn.executable.lowered
            saved = fn._saved or precompiled.saved_graph(
                fn._gm, fn.reason, lowered, fn._frozen, fn._attributes
            )
        return saved.dumps()

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> CompiledGraph:
        saved = precompiled.loads(data)
        graph = cls(precompiled.SavedForward(saved.original), ())
        if reason := saved.unusable():
            if core.settings()["strict"]:
                raise UnsupportedError(reason)
            graph.decline(reason)
        else:
            graph._saved, graph._frozen = saved, saved.frozen
            graph._attributes = saved.attributes
        return graph

    def compile(self, inputs: Sequence[Any]) -> None:
        """Raises the reason why it cannot."""
        if reason := core.unavailable():
            raise UnsupportedError(reason)
        check_inputs(inputs)
        captured = capture.from_dynamo(self._gm, inputs)
        placeholders = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        written = capture.written_placeholders(captured)
        names = {
            i: constant_name(node)
            for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
            if i not in written and is_constant(node, value)
        }
        self.adopt(captured, inputs, names)

    def adopt(self, captured: GraphModule, inputs: Sequence[Any], names: dict[int, str]) -> None:
        """Takes pre-dispatch ATen; `names`: of the inputs that are constants, by position."""
        lowered = lower(captured, "graph", {i: (name, inputs[i]) for i, name in names.items()})
        self._frozen = {i: name for i, name in names.items() if name in lowered.constants}
        self._attributes = {
            name: tensor
            for name, tensor in lowered.constants.items()
            if name not in self._frozen.values()
        }
        self.executable = Executable(lowered, self._constants(inputs))

    def _open(self, saved: precompiled.SavedGraph, arguments: Sequence[Any]) -> None:
        """After loading, at the first call. Raises the reason why it cannot."""
        if reason := core.unavailable():
            raise UnsupportedError(reason)
        check_inputs(arguments)
        for each in arguments:
            if isinstance(each, torch.nn.Parameter):
                self._parameters.add(each)
        constants = self._constants(arguments)
        self.executable = Executable(saved.with_constants(constants), constants)

    def decline(self, reason: str) -> None:
        self.reason = reason
        core.say_fallback("a graph", reason)

    def owns(self, parameter_ids: set[int]) -> bool:
        """Whether this graph belongs to the model with these parameters."""
        return any(id(parameter) in parameter_ids for parameter in self._parameters)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self._saved is not None:
            with self._lock:
                try:
                    if self._saved is not None:  # still, after other threads' calls
                        self._open(self._saved, arguments)
                except (UnsupportedError, core.CoreError) as error:
                    if core.settings()["strict"]:
                        raise
                    self.decline(first_line(error))
                finally:
                    self._saved = None  # only now: nobody may find neither
        if self.executable is not None:
            with self._lock:
                if self.executable is not None:  # still, after other threads' calls
                    try:
                        return self._of_weights(self.executable, arguments).call(arguments)
                    except UnsupportedError as error:  # of these sizes; nothing has run
                        if core.settings()["strict"]:
                            raise
                        self.decline(str(error))
                    except core.CoreError as error:
                        if core.settings()["strict"] or self.executable.lowered.mutated:
                            raise
                        self.executable = None
                        self._others = []
                        self.decline(f"the program failed: {error}")
        self.fallback_calls += 1
        return self._gm.forward(*arguments)

    def _constants(self, arguments: Sequence[Any]) -> dict[str, torch.Tensor]:
        given = {name: arguments[i] for i, name in self._frozen.items()}
        return {**self._attributes, **given}

    def _of_weights(self, executable: Executable, arguments: Sequence[Any]) -> Executable:
        """The program of the call's weights, which becomes the current one.

        Dynamo shares a graph between models of one class, so each gets a program of its own;
        weights that were replaced or written since are packed again.
        """
        names = self._frozen.items()

        def has_these(candidate: Executable) -> bool:
            return all(candidate.weights.same(name, arguments[i]) for i, name in names)

        def is_of_this_model(candidate: Executable) -> bool:
            return any(candidate.weights.is_of(name, arguments[i]) for i, name in names)

        stale = False
        if not has_these(executable):
            known = [executable, *(other for other in self._others if other.weights.alive())]
            found = next(filter(has_these, known), None)
            if found is None:
                found = next(filter(is_of_this_model, known), None)
                stale = found is not None or not executable.weights.alive()
            if found is None:
                found = executable if stale else executable.of_weights(self._constants(arguments))
            self._others = [other for other in known if other is not found]
            self.executable = executable = found
        if not stale and not executable.is_decode(executable.lowered.symbols(arguments)):
            stale = executable.weights.contents_changed()
        if stale:
            self.refreshes += 1
            executable.bind(self._constants(arguments))
        return executable


def check_inputs(inputs: Sequence[Any]) -> None:
    """Raises UnsupportedError for what this backend leaves to torch."""
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("autocast is active")
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedError(
            "gradients are enabled; call the model under torch.no_grad() or inference_mode()"
        )
    for x in tensors:
        if type(x) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise UnsupportedError(f"an input is a {type(x).__name__}")
        if x.layout != torch.strided:
            raise UnsupportedError(f"an input has layout {x.layout}")
        if x.device.type != "cpu":
            raise UnsupportedError(f"an input is on device {x.device}")
        if x.is_complex() or x.is_quantized:
            raise UnsupportedError(f"an input has type {x.dtype}")


def _source_name(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    name = source.name
    return str(name() if callable(name) else name)


def is_constant(node: Node, value: Any) -> bool:
    """Parameters, and buffers of modules. Not every static address: KV caches have those too."""
    if isinstance(value, torch.nn.Parameter):
        return True
    return isinstance(value, torch.Tensor) and "._buffers[" in _source_name(node)


def constant_name(node: Node) -> str:
    """`L['self']._modules['lm_head']._parameters['weight']` -> `lm_head.weight`."""
    parts = _source_name(node).split("['")
    names = [part.split("']")[0] for part in parts[1:]]
    return ".".join(names[1:]) or node.name


def first_line(error: Exception) -> str:
    """The reason that a user reads."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


routing.install()
