"""Single ops: ours against ATen and oneDNN in one process, with cold weights.

Ours is the program that our backend makes of the same module, called without Dynamo; what is timed
includes its call from Python. ATen is the module itself (fp32 goes to MKL there); oneDNN is torch's
own, with weights packed beforehand. Every call takes the next of enough copies of the weights that
together they exceed 1 GB, so that no cache holds them. Rounds are A B B A between probes of the
machine, as for whole models. Tested by tests/python/test_bench_ops.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from bench_models.cells import Roof
from bench_models.intervals import bootstrap, paired_ratio
from bench_models.op_cases import Case
from bench_models.rounds import Probe, Sample, run_rounds

COLD_BYTES = 1.05e9
SAMPLE_SECONDS = 0.03
MOST_COPIES = 64

Call = Callable[[int], torch.Tensor]  # with the n-th copy of what is cold


class UnableError(Exception):
    """An implementation has no such op; the message says why."""


def copies_of(case: Case) -> int:
    """Enough to exceed every cache; few for ops without cold operands."""
    if not case.cold_bytes or case.form.warm:
        return 1
    return max(2, math.ceil(COLD_BYTES / case.cold_bytes))


class Operands:
    """Modules and inputs of a case. Small weights are views of fewer, larger blocks of memory."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module = case.module()
        self.count = copies_of(case)
        torch.manual_seed(0)
        self.inputs = [case.inputs()]
        self.weights: list[torch.Tensor] = []
        if case.op == "linear":
            weight = self.module.weight.detach()
            self.weights = [weight.clone() for _ in range(self.count)]
        elif case.op == "attention":
            query = self.inputs[0][0]
            self.inputs = [[query, *case.inputs()[1:]] for _ in range(self.count)]

    def input(self, index: int) -> list[torch.Tensor]:
        return self.inputs[index % len(self.inputs)]


def aten(operands: Operands) -> Call:
    """PyTorch as it is."""
    if operands.weights:
        linear = torch.nn.functional.linear
        x = operands.inputs[0][0]
        return lambda index: linear(x, operands.weights[index])
    module = operands.module
    return lambda index: module(*operands.input(index))


def onednn(operands: Operands) -> Call:
    """torch's oneDNN, with packed weights."""
    if not operands.weights:
        raise UnableError("only matmul has an entry to oneDNN in torch")
    if not torch.backends.mkldnn.is_available():
        raise UnableError("this torch has no oneDNN")
    x = operands.inputs[0][0]
    try:
        packed = [
            torch.ops.mkldnn._reorder_linear_weight(weight, operands.case.rows)
            for weight in operands.weights
        ]
        run = torch.ops.mkldnn._linear_pointwise
        run(x, packed[0], None, "none", [], "")
    except (RuntimeError, AttributeError) as error:
        raise UnableError(str(error).splitlines()[0][:120]) from None
    return lambda index: run(x, packed[index], None, "none", [], "")


def ours(operands: Operands) -> Call:
    """The program that the backend makes, one for each copy of the weights."""
    from tilewright import core

    choices = operands.case.form.choices
    engine = core.engine_for("", choices) if choices else core.engine()
    with mock.patch.object(core, "engine", lambda: engine):
        return _compiled(operands)


def _compiled(operands: Operands) -> Call:
    from tilewright import backend, program

    torch._dynamo.reset()
    graphs: list[Any] = []

    def record(gm: Any, inputs: Any, **_: Any) -> Any:
        graphs.append(backend.backend(gm, inputs))
        return graphs[-1]

    with torch.inference_mode():
        torch.compile(operands.module, backend=record, dynamic=False)(*operands.input(0))
    executable = graphs[0].executable
    if executable is None:
        raise UnableError(graphs[0].reason)
    fallbacks = [region["reason"] for region in executable.program.report()["regions"]]
    if any(fallbacks):
        raise UnableError(next(filter(None, fallbacks)))
    if not operands.weights:
        return lambda index: executable.run(operands.input(index), {})[0]
    (name,) = executable._constants
    lowered = dataclasses.replace(executable.lowered, constants={name: operands.weights[0]})
    programs = [program.Executable(lowered, {name: weight}) for weight in operands.weights]
    x = operands.inputs[0]
    return lambda index: programs[index].run(x, {})[0]


IMPLEMENTATIONS: dict[str, Callable[[Operands], Call]] = {
    "tilewright": ours,
    "aten": aten,
    "onednn": onednn,
}


def time_calls(call: Call, order: Iterator[int], count: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(count):
        call(next(order))
    return (time.perf_counter() - start) / count


def error_of(result: torch.Tensor, operands: Operands) -> float:
    """The largest error relative to the largest value of the result in double."""
    with torch.inference_mode():
        if operands.weights:
            wanted = operands.inputs[0][0].double() @ operands.weights[0].double().T
        else:
            module = operands.module.double()
            wanted = module(*(x.double() for x in operands.input(0)))
            module.to(operands.inputs[0][0].dtype)
        error = (result.detach().double().reshape(wanted.shape) - wanted).abs().max()
        return float(error / wanted.abs().max())


def run_case(case: Case, probe: Probe, rounds: int, retries: int, roof: Roof) -> dict[str, Any]:
    """One row of results."""
    operands = Operands(case)
    calls: dict[str, Call] = {}
    record: dict[str, Any] = {
        "set": case.set,
        "case": case.title,
        "op": case.op,
        "rows": case.rows,
        "dtype": case.dtype,
        "form": case.form_name,
        "copies": operands.count,
        "implementations": {},
    }
    for name, make in IMPLEMENTATIONS.items():
        try:
            with torch.inference_mode():
                call = make(operands)
                error = error_of(call(0), operands)
            calls[name] = call
            record["implementations"][name] = {"status": "ok", "relative_error": error}
        except (UnableError, RuntimeError, ValueError) as reason:
            text = str(reason).splitlines()[0][:160]
            record["implementations"][name] = {"status": "failed", "reason": text}
    orders = {name: itertools.cycle(range(operands.count)) for name in calls}
    with torch.inference_mode():
        counts = {}
        for name, call in calls.items():
            # All of them: the first call of each copy of ours makes its scratch.
            time_calls(call, orders[name], operands.count)
            once = time_calls(call, orders[name], 2)
            counts[name] = max(2, round(SAMPLE_SECONDS / max(once, 1e-7)))

        def measure(name: str) -> Sample:
            return Sample(0.0, time_calls(calls[name], orders[name], counts[name]))

        found = run_rounds(list(calls), measure, probe, rounds, retries)
    beside = roof.beside(found.probes)
    read_gb, peak_gflops = beside.read_gb_per_second, beside.peak_gflops
    limit = max(case.bytes / (read_gb * 1e9), case.flops / (peak_gflops * 1e9))
    record |= {"read_gb": read_gb, "peak_gflops": peak_gflops, "limit_seconds": limit}
    for name, blocks in found.blocks.items():
        row = record["implementations"][name]
        row |= {"kept": blocks.kept, "dropped": blocks.dropped}
        if not blocks.kept:
            continue
        seconds = [sample.decode for sample in blocks.own]
        median = bootstrap(seconds).median
        row |= {
            "seconds": bootstrap(seconds).to_dict(),
            "gb_per_second": case.bytes / median / 1e9,
            "gflops": case.flops / median / 1e9,
            "share_of_limit": limit / median,
        }
        if name != "tilewright" and "tilewright" in calls:
            # Above 1: we are faster.
            ours = [sample.decode for sample in blocks.baseline]
            row["ratio"] = paired_ratio(seconds, ours).to_dict()
    return record
