"""Decoder: the forward of an optimised causal language model.

Installed as `model.forward`, a plain function with the original's signature. A call that a program
can run goes to the program: tokens in, logits out, keys and values in the core's blocks inside the
caller's own Cache. Any other call goes to the original forward, counted with the reason, on the
same Cache; the answer is right either way. A model of which no program can be made goes through
torch.compile with our backend instead, so that the parts that are understood are ours.

Three programs at most: logits of all tokens, of the last one, and of chosen ones in ragged steps
(ragged.py). They are captured when first needed, and again when the model's modules or weights
change.

Thread-safe: calls take turns. Tested by tests/python/test_optimize.py, test_generate.py.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import _core, core, ragged, rotary
from tilewright.cache import BlockLayer, adopt, assignments
from tilewright.graph_text import UnsupportedError
from tilewright.installed import InstalledForward, installed_in
from tilewright.lowered import RAGGED, CapturedModel
from tilewright.model_output import model_output
from tilewright.module_state import ModuleState
from tilewright.packed import stand_ins, unpack_all
from tilewright.plans import RefusedPlanError, planned_model
from tilewright.program import Executable

# What a program computes with; any other argument must be None or false.
_KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "return_dict",
    }
)


# Of a model that is no single program: compilations, and graph breaks in one call. With more of
# them (modules that compute in objects of their own, at each layer) calling the parts costs more
# than they save.
_PARTS_LIMIT = 32
_PARTS_BREAKS = 4


class NotRunnableError(Exception):
    """This call is not for a program; the message says why."""


class NotCapturedError(NotRunnableError):
    """No program can be made of this model."""


@dataclass(eq=False, repr=False)
class Step:
    """A call in the form that programs take."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cache: Any
    logits_to_keep: int


@dataclass(eq=False, repr=False)
class Ends:
    """When sequences are finished, and which are."""

    tokens: list[int]
    pad: int
    finished: list[bool]  # per sequence, or empty: none


@dataclass(eq=False, repr=False)
class Settings:
    """What calls ask the model's configuration. As long as the model is what it was, so is this."""

    problem: str  # why no program may run, or ""
    use_cache: bool
    layers: int

    @staticmethod
    def of(model: Any) -> Settings:
        problem = ""
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(model.config, name, False):
                problem = problem or f"config.{name} is set"
        layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
        return Settings(problem, bool(getattr(model.config, "use_cache", True)), layers)


@dataclass(eq=False, repr=False)
class Ready:
    """A cache whose layers are what a program wants, as long as `is_still` says so."""

    layers: list[BlockLayer]
    captured: CapturedModel
    batch: int
    first_keys: list[int]
    caches: list[int]  # handles of the program's
    assignments: int  # when the layers were made ready

    def is_still(self, cache: Any, captured: CapturedModel, batch: int) -> bool:
        return bool(
            self.assignments == assignments()
            and self.captured is captured
            and self.batch == batch
            and self.layers[0].batch_size in (-1, batch)
            and cache.layers == self.layers
        )


@dataclass(eq=False, repr=False)
class Prepared:
    """A step with what runs it; the next one differs in its tokens and positions only."""

    step: Step
    captured: CapturedModel
    executable: Executable
    caches: list[int]  # handles of the blocks of the cache's layers


class Decoder(InstalledForward):
    """See the module's description."""

    def __init__(self, model: Any, stored: torch.dtype | None = None) -> None:
        """stored: the type of keys and values in the caches; None: the model's."""
        super().__init__(model)
        self._asked_stored = stored
        self.not_stored = ""  # why they are in the model's type although another was asked for
        self._lock = threading.RLock()
        self._programs: dict[int, tuple[CapturedModel, Executable]] = {}
        self._store = _core.WeightStore()
        self.frees = False  # packed parameters may be: the model is the caller's to change
        self._state: ModuleState | None = None  # of the model that the programs are of
        self._settings: Settings | None = None  # of the same
        self._ready: weakref.WeakKeyDictionary[Any, Ready] = weakref.WeakKeyDictionary()
        self._positional = [
            name
            for name, parameter in self.__signature__.parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        self.unsupported = ""  # why no program can be made of this model
        self._not_ragged = ""  # why none can be made of its ragged steps
        self._paged = ragged.PagedCaches()
        self.by_parts: Callable[..., Any] | None = None  # then, its compiled forward
        self.no_parts = ""  # why there is no use in that either
        self._growing: list[Any] | None = None  # rotary tables; see rotary.py
        self.calls = self.tokens = 0  # of the program
        decoders.add(self)
        self._counted: str | None = None  # see _own_positions
        self.fallbacks: collections.Counter[str] = collections.Counter()

    @property
    def stored(self) -> torch.dtype | None:
        """The type of keys and values in the caches; None: the model's."""
        return None if self.not_stored else self._asked_stored

    # --- calls

    # To Dynamo an optimised model is one call that it must not look into.
    @torch.compiler.disable(reason="runs as a program of tilewright")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            try:
                arguments = self._named(args, kwargs) if args else kwargs
                self._check_state()
                if ragged.is_ragged(arguments):
                    return self._run_ragged(arguments)
                return self._run(arguments)
            except NotCapturedError as reason:
                if ragged.is_ragged(kwargs):  # Dynamo cannot look into its cache
                    return self._fall_back(str(reason), args, kwargs)
                return self._run_parts(str(reason), args, kwargs)
            except NotRunnableError as reason:
                return self._fall_back(str(reason), args, kwargs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(self._positional, args, strict=False))
        if len(named) == len(args) and named.keys().isdisjoint(kwargs):
            return named | kwargs
        return _flat(self.__signature__.bind(*args, **kwargs).arguments)  # or says what is wrong

    def _run_parts(self, reason: str, args: Any, kwargs: Any) -> Any:
        from tilewright import backend, capture_ops

        if capture_ops.other_cache_layer(self.model.config):
            # States over time are loops over tokens, which Dynamo would unroll for every length.
            return self._fall_back(reason, args, kwargs)
        if self.no_parts:
            return self._fall_back(self.no_parts, args, kwargs)
        if self.by_parts is None:
            name = type(self.model).__name__
            core.say_once(f"{name} is no single program, torch.compile takes its parts: {reason}")
            # A generation has more kinds of calls than Dynamo's 8: one token or many, of one
            # sequence or many, a cache or none ... Not dynamic=True, which makes symbols of floats.
            limit: dict[str, Any] = {}
            if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13
                limit = {"recompile_limit": _PARTS_LIMIT}
            self.by_parts = torch.compile(self.original, backend=backend.backend, **limit)
        length = _length_of(kwargs.get("past_key_values"))
        before, breaks = backend.calls(), _graph_breaks()
        try:
            result = self.by_parts(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if length != _length_of(kwargs.get("past_key_values")):
                raise  # a part of the step has run
            problem = f"{reason}; by parts: {str(error).splitlines()[0]}"
            result = self._fall_back(problem, args, kwargs)
            self.no_parts = problem  # the model's own forward took the call
            return result
        breaks = _graph_breaks() - breaks
        if breaks > _PARTS_BREAKS:
            self.no_parts = f"{reason}; by parts: {breaks} graph breaks"
            self.by_parts = None
        elif backend.calls() == before:
            self.fallbacks[f"torch.compile made no graph of this call; {reason}"] += 1
        return result

    def _fall_back(self, reason: str, args: Any, kwargs: Any) -> Any:
        if core.settings()["strict"]:
            raise RuntimeError(f"TILEWRIGHT_STRICT=1: a step would run in PyTorch: {reason}")
        self.fallbacks[reason] += 1
        core.say_fallback(f"a step of {type(self.model).__name__}", reason)
        return self.original(*args, **kwargs)

    def _check_state(self) -> None:
        if reason := core.unavailable():
            raise NotRunnableError(reason)
        if self.model.training:
            raise NotRunnableError("the model is in training mode; call model.eval()")
        if torch.is_autocast_enabled("cpu"):
            raise NotRunnableError("autocast is active")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise NotRunnableError(
                "gradients are enabled; call the model under torch.no_grad() or inference_mode()"
            )
        if self.unsupported:
            raise NotCapturedError(self.unsupported)

    def _run(self, arguments: dict[str, Any]) -> Any:
        prepared = self._prepared(arguments)
        step, captured = prepared.step, prepared.captured
        logits = self.execute(prepared)
        use_cache = arguments.get("use_cache")
        if use_cache is None:
            use_cache = self._look_at_model().use_cache
        keeps = use_cache or arguments.get("past_key_values") is not None
        cache = step.cache if keeps else None
        output = model_output(captured.output_type, logits=logits, past_key_values=cache)
        if arguments.get("return_dict") is False:
            return output.to_tuple()
        return output

    def _run_ragged(self, arguments: dict[str, Any]) -> Any:
        try:
            step = ragged.step_of(arguments)
            if step.chosen is None and self.stored is not None:
                # The program of all logits is of caches that pages are not: all are chosen.
                step.chosen = torch.arange(step.input_ids.shape[1])
            captured, executable = self._program(
                not step.is_decode, 0 if step.chosen is None else RAGGED
            )
            self._check_rotary(step.position_ids)
            caches = [cache.handle for cache in self._paged.begin_step(step, captured.caches)]
        except (UnsupportedError, core.CoreError) as reason:
            raise NotRunnableError(str(reason)) from None
        inputs = [step.input_ids, step.position_ids]
        symbols = {"b": 1, "s": step.input_ids.shape[1]}
        if step.chosen is not None:
            inputs.append(step.chosen)
            symbols["n"] = len(step.chosen)
        logits = self._ran(executable, inputs, symbols, caches, step.is_decode)
        return model_output(captured.output_type, logits=logits)

    def prepared(self, arguments: dict[str, Any]) -> Prepared:
        """The call with these arguments, checked as any call. Raises NotRunnableError."""
        with self._lock:
            self._check_state()
            return self._prepared(arguments)

    def execute(self, prepared: Prepared) -> torch.Tensor:
        """Its logits [batch, tokens, vocabulary]. Raises NotRunnableError, the cache unchanged.

        REQUIRES: the model is what it was, and nobody else has changed the cache since.
        """
        with self._lock:
            step = prepared.step
            batch, tokens = step.input_ids.shape
            inputs, symbols = [step.input_ids, step.position_ids], {"b": batch, "s": tokens}
            logits = self._ran(prepared.executable, inputs, symbols, prepared.caches, tokens == 1)
            if step.logits_to_keep > 1:
                logits = logits[:, -step.logits_to_keep :]
            return logits

    def _ran(
        self,
        executable: Executable,
        inputs: list[torch.Tensor],
        symbols: dict[str, int],
        caches: list[int],
        decode: bool,
    ) -> torch.Tensor:
        try:
            (logits,) = executable.run(inputs, symbols, caches, decode)
        except core.CoreError as error:
            # The caches are as they were: the core commits tokens after success only.
            raise NotRunnableError(f"the program failed: {error}") from None
        self.calls += 1
        self.tokens += inputs[0].numel()
        return logits

    def go_on(self, prepared: Prepared, input_ids: torch.Tensor) -> torch.Tensor:
        """After `execute`, and as that, with the next token [batch, 1] of each sequence."""
        with self._lock:
            step = prepared.step
            step.position_ids = step.position_ids[:, -1:] + 1
            step.input_ids = input_ids.contiguous()
            self._check_rotary(step.position_ids)
            return self.execute(prepared)

    def search(
        self,
        prepared: Prepared,
        tokens: torch.Tensor,
        ends: Ends,
        most_tokens: int,
        seconds: float,
        lookup: _core.PromptLookup | None = None,
    ) -> torch.Tensor:
        """As `go_on` and an argmax for each step, without Python between them: the tokens [found,
        batch] that follow `tokens` [batch], until all sequences are finished, `most_tokens` are
        found or time is up. With a lookup, whose text ends with the one of `tokens`, a step may
        find several; the program must be of all logits. Raises NotRunnableError where there is no
        such search."""
        with self._lock:
            if self._growing:
                raise NotRunnableError("its rotary table changes with the length")
            step, program = prepared.step, prepared.executable.program
            if lookup is not None and program.alike_tokens == 1:
                core.say_once(
                    f"prompt lookup guesses nothing for {type(self.model).__name__}: steps of "
                    "several tokens may round otherwise than steps of one"
                )
            positions = step.position_ids[:, -1:] + 1
            try:
                found = program.greedy_search(
                    tokens.tolist(),
                    positions[:, 0].tolist(),
                    prepared.caches,
                    ends.tokens,
                    ends.finished or [False] * len(tokens),
                    ends.pad,
                    most_tokens,
                    seconds,
                    core.threads(),
                    lookup,
                )
            except core.CoreError as error:
                raise NotRunnableError(f"the search failed: {error}") from None
            rows = torch.tensor(found).view(-1, len(tokens))
            step.position_ids = positions + (len(rows) - 1)
            self.calls += len(rows)
            self.tokens += rows.numel()
            return rows

    def _prepared(self, arguments: dict[str, Any]) -> Prepared:
        input_ids, logits_to_keep = self._checked(arguments)
        # Before the caller's cache gets our layers, which are of no use without a program.
        key = 1 if logits_to_keep == 1 else 0
        captured, executable = self._program(input_ids.shape[1] > 1, key)
        step, ready = self._prepare(arguments, input_ids, logits_to_keep, captured)
        return Prepared(step, captured, executable, ready.caches)

    def _check_rotary(self, position_ids: torch.Tensor) -> None:
        if self._growing is None:
            self._growing = rotary.growing_tables(self.model)
        if self._growing:
            length = int(position_ids.max()) + 1
            if any(rotary.would_change(module, length) for module in self._growing):
                raise NotRunnableError("its rotary table changes with the length")

    # --- arguments

    def _checked(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """The call's input_ids and logits_to_keep, if the other arguments are for a program."""
        for name, value in arguments.items():
            if name not in _KNOWN and value is not None and value is not False:
                raise NotRunnableError(f"the argument {name} is given")
        keep = arguments.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep < 0:
            raise NotRunnableError("logits_to_keep is a tensor")
        input_ids = arguments.get("input_ids")
        if (
            not isinstance(input_ids, torch.Tensor)
            or input_ids.dim() != 2
            or not input_ids.is_cpu
            or input_ids.numel() == 0
        ):
            raise NotRunnableError("input_ids is not a CPU tensor [batch, tokens]")
        # Before the caller's cache gets our layers: a mask that was made for its own would not fit.
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise NotRunnableError("attention_mask is not [batch, keys]")
        return input_ids, keep

    def _prepare(
        self,
        arguments: dict[str, Any],
        input_ids: torch.Tensor,
        logits_to_keep: int,
        captured: CapturedModel,
    ) -> tuple[Step, Ready]:
        batch, tokens = input_ids.shape
        mask = arguments.get("attention_mask")
        cache: Any = arguments.get("past_key_values")
        # Of what is no cache there is no weak reference either.
        ready = self._ready.get(cache) if hasattr(cache, "layers") else None
        if ready is None or not ready.is_still(cache, captured, batch):
            ready = None
            cache = self._cache(cache, batch)
        past = cache.layers[0].get_seq_length()
        first_keys = _first_keys(mask, batch, past + tokens)
        positions = arguments.get("position_ids")
        if positions is None and any(first_keys):
            assert mask is not None
            counted = self._own_positions()
            if not counted:
                raise NotRunnableError("position_ids are not given for padded sequences")
            positions = _counted_positions(counted, mask, tokens)
        if past == 0 and mask is None and not _is_run(positions):
            # Without a cache, transformers takes positions that start anew for packed sequences.
            raise NotRunnableError("position_ids are not consecutive")
        position_ids = _positions(positions, batch, tokens, past)
        self._check_rotary(position_ids)
        if ready is None or ready.first_keys != first_keys:
            ready = self._made_ready(cache, captured, batch, first_keys)
        if input_ids.dtype is not torch.int64 or not input_ids.is_contiguous():
            input_ids = input_ids.to(torch.int64).contiguous()
        return Step(input_ids, position_ids, cache, logits_to_keep), ready

    def _made_ready(
        self, cache: Any, captured: CapturedModel, batch: int, first_keys: list[int]
    ) -> Ready:
        layers = [cache.layers[shape.layer] for shape in captured.caches]
        for layer, shape in zip(layers, captured.caches, strict=True):
            layer.prepare(batch, *shape[1:])
            layer.set_first_keys(first_keys)
        caches = [layer.blocks.handle for layer in layers]
        ready = Ready([*cache.layers], captured, batch, first_keys, caches, assignments())
        self._ready[cache] = ready
        return ready

    def _own_positions(self) -> str:
        """What the model counts where it is given padding and no positions: "tokens" (most do),
        "kept" ones, as its mask says (some with learned positions), or "" if it is neither.

        It is tried with four tokens of which two are padding: against the model with stated
        positions, or where a caller cannot state any, against the program.
        """
        if self._counted is None:
            given = {
                "input_ids": torch.arange(1, 5)[None],
                "attention_mask": torch.tensor([[0, 0, 1, 1]]),
            }
            with torch.no_grad():
                implicit = self.original(**given).logits[:, -1].float()
                for self._counted in ("tokens", "kept"):
                    positions = _counted_positions(self._counted, given["attention_mask"], 4)
                    if "position_ids" in self.__signature__.parameters:
                        stated = self.original(**given, position_ids=positions).logits[:, -1]
                    else:
                        stated = self._run(given).logits[:, -1]
                    tolerance = 1e-3 if stated.dtype == torch.float32 else 3e-2
                    if (implicit - stated.float()).norm() <= tolerance * implicit.norm():
                        return self._counted
            self._counted = ""
        return self._counted

    def _cache(self, given: Any, batch: int) -> Any:
        """The caller's cache with our layers in it, or a new one."""
        from transformers.cache_utils import DynamicCache

        count = self._look_at_model().layers
        cache = DynamicCache() if given is None else given
        layers = getattr(cache, "layers", None)
        ready = layers is not None and len(layers) == count and isinstance(layers[0], BlockLayer)
        if not ready and (reason := adopt(cache, count, self.stored)):
            raise NotRunnableError(f"past_key_values is {reason}")
        held = cache.layers[0].batch_size
        if held not in (-1, batch):
            raise NotRunnableError(f"past_key_values holds {held} sequences, not {batch}")
        return cache

    # --- programs

    def _program(self, is_prefill: bool, key: int) -> tuple[CapturedModel, Executable]:
        """key: what is captured of its logits; see capture_model."""
        self._drop_stale(is_prefill)
        if problem := self._look_at_model().problem:
            raise NotRunnableError(problem)
        assert self._state is not None
        if hooked := self._state.hooked():
            raise NotRunnableError(f"{hooked} has forward hooks, which a program would not call")
        if key not in self._programs:
            self._programs[key] = self._make(key)
        return self._programs[key]

    def _look_at_model(self) -> Settings:
        """What it says of itself; what else it is, is noted for later calls to compare with."""
        if self._state is None or self._settings is None:
            self._state = ModuleState(self.model)
            self._settings = Settings.of(self.model)
        return self._settings

    def _make(self, logits_to_keep: int) -> tuple[CapturedModel, Executable]:
        """Plans and compiles. A model that cannot be captured is not tried again."""
        if logits_to_keep == RAGGED and self._not_ragged:
            raise NotRunnableError(self._not_ragged)
        try:
            if not self._programs:
                self._begin_packing()
            try:
                made = self._planned(logits_to_keep)
            except RefusedPlanError:
                self._store.settle()  # hashes begun ahead are of memory that goes now
                self.refresh()  # what was packed until then serves nobody
                made = self._planned(logits_to_keep, may_load=False)
        except (UnsupportedError, core.CoreError) as error:
            if logits_to_keep != RAGGED and self.stored is not None:
                return self._made_without(str(error).splitlines()[0], logits_to_keep)
            if logits_to_keep == RAGGED:
                self._not_ragged = f"no program of a ragged step: {str(error).splitlines()[0]}"
                raise NotRunnableError(self._not_ragged) from None
            self.refresh()
            self.unsupported = str(error).splitlines()[0]
            raise NotCapturedError(self.unsupported) from None
        finally:
            self._store.settle()
        if self._state is None or not self._state.is_current():  # capture replaced parameters
            self._state = None
            self._look_at_model()
        return made

    def _made_without(self, reason: str, logits_to_keep: int) -> tuple[CapturedModel, Executable]:
        """Of caches in the model's own type, because no program can be made of others."""
        stored = str(self.stored).removeprefix("torch.")
        if core.settings()["strict"]:
            self.refresh()
            raise NotRunnableError(f"no program with keys and values in {stored}: {reason}")
        self.refresh()
        self.not_stored = f"keys and values are not in {stored}: {reason}"
        core.say_once(f"{type(self.model).__name__}: {self.not_stored}")
        return self._make(logits_to_keep)

    def _begin_packing(self) -> None:
        """What needs no Python, while Python looks for a plan or captures the model."""
        engine, weights = core.engine(), _matrices(self.model)
        if engine.keeps_weights():
            memory = [
                (weight.data_ptr(), weight.numel() * weight.element_size())
                for weight in weights
                if type(weight) is torch.nn.Parameter and weight.is_contiguous()
            ]
            self._store.hash_ahead(engine, memory)
        else:
            self._store.reserve(sum(weight.numel() * weight.element_size() for weight in weights))

    def _planned(
        self, logits_to_keep: int, may_load: bool = True
    ) -> tuple[CapturedModel, Executable]:
        with stand_ins(self.model) as packed:
            return planned_model(
                self.model,
                self.original,
                logits_to_keep,
                lambda captured: self._built(captured, packed),
                may_load=may_load,
                # Pages of transformers' are what they are.
                stored=None if logits_to_keep == RAGGED else self.stored,
            )

    def _built(
        self, captured: CapturedModel, packed: dict[int, torch.Tensor]
    ) -> tuple[CapturedModel, Executable]:
        """packed: the parameters that stand-ins stand for, by id."""
        constants = captured.lowered.constants
        tensors = {name: packed.get(id(t), t) for name, t in constants.items()}
        executable = Executable(captured.lowered, tensors, self._store, self.frees)
        # Without the constants, but for literals: stand-ins serve nobody any more.
        return dataclasses.replace(captured, lowered=executable.lowered), executable

    def _drop_stale(self, is_prefill: bool) -> None:
        """Forgets programs whose weights or modules are no longer the model's.

        The model's parts and their attributes, addresses and versions are checked at each call;
        contents at each prefill.
        """
        if self._state is None:
            return
        weights = [executable.weights for _, executable in self._programs.values()]
        stale = not (self._state.is_current() and all(weight.all_same() for weight in weights))
        if not stale and is_prefill:
            stale = any(weight.contents_changed() for weight in weights)
        if stale:
            self.refresh()

    def refresh(self) -> None:
        """Captures and packs again at the next call."""
        for _, executable in self._programs.values():
            executable.forget_weights()
        unpack_all(self.model)
        self._programs.clear()
        self._state = None
        self.unsupported = ""
        self._not_ragged = ""
        self.not_stored = ""
        self.by_parts = None
        self.no_parts = ""
        self._growing = None

    def programs(self) -> list[Executable]:
        return [executable for _, executable in self._programs.values()]


# Those of living models, for stats().
decoders: weakref.WeakSet[Decoder] = weakref.WeakSet()


def decoder_of(model: Any) -> Decoder | None:
    """The decoder installed in a model, if there is one."""
    installed = installed_in(model)
    return installed if isinstance(installed, Decoder) else None


def _matrices(model: Any) -> list[torch.nn.Parameter]:
    """About what will be packed: matrices, but for tables that are only looked up."""
    matrices = {
        id(parameter): parameter
        for module in model.modules()
        if not isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2
    }
    return list(matrices.values())


def _flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """Bound arguments with `**kwargs` taken apart."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat.update(value if name == "kwargs" else {name: value})
    return flat


def _positions(given: Any, batch: int, tokens: int, past: int) -> torch.Tensor:
    if given is None and tokens == 1:
        return torch.full((batch, 1), past)
    if given is None:
        return torch.arange(past, past + tokens).expand(batch, tokens).contiguous()
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[1] != tokens:
        raise NotRunnableError("position_ids is not [batch, tokens]")
    return given.to(torch.int64).expand(batch, tokens).contiguous()


def _graph_breaks() -> int:
    """Of this process so far."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _length_of(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _counted_positions(counted: str, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of the last `tokens` keys of the mask [b, keys]: all are counted, or those that it keeps."""
    ones = torch.ones_like(mask) if counted == "tokens" else mask
    return (ones.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _is_run(positions: Any) -> bool:
    """Whether each row counts up by one."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return True
    return bool((positions[:, 1:] - positions[:, :-1] == 1).all())


def _first_keys(mask: torch.Tensor | None, batch: int, keys: int) -> list[int]:
    """Where each sequence begins: the number of leading zeros of its mask."""
    if mask is None:
        return [0] * batch
    if tuple(mask.shape) != (batch, keys):
        raise NotRunnableError(f"attention_mask is {tuple(mask.shape)}, not {(batch, keys)}")
    if bool(mask.all()):
        return [0] * batch
    mask = mask.bool()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all()):
        raise NotRunnableError("attention_mask is not left padding")
    return [int(n) for n in (keys - mask.sum(-1)).tolist()]
