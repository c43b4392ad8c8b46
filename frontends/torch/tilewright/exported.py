"""optimize(): programs of torch.export, and TorchScript modules, in our code.

    fast = tilewright.optimize(torch.export.load("model.pt2"))
    fast = tilewright.optimize(torch.jit.load("model.pt"))

Both come to the same pre-dispatch ATen as graphs of torch.compile. Calls that we cannot take go to
the original, with the reason in the log and in `explain`; so do inputs outside of what a program
was exported for, which the original refuses in torch's words.

Tested by tests/python/test_frontends.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tilewright import capture, core, torchscript
from tilewright.backend import CompiledGraph, check_inputs, first_line
from tilewright.dims import Dim
from tilewright.graph_text import UnsupportedError
from tilewright.lower import lower
from tilewright.lowered import Lowered
from tilewright.outputs import storage_key

MAX_PROGRAMS = 16  # per TorchScript module: one for each signature of shapes


def optimize(program: Any) -> Optimized:
    """`program`: a torch.export.ExportedProgram or a torch.jit.ScriptModule, traced or scripted.

    Returns a module with its call surface. Compiling happens at the first call (of each signature
    of shapes, for TorchScript). TypeError for anything else. Thread-safe to call.
    """
    if isinstance(program, torch.export.ExportedProgram):
        return OptimizedExport(program)
    if isinstance(program, torch.jit.ScriptModule):
        return OptimizedScript(program)
    raise TypeError(
        "optimize takes a torch.export.ExportedProgram or a torch.jit.ScriptModule; for an "
        'nn.Module use tilewright.llm.optimize or torch.compile(model, backend="tilewright")'
    )


class _Original:
    """The original over the flat inputs of a program, whose first `skip` are constants."""

    def __init__(self, call: Callable[..., Any], skip: int) -> None:
        self._call, self._skip = call, skip

    def forward(self, *flat: Any) -> Any:
        return self._call(*flat[self._skip :])


class Optimized(nn.Module):
    """What optimize() returns. `graphs` are its programs."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.graphs: list[CompiledGraph] = []
        self._lock = threading.RLock()

    def _decline(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the original; the reason is counted."""
        with self._lock:
            graph = next((g for g in self.graphs if g.reason == reason), None)
            if graph is None:
                graph = CompiledGraph(None, ())
                graph.decline(reason)
                self.graphs.append(graph)
            graph.calls += 1
            graph.fallback_calls += 1
        return self.original(*args, **kwargs)

    def _compile(
        self,
        function: Callable[..., Any],
        fakes: Sequence[Any],
        fake_mode: Any,
        tensors: Mapping[str, torch.Tensor],
        inputs: Sequence[Any],
        original: Callable[..., Any],
    ) -> CompiledGraph:
        """`function` takes the constants `tensors`, then `inputs`, and returns a flat list."""
        if reason := core.unavailable():
            raise UnsupportedError(reason)
        captured, names = _trace(function, fakes, fake_mode, tensors)
        values = [*tensors.values(), *inputs]
        graph = CompiledGraph(_Original(original, len(tensors)), values)
        graph.adopt(captured, values, names)
        self.graphs.append(graph)
        return graph


def _trace(
    function: Callable[..., Any],
    fakes: Sequence[Any],
    fake_mode: Any,
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.fx.GraphModule, dict[int, str]]:
    """The graph, and the names of its first placeholders, which are the constants `tensors`."""
    captured = capture.trace(function, fakes, fake_mode)
    names = dict(enumerate(tensors))
    written = capture.written_placeholders(captured) & names.keys()
    if written:
        raise UnsupportedError(f"it writes its own {names[min(written)]}")
    return captured, names


def _refusal(inputs: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Why this call is torch's, if it is."""
    try:
        check_inputs([*inputs, *tensors.values()])
    except UnsupportedError as error:
        return str(error)
    return ""


def _shares_written(graph: CompiledGraph, inputs: Sequence[Any]) -> bool:
    """The program writes an input, and two inputs share memory: it was captured without that."""
    if graph.executable is None or not graph.executable.lowered.mutated:
        return False
    keys = [storage_key(x) for x in inputs if isinstance(x, torch.Tensor)]
    return len(set(keys)) < len(keys)


class OptimizedExport(Optimized):
    """One program for all sizes that the exported program allows."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__(program.module())
        self._program = program
        self._graph: CompiledGraph | None = None
        self._reason = ""
        self._guards: list[Any] = []

    def train(self, mode: bool = True) -> OptimizedExport:
        """An exported program has one mode, that of its export."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._program.call_spec.in_spec
        assert spec is not None
        if tuple(kwargs) != tuple(spec.child(1).context or ()):
            order = [name for name in spec.child(1).context or () if name in kwargs]
            kwargs = {name: kwargs[name] for name in order} if len(order) == len(kwargs) else kwargs
        flat, given = pytree.tree_flatten((args, kwargs))
        if given != spec:
            return self._decline("inputs of another structure", *args, **kwargs)
        tensors = self._tensors()
        refusal = _refusal(flat, tensors)
        if refusal:
            return self._decline(refusal, *args, **kwargs)
        with self._lock:
            if self._graph is None and not self._reason:
                try:
                    self._graph = self._build(flat, tensors)
                except Exception as error:
                    if core.settings()["strict"]:
                        raise
                    self._reason = first_line(error)
        if self._graph is None:
            return self._decline(self._reason, *args, **kwargs)
        if _shares_written(self._graph, flat) or not self._fits(flat):
            return self._decline("inputs that it was not exported for", *args, **kwargs)
        leaves = self._graph(*tensors.values(), *flat)
        assert self._program.call_spec.out_spec is not None
        return pytree.tree_unflatten(leaves, self._program.call_spec.out_spec)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Lifted parameters, buffers and constants, in the order of the graph's inputs."""
        found: dict[str, torch.Tensor] = {}
        for spec in self._program.graph_signature.input_specs:
            if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
                continue
            target = str(spec.target)
            value = self._program.state_dict.get(target)
            found[target] = self._program.constants[target] if value is None else value
        return found

    def _inputs(self) -> tuple[list[Any], Any]:
        """Of the graph, lifted tensors first, as fakes; and their mode. UnsupportedError for what
        no program of ours returns."""
        for spec in self._program.graph_signature.output_specs:
            if spec.kind != torch.export.graph_signature.OutputKind.USER_OUTPUT:
                raise UnsupportedError(f"it has an output of kind {spec.kind.name}")
        nodes = [n for n in self._program.graph.nodes if n.op == "placeholder"]
        fakes = [node.meta["val"] for node in nodes]
        modes = [x.fake_mode for x in fakes if hasattr(x, "fake_mode")]
        if not modes:
            raise UnsupportedError("a program without tensors")
        return fakes, modes[0]

    def _run_graph(self, *values: Any) -> list[Any]:
        return list(torch.fx.Interpreter(self._program.graph_module).run(*values))

    def lowered(self) -> Lowered:
        """What would be compiled, for prewarm: nothing is packed. Raises UnsupportedError."""
        fakes, mode = self._inputs()
        tensors = self._tensors()
        captured, names = _trace(self._run_graph, fakes, mode, tensors)
        values = [*tensors.values(), *fakes[len(tensors) :]]
        return lower(captured, "graph", {i: (name, values[i]) for i, name in names.items()})

    def _build(self, flat: list[Any], tensors: dict[str, torch.Tensor]) -> CompiledGraph:
        fakes, mode = self._inputs()
        shape_env = mode.shape_env
        before = len(shape_env.guards) if shape_env is not None else 0
        graph = self._compile(
            self._run_graph,
            fakes,
            mode,
            tensors,
            flat,
            lambda *values: pytree.tree_leaves(self._original_flat(values)),
        )
        self._fakes = fakes[len(tensors) :]
        lowered = graph.executable.lowered if graph.executable is not None else None
        self._needs_row_major = lowered is not None and (
            bool(lowered.mutated) or any(o.kind == "view_of_input" for o in lowered.outputs)
        )
        tensors_in = [fake for fake in self._fakes if isinstance(fake, torch.Tensor)]
        if self._needs_row_major and not all(fake.is_contiguous() for fake in tensors_in):
            self.graphs.remove(graph)
            raise UnsupportedError("it writes or returns an input that is not row-major")
        self._guards = [g.expr for g in shape_env.guards[before:]] if shape_env is not None else []
        return graph

    def _original_flat(self, values: Sequence[Any]) -> Any:
        assert self._program.call_spec.in_spec is not None
        args, kwargs = pytree.tree_unflatten(list(values), self._program.call_spec.in_spec)
        return self.original(*args, **kwargs)

    def _fits(self, flat: Sequence[Any]) -> bool:
        """Types, sizes, ranges and what the capture assumed of symbols."""
        symbols: dict[str, int] = {}
        pairs: list[tuple[Dim, int]] = []
        for fake, value in zip(self._fakes, flat, strict=True):
            if not isinstance(fake, torch.Tensor):
                if isinstance(fake, torch.SymInt):
                    pairs.append((Dim.of(fake), value))
                elif fake != value:
                    return False
                continue
            if not isinstance(value, torch.Tensor) or fake.dtype != value.dtype:
                return False
            if fake.dim() != value.dim() or (self._needs_row_major and not value.is_contiguous()):
                return False
            pairs += [(Dim.of(d), n) for d, n in zip(fake.shape, value.shape, strict=True)]
        for size, number in pairs:
            for name in size.symbols():
                if size == Dim.symbol(name):
                    symbols.setdefault(name, number)
        try:
            if any(size.evaluate(symbols) != number for size, number in pairs):
                return False
        except KeyError:
            return False
        for symbol, limits in self._program.range_constraints.items():
            actual = symbols.get(str(symbol))
            if actual is not None and not bool(limits.lower <= actual <= limits.upper):
                return False
        return all(
            bool(guard.xreplace({s: symbols[s.name] for s in guard.free_symbols}))
            for guard in self._guards
        )


class OptimizedScript(Optimized):
    """One program for each signature of shapes, MAX_PROGRAMS at most."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__(module)
        self._script = torchscript.inlined_graph(module)
        self._read = torchscript.constants(module, self._script)
        self._programs: dict[Any, tuple[CompiledGraph | None, Any]] = {}
        self._attributes: list[tuple[Any, str, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            values = self._bind(args, kwargs)
        except UnsupportedError as error:
            return self._decline(str(error), *args, **kwargs)
        flat, tree = pytree.tree_flatten(values)
        tensors = self._tensors()
        refusal = _refusal(flat, tensors)
        if refusal:
            return self._decline(refusal, *args, **kwargs)
        key = (str(tree), tuple(map(_signature, flat)))
        with self._lock:
            if any(getattr(owner, name) != value for owner, name, value in self._attributes):
                self._forget_programs()
            if key not in self._programs:
                if len(self._programs) >= MAX_PROGRAMS:
                    reason = f"more than {MAX_PROGRAMS} signatures of shapes"
                    return self._decline(reason, *args, **kwargs)
                try:
                    self._programs[key] = self._build(flat, tree, tensors)
                except Exception as error:
                    if core.settings()["strict"]:
                        raise
                    self._programs[key] = (None, first_line(error))
            graph, detail = self._programs[key]
        if graph is None:
            return self._decline(detail, *args, **kwargs)
        if _shares_written(graph, flat):
            return self._decline("it writes an input that shares memory", *args, **kwargs)
        return pytree.tree_unflatten(graph(*tensors.values(), *flat), detail)

    def _forget_programs(self) -> None:
        """A number, flag or mode that they were made with has changed."""
        used = [graph for graph, _ in self._programs.values() if graph is not None]
        self.graphs = [graph for graph in self.graphs if graph not in used]
        self._programs.clear()
        self._attributes.clear()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """As they are now: a parameter may have been replaced."""
        now = {**dict(self.original.named_parameters()), **dict(self.original.named_buffers())}
        return {name: now.get(name, tensor) for name, tensor in self._read.items()}

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        script: Any = self.original
        formals = script.forward.schema.arguments[1:]
        bound = list(args)
        for formal in formals[len(args) :]:
            if formal.name in kwargs:
                bound.append(kwargs[formal.name])
            elif formal.has_default_value():
                bound.append(formal.default_value)
        if len(bound) != len(formals) or len(args) + len(kwargs) > len(formals):
            raise UnsupportedError("arguments that forward does not take")
        return bound

    def _build(
        self, flat: list[Any], tree: Any, tensors: dict[str, torch.Tensor]
    ) -> tuple[CompiledGraph, Any]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
        everything = [*tensors.values(), *flat]
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in everything]
        trees: list[Any] = []

        def run(*values: Any) -> list[Any]:
            named = dict(zip(tensors, values, strict=False))
            interpreter = torchscript.Interpreter(self.original, self._script, named)
            inputs = pytree.tree_unflatten(list(values[len(tensors) :]), tree)
            leaves, result = pytree.tree_flatten(interpreter.run(inputs))
            self._attributes += interpreter.attributes
            trees.append(result)
            return leaves

        def original(*values: Any) -> list[Any]:
            return pytree.tree_leaves(self.original(*pytree.tree_unflatten(list(values), tree)))

        graph = self._compile(run, fakes, mode, tensors, flat, original)
        return graph, trees[-1]


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.stride())
    return (type(value).__name__, value)
