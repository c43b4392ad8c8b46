"""A compiled graph that torch saved runs in a fresh process: our program, no Dynamo, the same
results; and in PyTorch, with the reason, what cannot be ours there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tilewright._core")
pytest.importorskip("torch._dynamo.aot_compile_types")

# What both processes begin with. Guards on a module's identity mean nothing in another process.
_COMMON = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, tilewright
from torch._dynamo.utils import counters
from tilewright import backend
from tiny_models import prompt, tiny_llama

PATH = {path!r}
OPTIONS = {{"guard_filter_fn": torch.compiler.keep_portable_guards_unsafe}}
torch.set_grad_enabled(False)
model, ids = tiny_llama(2), prompt(1, 9)


def step(model, ids):
    return {{"logits": model(input_ids=ids, use_cache=False).logits, "ids": ids}}


def compiled():
    return torch.compile(step, fullgraph=True, backend="tilewright", options=OPTIONS)


def tell(graph, logits, model=model):
    difference = (logits - model(ids).logits).abs().max().item()
    print(json.dumps({{
        "calls": graph.calls, "in_torch": graph.fallback_calls, "reason": graph.reason,
        "captured": counters["stats"]["calls_captured"], "difference": difference,
        "hits": counters["dynamo_cache"]["dynamo_cache_hit"],
        "share": tilewright.explain(model).own_flops_share,
    }}))
"""

_SAVE = """
made = compiled().aot_compile(((model, ids), {}))
made(model, ids)
made.save_compiled_function(PATH)
tell(made._artifacts.compiled_fn, made(model, ids)["logits"])
"""

_LOAD = """
def loaded(path=PATH):
    with open(path, "rb") as file:
        return torch.compiler.load_compiled_function(file)
"""

_CALL = """
made = loaded()
results = made(model, ids)
assert torch.equal(results["ids"], ids)
tell(made._artifacts.compiled_fn, results["logits"])
"""


class Processes:
    """Fresh ones, each with a directory for what it leaves."""

    def __init__(self, run_python: Any, directory: Path) -> None:
        self._run = run_python
        tests = str(Path(__file__).parent)
        self._common = _COMMON.format(tests=tests, path=str(directory / "step"))

    def __call__(self, code: str, **environment: str) -> dict[str, Any]:
        done = self._run(self._common + code, environment)
        assert "Traceback" not in done.stderr, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@pytest.fixture(scope="module")
def saved(run_python: Any, tmp_path_factory: pytest.TempPathFactory) -> Processes:
    processes = Processes(run_python, tmp_path_factory.mktemp("saved"))
    told = processes(_SAVE)
    assert told["captured"] > 0 and told["in_torch"] == 0 and not told["reason"]
    return processes


def expect_ours(told: dict[str, Any], calls: int = 1) -> None:
    assert told["calls"] == calls and told["in_torch"] == 0 and not told["reason"]
    assert told["captured"] == 0, "Dynamo ran"
    assert told["difference"] < 1e-4 and told["share"] == 1.0


def test_a_saved_function_runs_our_program_without_dynamo(saved: Processes) -> None:
    expect_ours(saved(_LOAD + _CALL))


def test_weights_are_those_of_the_call(saved: Processes) -> None:
    code = """
made = loaded()
made(model, ids)
model.model.layers[1].mlp.down_proj.weight.mul_(-2)
made(model, ids)
other = tiny_llama(2)
other.lm_head.weight.mul_(3)
tell(made._artifacts.compiled_fn, made(other, ids)["logits"], other)
"""
    told = saved(_LOAD + code)
    assert told["difference"] < 1e-4 and told["calls"] == 3 and told["in_torch"] == 0
    changed = code.replace("made(other, ids)", "made(model, ids)").replace(", other)", ")")
    expect_ours(saved(_LOAD + changed), calls=3)


def test_what_was_loaded_can_be_saved_again(saved: Processes, tmp_path: Path) -> None:
    again = f"""
path = {str(tmp_path / "again")!r}
loaded().save_compiled_function(path)
made = loaded(path)
made(model, ids)
made.save_compiled_function(path)
made = loaded(path)
tell(made._artifacts.compiled_fn, made(model, ids)["logits"])
"""
    expect_ours(saved(_LOAD + again))


def test_another_build_leaves_it_to_torch(saved: Processes) -> None:
    another = """
import tilewright.lowered
backend.precompiled._build = lambda: "another"
del tilewright.lowered.Lowered  # one of other classes, too
"""
    told = saved(_LOAD + another + _CALL)
    assert "another build" in told["reason"] and told["in_torch"] == 1
    assert told["difference"] == 0 and told["captured"] == 0


def test_strict_processes_refuse_another_build(saved: Processes) -> None:
    code = """
backend.precompiled._build = lambda: "another"
try:
    loaded()
except Exception as error:
    print(json.dumps({"refused": str(error)}))
"""
    told = saved(_LOAD + code, TILEWRIGHT_STRICT="1")
    assert "another build" in told["refused"]


def test_a_process_that_has_us_disabled_leaves_it_to_torch(saved: Processes) -> None:
    told = saved(_LOAD + _CALL, TILEWRIGHT_DISABLE="1")
    assert told["difference"] == 0 and told["captured"] == 0 and told["share"] == 0.0


def test_a_graph_that_is_not_ours_is_saved_with_the_reason(run_python: Any, tmp_path: Path) -> None:
    processes = Processes(run_python, tmp_path)
    spectrum = """
def step(model, x):
    return {"logits": x * 2}

x = torch.ones(3, dtype=torch.complex64)
"""
    save = "\ncompiled().aot_compile(((None, x), {})).save_compiled_function(PATH)\n"
    call = """
made = loaded()
graph = made._artifacts.compiled_fn
assert torch.equal(made(None, x)["logits"], x * 2)
tell(graph, model(ids).logits)
"""
    processes(spectrum + save + "print('{}')")
    told = processes(_LOAD + spectrum + call)
    assert "complex" in told["reason"] and told["in_torch"] == told["calls"] == 1


def test_torchs_own_cache_of_compiled_functions_has_it(run_python: Any, tmp_path: Path) -> None:
    processes = Processes(run_python, tmp_path)
    code = """
logits = compiled()(model, ids)["logits"]
(graph,) = backend.graphs
tell(graph, logits)
torch.compiler.save_cache_artifacts()
"""
    environment = {
        "TORCH_CACHING_PRECOMPILE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"),
    }
    assert processes(code, **environment)["captured"] > 0
    told = processes(code, **environment)
    expect_ours(told)
    assert told["hits"] == 1
