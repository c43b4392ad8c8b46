"""Plans: what capture and the passes made of a model, kept in the cache for later processes.

A plan is text: a line of JSON with what the front end must know (names, types, literals), then the
graph after the passes. It is found by a digest of all that capture reads (identity.py), so that a
process whose model has a plan neither traces it nor runs a pass. The store verifies the bytes
(cache/README.md); what does not parse is a counted reject, and the model is captured.

Nothing here fails: without a plan a model is captured as ever. Thread-safe as far as
`capture_model` is. Tested by tests/python/test_plans.py.
"""

from __future__ import annotations

import base64
import collections
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tilewright import core, identity
from tilewright.capture import no_collection
from tilewright.dims import Dim
from tilewright.graph_text import DTYPE_NAMES, DTYPES, Type
from tilewright.lowered import CacheShape, CapturedModel, Lowered, lowered_model

_MOST_LITERAL_BYTES = 1 << 20  # of a plan; a model with more numbers in its code is captured
# In the text of a graph: names, type, shape.
_CONSTANT = re.compile(r'= const "([^"]*)"(?: {[^}]*})? : (\w+)\[([^\]]*)\]')
_FIELDS = frozenset({"output", "caches", "results", "constants", "literals", "externals"})

Built = TypeVar("Built")

_lock = threading.Lock()
_counts: collections.Counter[str] = collections.Counter()
_seconds = {"plan": 0.0, "capture": 0.0}
_unplanned: collections.Counter[str] = collections.Counter()


class MalformedPlanError(Exception):
    """Text that no plan has; the message says where."""


class RefusedPlanError(core.CoreError):
    """The core refuses a plan's graph, and the plan is gone; the message says why."""


class UnplannableError(Exception):
    """A captured model that cannot be written down."""


def counters() -> dict[str, Any]:
    """Of this process: models captured, and loaded from plans; plans that differed under
    TILEWRIGHT_CACHE_CHECK; seconds to look for plans and read them, and to capture (with passes);
    by reason, models that have no plan and plans that were not used (unplanned)."""
    with _lock:
        counts = {name: _counts[name] for name in ("captured", "loaded", "check_failures")}
        seconds = {f"{name}_seconds": spent for name, spent in _seconds.items()}
        return counts | seconds | {"unplanned": dict(_unplanned)}


def planned_model(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    build: Callable[[CapturedModel], Built],
    engine: Any = None,
    may_load: bool = True,
    stored: torch.dtype | None = None,
) -> Built:
    """What `build` makes of the model's graph, after the passes: from a plan, if there is one and
    it may be loaded, else captured as by `capture_model` and, in a writable cache, kept as a plan.

    engine: whose cache and passes, the process's if None. stored: as of `capture_model`. Raises
    UnsupportedError, CoreError if the passes refuse the graph, and what `build` raises;
    RefusedPlanError instead of a CoreError where the graph is a plan's: `build` may have gone half
    its way, so the caller starts again.
    """
    engine = engine or core.engine()
    with _timed("plan"), no_collection():
        key = engine.keeps_plans() and plan_key(model, forward, logits_to_keep, engine, stored)
        kept = engine.load_plan(key) if key and may_load else None
    if kept is not None and not core.settings()["cache_check"]:
        try:
            with _timed("plan"):
                planned = decode(kept, named_tensors(model), logits_to_keep)
            built = build(planned)
            _count("loaded")
            return built
        except MalformedPlanError as reason:
            _drop(engine, key, f"malformed plan: {reason}")
            kept = None
        except core.CoreError as reason:
            _drop(engine, key, f"refused plan: {reason}")
            raise RefusedPlanError(str(reason)) from None
    with _timed("capture"):
        from tilewright.model_capture import capture_model

        captured = capture_model(model, forward, logits_to_keep, stored)
        captured.lowered.text = engine.optimize(captured.lowered.text)
        captured.lowered.has_passed = True
    _count("captured")
    text = _text_of(captured, model) if key else ""
    built = build(captured)
    if text and text != kept:
        if kept is not None:
            _replace(engine, key, model)
        engine.save_plan(key, f"plan_{type(model).__name__}", text)
    return built


def plan_key(
    model: nn.Module,
    forward: Callable[..., Any],
    logits_to_keep: int,
    engine: Any,
    stored: torch.dtype | None = None,
) -> str:
    """The key text of a model's plan; "" if it can have none."""
    try:
        digest = identity.digest_of(model, forward, logits_to_keep)
    except identity.UncertainError as reason:
        _unplan(f"{type(model).__name__}: {reason}")
        return ""
    caches = f" caches {DTYPE_NAMES[stored]}" if stored is not None else ""
    of_what = f"model {type(model).__qualname__} logits {logits_to_keep}{caches}"
    return str(engine.plan_key(f"{of_what}\n{digest}\n"))


def _text_of(captured: CapturedModel, model: nn.Module) -> str:
    """The plan, or "" if there can be none."""
    try:
        return encode(captured)
    except UnplannableError as reason:
        _unplan(f"{type(model).__name__}: {reason}")
        return ""


def _drop(engine: Any, key: str, reason: str) -> None:
    _unplan(reason)
    engine.remove_plan(key)


def _replace(engine: Any, key: str, model: nn.Module) -> None:
    """Makes room for a plan that is not what the cache has."""
    core.say_once(
        f"cache check: the plan of {type(model).__name__} differs from what is captured; "
        "using what is captured"
    )
    _count("check_failures")
    engine.remove_plan(key)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        with _lock:
            _seconds[what] += time.perf_counter() - begin


def _count(what: str) -> None:
    with _lock:
        _counts[what] += 1


def _unplan(reason: str) -> None:
    with _lock:
        _unplanned[reason] += 1
    core.log.info("no plan: %s", reason)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a plan calls by name; the rest of its constants are in it."""
    return dict((*model.named_parameters(), *model.named_buffers()))


# --- text


def encode(captured: CapturedModel) -> str:
    """The plan's text. Raises UnplannableError."""
    lowered, literals = captured.lowered, captured.literals
    if any(isinstance(tensor, nn.Parameter) for tensor in literals.values()):
        raise UnplannableError("a weight that no module names")
    if sum(t.numel() * t.element_size() for t in literals.values()) > _MOST_LITERAL_BYTES:
        raise UnplannableError("its code has too many numbers")
    head = {
        "output": [captured.output_type.__module__, captured.output_type.__qualname__],
        "caches": [
            [
                shape.layer,
                shape.kv_heads,
                shape.head_dim,
                DTYPE_NAMES[shape.dtype],
                DTYPE_NAMES[shape.stored],
            ]
            for shape in captured.caches
        ],
        "results": [
            [DTYPE_NAMES[type_.dtype], [_encode_dim(size) for size in type_.shape]]
            for type_ in lowered.results
        ],
        "constants": [name for name in lowered.constants if name not in literals],
        "literals": {name: _encode_tensor(tensor) for name, tensor in literals.items()},
        "externals": [list(external) for external in lowered.externals],
    }
    return json.dumps(head, separators=(",", ":")) + "\n" + lowered.text


def decode(text: str, named: Mapping[str, torch.Tensor], logits_to_keep: int) -> CapturedModel:
    """A plan for a model with these tensors. Raises MalformedPlanError."""
    with _as_malformed():
        head, lowered, literals = _decoded(text, named, logits_to_keep)
        caches = [
            CacheShape(int(layer), int(heads), int(size), DTYPES[dtype], DTYPES[stored])
            for layer, heads, size, dtype, stored in head["caches"]
        ]
        return CapturedModel(lowered, _output_type(*head["output"]), caches, literals)


def decode_without_model(text: str, logits_to_keep: int) -> Lowered:
    """The program of a plan alone, to prewarm: its weights are memory that nobody touches. Raises
    MalformedPlanError."""
    with _as_malformed():
        _, lowered, _ = _decoded(text, _stand_ins(text), logits_to_keep)
        return lowered


def _decoded(
    text: str, named: Mapping[str, torch.Tensor], logits_to_keep: int
) -> tuple[dict[str, Any], Lowered, dict[str, torch.Tensor]]:
    """The line of JSON, the program, and its literals."""
    line, _, graph = text.partition("\n")
    head = json.loads(line)
    if head.keys() != _FIELDS:
        raise MalformedPlanError("other fields")
    constants = {name: named[name] for name in head["constants"]}
    literals = {name: _decode_tensor(*kept) for name, kept in head["literals"].items()}
    lowered = lowered_model(
        graph,
        constants | literals,
        [
            Type(DTYPES[dtype], tuple(_decode_dim(size) for size in shape))
            for dtype, shape in head["results"]
        ],
        [(str(function), str(reason)) for function, reason in head["externals"]],
        logits_to_keep,
    )
    lowered.has_passed = True
    return head, lowered, literals


def _stand_ins(text: str) -> dict[str, torch.Tensor]:
    """Tensors as the graph states them, empty ones for those that the passes left out. Of several
    that are joined it states the sum of the rows, and no kernel depends on more: all but the first
    get one each."""
    found: dict[str, torch.Tensor] = collections.defaultdict(lambda: torch.empty(0))
    for names, dtype, shape in sorted(_CONSTANT.findall(text), key=lambda c: c[0].count(";")):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        parts = collections.Counter(names.split(";"))
        first, *others = [name for name in parts if name not in found] or [""]
        if not first:
            continue
        for name in others:
            found[name] = torch.empty([1, *sizes[1:]], dtype=DTYPES[dtype])
        if sizes:
            rows = sum(count * len(found[name]) for name, count in parts.items() if name != first)
            sizes[0] = (sizes[0] - rows) // parts[first]
        found[first] = torch.empty(sizes, dtype=DTYPES[dtype])
    return found


@contextmanager
def _as_malformed() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise MalformedPlanError(f"{type(error).__name__}: {error}") from None


def _output_type(module: str, name: str) -> type:
    """Of a module that the model has loaded already: a plan imports nothing."""
    from transformers.utils import ModelOutput

    found = getattr(sys.modules[module], name)
    if not (isinstance(found, type) and issubclass(found, ModelOutput)):
        raise MalformedPlanError("an output that is none")
    return found


def _encode_dim(size: Dim) -> list[Any]:
    return [[list(product), factor] for product, factor in size.terms]


def _decode_dim(terms: list[Any]) -> Dim:
    return Dim(tuple((tuple(map(str, product)), int(factor)) for product, factor in terms))


def _encode_tensor(tensor: torch.Tensor) -> list[Any]:
    data = tensor.detach().contiguous().view(-1)
    data = data.view(torch.uint8) if data.numel() else data.to(torch.uint8)
    encoded = base64.b64encode(data.numpy().tobytes()).decode()
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), encoded]


def _decode_tensor(dtype: str, shape: list[int], encoded: str) -> torch.Tensor:
    data = bytearray(base64.b64decode(encoded, validate=True))
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    flat = torch.frombuffer(data, dtype=DTYPES[dtype])
    try:
        return flat.view(shape)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
