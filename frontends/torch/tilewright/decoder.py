"""Decoder: the forward of an optimised causal language model.

Installed as `model.forward`, a plain function with the original's signature. A call that a program
can run goes to the program: tokens in, logits out, keys and values in the core's blocks inside the
caller's own Cache. Any other call goes to the original forward, counted with the reason, on the
same Cache; the answer is right either way. A model of which no program can be made goes through
torch.compile with our backend instead, so that the parts that are understood are ours.

Which programs there are is model_programs.py's affair, what a call must be for one steps.py's, what
its cache must be ready.py's, and the parts of a model that is no program parts.py's.

Thread-safe: calls take turns. Tested by tests/python/test_optimize.py, test_generate.py,
test_repeated_calls.py.
"""

from __future__ import annotations

import collections
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import _core, core, ragged, rotary
from tilewright.graph_text import UnsupportedError
from tilewright.installed import InstalledForward, installed_in
from tilewright.lowered import RAGGED, CapturedModel
from tilewright.model_output import model_output
from tilewright.model_programs import ModelPrograms
from tilewright.parts import Parts
from tilewright.program import Executable
from tilewright.ready import Ready, ReadyCaches, with_our_layers
from tilewright.routing import opaque
from tilewright.steps import (
    Ends,
    NotCapturedError,
    NotRunnableError,
    Step,
    checked,
    counted_positions,
    first_keys_of,
    flattened,
    is_run,
    positions_of,
)


@dataclass(eq=False, repr=False)
class Prepared:
    """A step with what runs it; the next one differs in its tokens and positions only."""

    step: Step
    captured: CapturedModel
    executable: Executable
    caches: list[int]  # handles of the blocks of the cache's layers
    length: int  # of the cache, in tokens: of what was executed


class Decoder(InstalledForward):
    """See the module's description."""

    def __init__(self, model: Any, stored: torch.dtype | None = None) -> None:
        """stored: the type of keys and values in the caches; None: the model's."""
        super().__init__(model)
        self._lock = threading.RLock()
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self.model_programs = ModelPrograms(self, stored, self._forget)
        self.parts = Parts(self, self.fallbacks)  # of a model of which no program can be made
        self._ready = ReadyCaches()
        self._positional = [
            name
            for name, parameter in self.__signature__.parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        self._paged = ragged.PagedCaches()
        self._growing: list[Any] | None = None  # rotary tables; see rotary.py
        self.calls = self.tokens = 0  # of the program
        self._counted: str | None = None  # see _own_positions
        decoders.add(self)

    def _forget(self) -> None:
        """What is of programs that are dropped, and of the model as it was."""
        self.parts.refresh()
        self._growing = None

    # --- calls

    # To Dynamo an optimised model is one call that it must not look into.
    @opaque
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            try:
                if not args and (output := self._repeated(**kwargs)) is not None:
                    return output
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
        return flattened(
            self.__signature__.bind(*args, **kwargs).arguments
        )  # or says what is wrong

    def _run_parts(self, reason: str, args: Any, kwargs: Any) -> Any:
        return self.parts.run(reason, args, kwargs, lambda why: self._fall_back(why, args, kwargs))

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
        if self.model_programs.unsupported:
            raise NotCapturedError(self.model_programs.unsupported)

    def _run(self, arguments: dict[str, Any]) -> Any:
        prepared = self._prepared(arguments)
        step, captured = prepared.step, prepared.captured
        logits = self.execute(prepared)
        use_cache = arguments.get("use_cache")
        if use_cache is None:
            use_cache = self.model_programs.settings().use_cache
        keeps = use_cache or arguments.get("past_key_values") is not None
        cache = step.cache if keeps else None
        output = model_output(captured.output_type, logits=logits, past_key_values=cache)
        if arguments.get("return_dict") is False:
            return output.to_tuple()
        return output

    def _repeated(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        use_cache: Any = None,
        cache_position: Any = None,
        **others: Any,
    ) -> Any:
        """What `_run` returns, of a step of one token for which nothing has to be made ready: the
        model and the cache are what they were. None, and nothing has happened: of any other call.

        Each condition here is one that `_check_state` and `_prepared` have, or a stricter one.
        """
        ready = self._ready.known(past_key_values)
        if ready is None or (step := ready.step) is None or not step.takes(input_ids):
            return None
        if (
            type(logits_to_keep) is not int
            or any(value is not None for value in others.values())
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or self._growing != []
            or _is_observed()
        ):
            return None
        current = self.model_programs.untouched(logits_to_keep)
        if current is None or current[0] is not ready.captured:
            return None
        if not ready.is_still(past_key_values):
            return None
        logits = step.empty_logits()
        try:
            past = past_key_values.layers[0].get_seq_length()
            current[1].repeat(step.run, step.symbols, input_ids, past, logits)
        except RuntimeError:  # tokens without memory, or of the core: `_run` says which
            return None
        self.calls += 1
        self.tokens += len(input_ids)
        return model_output(
            ready.captured.output_type, logits=logits, past_key_values=past_key_values
        )

    def _run_ragged(self, arguments: dict[str, Any]) -> Any:
        try:
            step = ragged.step_of(arguments)
            if step.chosen is None and self.model_programs.stored is not None:
                # The program of all logits is of caches that pages are not: all are chosen.
                step.chosen = torch.arange(step.input_ids.shape[1])
            captured, executable = self.model_programs.get(
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
            self.model_programs.pack_spent()
            step = prepared.step
            batch, tokens = step.input_ids.shape
            inputs, symbols = [step.input_ids, step.position_ids], {"b": batch, "s": tokens}
            logits = self._ran(prepared.executable, inputs, symbols, prepared.caches, tokens == 1)
            prepared.length += tokens
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

    def is_still(self, prepared: Prepared) -> bool:
        """Whether it may go on: nobody has changed the model, nor what its cache holds."""
        with self._lock:
            try:
                self._check_state()
            except NotRunnableError:
                return False
            step = prepared.step
            ready = self._ready.known(step.cache)
            current = self.model_programs.untouched(1 if step.logits_to_keep == 1 else 0)
            return (
                ready is not None
                and ready.caches == prepared.caches
                and ready.is_still(step.cache)
                and current is not None
                and current[1] is prepared.executable
                and bool(step.cache.layers[0].get_seq_length() == prepared.length)
            )

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
            self.model_programs.pack_spent()
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
                    ends.least_tokens,
                    most_tokens,
                    seconds,
                    core.threads(),
                    lookup,
                )
            except core.CoreError as error:
                raise NotRunnableError(f"the search failed: {error}") from None
            rows = torch.tensor(found).view(-1, len(tokens))
            step.position_ids = positions + (len(rows) - 1)
            prepared.length += len(rows)
            self.calls += len(rows)
            self.tokens += rows.numel()
            return rows

    def _prepared(self, arguments: dict[str, Any]) -> Prepared:
        input_ids, logits_to_keep = checked(arguments)
        # Before the caller's cache gets our layers, which are of no use without a program.
        key = 1 if logits_to_keep == 1 else 0
        captured, executable = self.model_programs.get(input_ids.shape[1] > 1, key)
        step, ready = self._prepare(arguments, input_ids, logits_to_keep, captured, executable)
        past = step.cache.layers[0].get_seq_length()
        return Prepared(step, captured, executable, ready.caches, past)

    def _check_rotary(self, position_ids: torch.Tensor) -> None:
        if self._growing is None:
            self._growing = rotary.growing_tables(self.model)
        if self._growing:
            length = int(position_ids.max()) + 1
            if any(rotary.would_change(module, length) for module in self._growing):
                raise NotRunnableError("its rotary table changes with the length")

    def _prepare(
        self,
        arguments: dict[str, Any],
        input_ids: torch.Tensor,
        logits_to_keep: int,
        captured: CapturedModel,
        executable: Executable,
    ) -> tuple[Step, Ready]:
        batch, tokens = input_ids.shape
        mask = arguments.get("attention_mask")
        cache: Any = arguments.get("past_key_values")
        ready = self._ready.get(cache, captured, batch)
        if ready is None:
            layers, stored = self.model_programs.settings().layers, self.model_programs.stored
            cache = with_our_layers(cache, batch, layers, stored)
        past = cache.layers[0].get_seq_length()
        first_keys = first_keys_of(mask, batch, past + tokens)
        positions = arguments.get("position_ids")
        if positions is None and any(first_keys):
            assert mask is not None
            counted = self._own_positions()
            if not counted:
                raise NotRunnableError("position_ids are not given for padded sequences")
            positions = counted_positions(counted, mask, tokens)
        if past == 0 and mask is None and not is_run(positions):
            # Without a cache, transformers takes positions that start anew for packed sequences.
            raise NotRunnableError("position_ids are not consecutive")
        position_ids = positions_of(positions, batch, tokens, past)
        self._check_rotary(position_ids)
        if ready is None or ready.first_keys != first_keys:
            ready = self._ready.make(cache, captured, executable, batch, first_keys)
        if input_ids.dtype is not torch.int64 or not input_ids.is_contiguous():
            input_ids = input_ids.to(torch.int64).contiguous()
        return Step(input_ids, position_ids, cache, logits_to_keep), ready

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
                    positions = counted_positions(self._counted, given["attention_mask"], 4)
                    if "position_ids" in self.__signature__.parameters:
                        stated = self.original(**given, position_ids=positions).logits[:, -1]
                    else:
                        stated = self._run(given).logits[:, -1]
                    tolerance = 1e-3 if stated.dtype == torch.float32 else 3e-2
                    if (implicit - stated.float()).norm() <= tolerance * implicit.norm():
                        return self._counted
            self._counted = ""
        return self._counted

    def refresh(self) -> None:
        """Captures and packs again at the next call."""
        self.model_programs.refresh()

    def programs(self) -> list[Executable]:
        return [executable for _, executable in self.model_programs.made.values()]


# Those of living models, for stats().
decoders: weakref.WeakSet[Decoder] = weakref.WeakSet()


def _is_observed() -> bool:
    """Whether somebody looks at torch's operators: a profiler, a mode, a trace."""
    return (
        torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def decoder_of(model: Any) -> Decoder | None:
    """The decoder installed in a model, if there is one."""
    installed = installed_in(model)
    return installed if isinstance(installed, Decoder) else None
