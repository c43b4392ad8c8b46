"""The process in which prewarm captures and emits: what crashes or hangs here costs itself only.

It reads one job as JSON from stdin and writes messages, one JSON object a line, to a pipe:

    {"at": "load" | "capture" | "unit", "unit": i}   what it does now
    {"kernel": key, "name": name}                    about to be emitted; in a check: is missing
    {"done": i, "keys": [...]}                       the kernels of a unit, new ones only
    {"plan": key, "there": bool}                     of a graph that was captured
    {"failed": i, "reason": "..."}                   the unit cannot be compiled
    {"beat": true}                                   twice a second

A parent that is gone is noticed at the next beat, and the process ends.

Tested by tests/python/test_prewarm.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

BEAT_SECONDS = 0.5


class Channel:
    """The pipe to the parent. Thread-safe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, **message: Any) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BrokenPipeError:
                os._exit(1)

    def _beat(self) -> None:
        while True:
            self.send(beat=True)
            time.sleep(BEAT_SECONDS)


class Worker:
    def __init__(self, job: dict[str, Any], channel: Channel) -> None:
        self._job, self._channel = job, channel
        self._poison = set(job["poison"])
        self._model: Any = None
        self._lowered: dict[int, Any] = {}
        self._refused: dict[int, str] = {}  # reasons
        self._engines: dict[str, Any] = {}
        self._sent: dict[str, int] = {}

    def run(self) -> None:
        from tilewright.core import CoreError
        from tilewright.graph_text import UnsupportedError

        for unit in self._job["units"]:
            try:
                keys = self._compile(unit)
            except (UnsupportedError, CoreError) as error:
                self._channel.send(failed=unit["index"], reason=first_line(error))
            else:
                self._channel.send(done=unit["index"], keys=keys)

    def _compile(self, unit: dict[str, Any]) -> list[str]:
        from tilewright import _core
        from tilewright.graph_text import DTYPE_NAMES

        lowered = self._capture(unit)
        self._channel.send(at="unit", unit=unit["index"])
        engine = self._engine(unit["isa"])
        fits, twelve_bits, in_place = unit["form"]
        constants = {name: tensor.contiguous() for name, tensor in lowered.constants.items()}
        program = engine.compile(
            lowered.text,
            {
                name: (tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in constants.items()
            },
            _core.WeightStore(fits, twelve_bits),
            optimized=lowered.has_passed,
            in_place=in_place,
        )
        program.prepare()
        keys = engine.kernel_keys()
        before = self._sent.get(unit["isa"], 0)
        self._sent[unit["isa"]] = len(keys)
        return [key for key in keys[before:] if key not in self._poison]

    def _engine(self, isa: str) -> Any:
        from tilewright import core

        if isa not in self._engines:
            engine = core.engine_for(isa) if isa else core.engine()
            engine.admit(self.admit)
            self._engines[isa] = engine
        return self._engines[isa]

    def admit(self, key: str, name: str) -> bool:
        """Whether to emit a kernel; the parent hears of it before it can do harm."""
        if key in self._poison:
            return False
        self._channel.send(kernel=key, name=name)
        return not self._job["check"]

    def _capture(self, unit: dict[str, Any]) -> Any:
        """The graph of a unit. Each capture serves many units, and leaves its plan."""
        from tilewright.exported import OptimizedExport
        from tilewright.graph_text import UnsupportedError
        from tilewright.recorded import RecordedPlan

        keep = unit["keep"]
        if keep in self._refused:
            raise UnsupportedError(self._refused[keep])
        if keep not in self._lowered:
            if self._model is None:
                self._model = self._load(unit["index"])
            self._channel.send(at="capture", unit=unit["index"])
            try:
                if isinstance(self._model, OptimizedExport):
                    self._lowered[keep] = self._model.lowered()
                elif isinstance(self._model, RecordedPlan):
                    self._lowered[keep] = self._recorded(self._model)
                else:
                    self._lowered[keep] = self._planned(keep)
            except UnsupportedError as error:
                self._refused[keep] = str(error)
                raise
        return self._lowered[keep]

    def _planned(self, keep: int) -> Any:
        from tilewright import core, plans

        model, engine, stored = self._model, core.engine(), core.stored_dtype()
        if key := plans.plan_key(model, model.forward, keep, engine, stored):
            self._channel.send(plan=key, there=engine.load_plan(key) is not None)
        return plans.planned_model(
            model, model.forward, keep, lambda made: made.lowered, stored=stored
        )

    def _recorded(self, plan: Any) -> Any:
        """The plan goes along with its kernels."""
        from tilewright import core

        engine, lowered = core.engine(), plan.lowered()
        there = engine.load_plan(plan.key) is not None
        self._channel.send(plan=plan.key, there=there)
        if not there and not self._job["check"]:
            engine.save_plan(plan.key, plan.name, plan.text)
        return lowered

    def _load(self, unit: int) -> Any:
        """What cannot be loaded ends the process, with the reason as its last line."""
        self._channel.send(at="load", unit=unit)
        try:
            return load(self._job["model"], self._job["dtype"])
        except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
            sys.exit(first_line(error))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load(source: str, dtype: str | None) -> Any:
    import torch

    if source.endswith(".pt2"):
        from tilewright.exported import OptimizedExport

        return OptimizedExport(torch.export.load(source))
    from tilewright.recorded import SUFFIX, RecordedPlan

    if source.endswith(SUFFIX):
        return RecordedPlan.read(source)
    import transformers

    from tilewright.shapes import model_of_shapes

    transformers.logging.set_verbosity_error()
    return model_of_shapes(source, dtype)


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    Worker(json.load(sys.stdin), channel).run()
