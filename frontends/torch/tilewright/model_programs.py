"""ModelPrograms: the programs of one model, and when they are no longer its own.

Three at most: logits of all tokens, of the last one, and of chosen ones in ragged steps
(ragged.py). They are captured when first needed, and again when the model's modules or weights
change.

Packing a large model takes longer than its first step. So, where the core can, the first step of
the first program reads the weights where they are, and they are packed before the next one:
somebody who waits for the first token has it in a half to a fifth of the time.

Not thread-safe by itself: a Decoder calls under its lock. Tested by tests/python/test_optimize.py,
test_module_state.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tilewright import _core, core
from tilewright.graph_text import UnsupportedError
from tilewright.installed import InstalledForward
from tilewright.lowered import RAGGED, CapturedModel
from tilewright.module_state import ModuleState
from tilewright.packed import stand_ins, unpack_all
from tilewright.plans import RefusedPlanError, planned_model
from tilewright.program import Executable
from tilewright.steps import NotCapturedError, NotRunnableError

# Bytes of weights from which on packing comes after the first step: less is packed in the time in
# which a step without packing would pack panels for itself.
LATE_FROM = 64 << 20


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


class ModelPrograms:
    """See the module's description."""

    def __init__(
        self, owner: InstalledForward, stored: torch.dtype | None, dropped: Callable[[], None]
    ) -> None:
        """stored: the type of keys and values in the caches; None: the model's. dropped: called
        when programs are."""
        self._owner = owner
        self._dropped = dropped
        self._asked_stored = stored
        self.not_stored = ""  # why they are in the model's type although another was asked for
        self.made: dict[int, tuple[CapturedModel, Executable]] = {}
        self._store = _core.WeightStore()
        self._in_place: Executable | None = None  # of `made`, while it has not packed
        self.frees = False  # packed parameters may be: the model is the caller's to change
        self._state: ModuleState | None = None  # of the model that the programs are of
        self._settings: Settings | None = None  # of the same
        self.unsupported = ""  # why no program can be made of this model
        self._not_ragged = ""  # why none can be made of its ragged steps

    @property
    def stored(self) -> torch.dtype | None:
        """The type of keys and values in the caches; None: the model's."""
        return None if self.not_stored else self._asked_stored

    def get(self, is_prefill: bool, key: int) -> tuple[CapturedModel, Executable]:
        """key: what is captured of its logits; see capture_model."""
        self._drop_stale(is_prefill)
        if problem := self.settings().problem:
            raise NotRunnableError(problem)
        assert self._state is not None
        if hooked := self._state.hooked():
            raise NotRunnableError(f"{hooked} has forward hooks, which a program would not call")
        if self._in_place is not None and key not in self.made:
            self._pack()
        self.pack_spent()
        if key not in self.made:
            self.made[key] = self._make(key)
        return self.made[key]

    def pack_spent(self) -> None:
        """Packs weights that a first step has read where they are. Raises NotCapturedError.

        REQUIRES: the model is what it was."""
        if self._in_place is not None and self._in_place.is_spent:
            self._pack()

    def untouched(self, key: int) -> tuple[CapturedModel, Executable] | None:
        """As `get` for a step of decode, if that has nothing to do; at the least cost."""
        made = self.made.get(key)
        if made is None or self._state is None or not self._state.is_untouched():
            return None
        if self._in_place is not None:
            return None  # it has to be packed
        return made if self._have_same_weights() else None

    def settings(self) -> Settings:
        """What it says of itself; what else it is, is noted for later calls to compare with."""
        if self._state is None or self._settings is None:
            self._state = ModuleState(self._owner.model)
            self._settings = Settings.of(self._owner.model)
        return self._settings

    def _make(self, logits_to_keep: int) -> tuple[CapturedModel, Executable]:
        """Plans and compiles. A model that cannot be captured is not tried again."""
        if logits_to_keep == RAGGED and self._not_ragged:
            raise NotRunnableError(self._not_ragged)
        try:
            if not self.made:
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
            raise self._refused(error) from None
        finally:
            if self._in_place is None:
                self._store.settle()
        self._note_state()  # capture may have replaced parameters
        return made

    def _pack(self) -> None:
        """Gives all programs packed weights."""
        executable, self._in_place = self._in_place, None
        assert executable is not None
        try:
            executable.pack()
        except core.CoreError as error:
            raise self._refused(error) from None
        except BaseException:  # interrupted: it may have packed some
            self.refresh()
            raise
        finally:
            self._store.settle()
        # Caches are ready for the captured model of a program that is no more.
        self.made = {key: (dataclasses.replace(c), e) for key, (c, e) in self.made.items()}
        self._note_state()

    def _refused(self, error: Exception) -> NotCapturedError:
        self.refresh()
        self.unsupported = str(error).splitlines()[0]
        return NotCapturedError(self.unsupported)

    def _note_state(self) -> None:
        if self._state is None or not self._state.is_current():
            self._state = None
            self.settings()

    def _made_without(self, reason: str, logits_to_keep: int) -> tuple[CapturedModel, Executable]:
        """Of caches in the model's own type, because no program can be made of others."""
        stored = str(self.stored).removeprefix("torch.")
        if core.settings()["strict"]:
            self.refresh()
            raise NotRunnableError(f"no program with keys and values in {stored}: {reason}")
        self.refresh()
        self.not_stored = f"keys and values are not in {stored}: {reason}"
        core.say_once(f"{type(self._owner.model).__name__}: {self.not_stored}")
        return self._make(logits_to_keep)

    def _begin_packing(self) -> None:
        """What needs no Python, while Python looks for a plan or captures the model."""
        engine, weights = core.engine(), _matrices(self._owner.model)
        if engine.keeps_weights():
            memory = [
                (weight.data_ptr(), weight.numel() * weight.element_size())
                for weight in weights
                if type(weight) is torch.nn.Parameter and weight.is_contiguous()
            ]
            self._store.hash_ahead(engine, memory)
        else:
            bytes_ = sum(weight.numel() * weight.element_size() for weight in weights)
            # Pages that wait for a step to end would be in memory beside all weights.
            self._store.reserve(bytes_, not self._packs_late())

    def _planned(
        self, logits_to_keep: int, may_load: bool = True
    ) -> tuple[CapturedModel, Executable]:
        with stand_ins(self._owner.model) as packed:
            return planned_model(
                self._owner.model,
                self._owner.original,
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
        late = not self.made and self._packs_late()
        executable = Executable(captured.lowered, tensors, self._store, self.frees, late)
        if executable.reads_in_place:
            self._in_place = executable
        # Without the constants, but for literals: stand-ins serve nobody any more.
        return dataclasses.replace(captured, lowered=executable.lowered), executable

    def _packs_late(self) -> bool:
        """Whether the first step is to come before packing. Not where packed weights may be on
        disk: those are mapped."""
        if core.settings()["packs_first"] or core.engine().keeps_weights():
            return False
        weights = _matrices(self._owner.model)
        return sum(weight.numel() * weight.element_size() for weight in weights) >= LATE_FROM

    def _have_same_weights(self) -> bool:
        return all(executable.weights.all_same() for _, executable in self.made.values())

    def _drop_stale(self, is_prefill: bool) -> None:
        """Forgets programs whose weights or modules are no longer the model's.

        The model's parts and their attributes, addresses and versions are checked at each call;
        contents at each prefill.
        """
        if self._state is None:
            return
        stale = not (self._state.is_current() and self._have_same_weights())
        if not stale and is_prefill:
            weights = [executable.weights for _, executable in self.made.values()]
            stale = any(weight.contents_changed() for weight in weights)
        if stale:
            self.refresh()

    def refresh(self) -> None:
        """Captures and packs again at the next call."""
        for _, executable in self.made.values():
            executable.forget_weights()
        unpack_all(self._owner.model)
        self.made.clear()
        self._in_place = None
        self._state = None
        self.unsupported = ""
        self._not_ragged = ""
        self.not_stored = ""
        self._dropped()


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
