"""tilewright prewarm: what it fills serves the models without an emission, for any storage of their
weights, on a pack alone; a worker that dies or hangs costs what it was at."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import llama_config, tiny_llama

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")

ISAS = ["avx2", "avx512", "avx512_core_bf16"]
# Small models have no weights in 12 bits otherwise.
COMPACT = {"TILEWRIGHT_WEIGHTS": "compact"}

# Loads directories, optimises, generates, and prints what was emitted and loaded. As large models
# do, these read their weights in place at first.
_RUN = """
import json, sys, torch, tilewright
from transformers import AutoModelForCausalLM
from tilewright import model_programs
model_programs.LATE_FROM = 0
ids = torch.arange(1, 40).reshape(1, -1)
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    model = tilewright.llm.optimize(model, inplace=True)
    with torch.no_grad():
        model(ids)  # all logits
    for batch in (1, 3, 7):
        model.generate(ids.repeat(batch, 1), max_new_tokens=4, do_sample=False, pad_token_id=0)
stats = tilewright.stats()
print(json.dumps({**stats["kernels"], **stats["kernel_cache"], "fallbacks": stats["fallbacks"],
    "plans": stats["plans"]}))
"""


def run_models(run_python, directories: list[Path], **environment: str) -> dict[str, Any]:
    arguments = [str(directory) for directory in directories]
    done = run_python(f"import sys; sys.argv = ['app', *{arguments!r}]\n{_RUN}", environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@dataclass
class Prewarmed:
    """A pack made of a config.json alone, in a cache that is off."""

    config: Path
    pack: Path
    result: dict[str, Any]

    @property
    def keys(self) -> list[str]:
        from tilewright import _core

        entries = _core.cache_entries(str(self.pack))
        return [entry["key"] for entry in entries if entry["kind"] == "kernel"]


@pytest.fixture(scope="module")
def prewarmed(tmp_path_factory: pytest.TempPathFactory) -> Prewarmed:
    base = tmp_path_factory.mktemp("prewarmed")
    llama_config(3).save_pretrained(base)
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "prewarm", str(base / "config.json"),
         "--dtype", "fp32", "--isa", ",".join(ISAS), "--pack", str(base / "kernels.pack"),
         "--json"],
        env={**os.environ, **COMPACT, "TILEWRIGHT_CACHE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Prewarmed(base / "config.json", base / "kernels.pack", json.loads(done.stdout))


def test_every_rung_and_the_pack(prewarmed: Prewarmed) -> None:
    result = prewarmed.result
    assert result["isa"] == ISAS and not result["failed"] and result["loaded"] == 0
    assert result["emitted"] == result["kernels"] == result["pack"]["kernels"] > 0
    assert result["pack"]["sha256"] == hashlib.sha256(prewarmed.pack.read_bytes()).hexdigest()
    assert prewarmed.pack.stat().st_mode & 0o777 == 0o444
    keys = prewarmed.keys
    # AVX-VNNI is not in the keys of AVX-512, with which CPUs have it or not.
    masks = {key.splitlines()[-1] for key in keys}
    assert masks == {"isa avx2", "isa avx2+avx512", "isa avx2+avx512+avx512_vnni+avx512_bf16"}


def test_a_pack_alone_serves_every_storage(
    prewarmed: Prewarmed, run_python, tmp_path: Path
) -> None:
    digest = prewarmed.result["pack"]["sha256"]
    volume = tmp_path / "volume.pack"
    shutil.copy(prewarmed.pack, volume)
    volume.chmod(0o666)  # as on a group's volume
    directories = []
    for storage in ("plain", "f16", "bf16", "mixed"):
        model = tiny_llama(3)
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                if storage == "f16":
                    parameter.copy_(parameter.half())
                elif storage == "bf16" or (storage == "mixed" and i % 2):
                    parameter.copy_(parameter.bfloat16())
        model.save_pretrained(tmp_path / storage)
        directories.append(tmp_path / storage)
    nothing = tmp_path / "nothing"
    for mode, weights in (("off", "compact"), ("ro", "auto")):
        found = run_models(
            run_python,
            directories,
            TILEWRIGHT_CACHE=mode,
            TILEWRIGHT_CACHE_DIR=str(nothing),
            TILEWRIGHT_CACHE_PACK=f"{volume}@sha256:{digest}",
            TILEWRIGHT_MAX_CPU_ISA="avx2",
            TILEWRIGHT_WEIGHTS=weights,
        )
        assert found["emitted"] == 0 and found["fallbacks"] == {}, found
        plans = found["plans"]
        # Made of the configuration alone, they are those of every storage: values do not matter.
        assert plans["captured"] == 0 and not plans["unplanned"], plans
        assert found["pack_hits"] == found["hits"] == found["loaded"] + plans["loaded"] > 10
        assert found["packs"][0]["kernels"] == prewarmed.result["kernels"]
        assert found["packs"][0]["plans"] == prewarmed.result["plans"] == 2
    assert not nothing.exists()


def test_a_refused_pack_is_one_warning(
    prewarmed: Prewarmed, run_python, model_directory: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume.pack"
    shutil.copy(prewarmed.pack, volume)
    volume.chmod(0o664)
    found = run_models(
        run_python, [model_directory], TILEWRIGHT_CACHE="off", TILEWRIGHT_CACHE_PACK=str(volume)
    )
    assert found["emitted"] > 0 and found["pack_hits"] == 0
    warnings = [line for line in found["stderr"].splitlines() if str(volume) in line]
    assert len(warnings) == 1
    for part in ("mode 0664", "chmod", "@sha256:"):
        assert part in warnings[0]
    assert found["packs"][0]["problem"] in warnings[0]


def test_the_cache_is_filled_once_and_checked(command, prewarmed: Prewarmed) -> None:
    config, arguments = str(prewarmed.config), ("--dtype", "bf16", "--json")
    before = json.loads(command("cache", "check", config, *arguments, code=1).stdout)
    assert len(before["missing"]) == before["kernels"] > 0 and len(before["missing_plans"]) == 2
    first = json.loads(command("prewarm", config, *arguments).stdout)
    assert first["emitted"] == first["kernels"] == before["kernels"] and first["loaded"] == 0
    again = json.loads(command("prewarm", config, "--jobs", "2", *arguments).stdout)
    assert again["emitted"] == 0 and again["loaded"] == first["emitted"]
    entries = json.loads(command("cache", "ls", "--json").stdout)["entries"]
    assert len(entries) == first["emitted"] + first["plans"]
    after = json.loads(command("cache", "check", config, *arguments).stdout)
    assert after["missing"] == after["missing_plans"] == []
    assert after["kernels"] == before["kernels"] and after["plans"] == 2


def test_a_recorded_plan_is_enough(
    command, run_python, model_directory: Path, tmp_path: Path
) -> None:
    """What one process left makes a pack for another one's CPU, without the model."""
    kept = tmp_path / "kept"
    run_models(run_python, [model_directory], TILEWRIGHT_CACHE_DIR=str(kept), TILEWRIGHT_CACHE="rw")
    plans = sorted(kept.glob("objects/*/*.plan"))
    assert len(plans) == 2  # all logits and the last
    packs = []
    for plan in plans:
        packs.append(str(tmp_path / f"{plan.stem}.pack"))
        arguments = ("--isa", "avx2", "--pack", packs[-1], "--json")
        made = json.loads(command("prewarm", str(plan), *arguments, **COMPACT).stdout)
        assert made["kernels"] > 10 and made["plans"] == 1 and not made["failed"]
    digests = [hashlib.sha256(Path(pack).read_bytes()).hexdigest() for pack in packs]
    found = run_models(
        run_python,
        [model_directory],
        TILEWRIGHT_CACHE="off",
        TILEWRIGHT_CACHE_PACK=",".join(
            f"{pack}@sha256:{digest}" for pack, digest in zip(packs, digests, strict=True)
        ),
        TILEWRIGHT_MAX_CPU_ISA="avx2",
    )
    assert found["emitted"] == 0 and found["fallbacks"] == {}, found
    assert found["plans"]["loaded"] == 2 and found["plans"]["captured"] == 0, found
    command("cache", "check", str(plans[0]), "--isa", "avx2")


@pytest.mark.parametrize("what", ["missing", "kernel", "alone", "changed"])
def test_what_is_no_plan_is_said(
    command, run_python, model_directory: Path, tmp_path: Path, what: str
) -> None:
    kept = tmp_path / "kept"
    run_models(run_python, [model_directory], TILEWRIGHT_CACHE_DIR=str(kept), TILEWRIGHT_CACHE="rw")
    plan = next(iter(kept.glob("objects/*/*.plan")))
    if what == "missing":
        plan.unlink()
    elif what == "kernel":
        kernel = next(path for path in kept.glob("objects/*/*") if path.suffix != ".plan")
        plan = plan.with_name("kernel.plan")
        shutil.copy(kernel, plan)
    elif what == "alone":
        plan = plan.rename(tmp_path / plan.name)
    else:
        data = bytearray(plan.read_bytes())
        data[-1] ^= 1
        plan.chmod(0o600)
        plan.write_bytes(data)
        plan.chmod(0o400)
    done = command("prewarm", str(plan), code=1)
    assert plan.name in done.stderr and "Traceback" not in done.stderr


def test_a_directory_with_weights(command, model_directory: Path) -> None:
    command("prewarm", str(model_directory))
    done = command("explain", str(model_directory), "--prompt", "abc", "--json")
    explained = json.loads(done.stdout)
    assert explained["kernels_emitted"] == 0 and explained["kernels_loaded"] > 0


def test_a_name_on_disk_and_the_same_pack(command, prewarmed: Prewarmed, tmp_path: Path) -> None:
    """Whatever the source is called and however many processes make it, the bytes are the same."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    shutil.copy(prewarmed.config, repository / "snapshots" / "0123" / "config.json")
    command("prewarm", "somebody/tiny", "--dtype", "float32", "--isa", ",".join(reversed(ISAS)),
            "--jobs", "2", "--pack", str(tmp_path / "again.pack"),
            HF_HUB_CACHE=str(tmp_path / "hub"), **COMPACT)  # fmt: skip
    assert (tmp_path / "again.pack").read_bytes() == prewarmed.pack.read_bytes()


def test_an_exported_program(command, run_python, tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 64))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer.eval(), (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    file = tmp_path / "model.pt2"
    torch.export.save(program, file)
    pack = tmp_path / "kernels.pack"
    command("prewarm", str(file), "--pack", str(pack), TILEWRIGHT_CACHE="off")
    done = run_python(
        f"""
import json, torch, tilewright
fast = tilewright.optimize(torch.export.load({str(file)!r}))
with torch.no_grad():
    for rows in (2, 3, 17, 40):
        fast(torch.randn(rows, 64))
stats = tilewright.stats()
print(json.dumps({{**stats["kernels"], "fallbacks": stats["fallbacks"]}}))
""",
        {"TILEWRIGHT_CACHE": "off", "TILEWRIGHT_CACHE_PACK": str(pack)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["emitted"] == 0 and found["loaded"] > 0 and found["fallbacks"] == {}


# Stands in for a generator with faults: one kernel crashes, another hangs.
_FAULT = """
import os, signal, sys, time
if "prewarm_worker" in " ".join(sys.orig_argv):
    import tilewright.prewarm_worker as worker
    admit = worker.Worker.admit
    def harmful(self, key, name):
        wanted = admit(self, key, name)
        if wanted and key == {crashes!r}:
            os.kill(os.getpid(), signal.SIGSEGV)
        if wanted and key == {hangs!r}:
            time.sleep(3600)
        return wanted
    worker.Worker.admit = harmful
"""


def test_a_kernel_that_kills_costs_itself(command, prewarmed: Prewarmed, tmp_path: Path) -> None:
    keys = [key for key in prewarmed.keys if key.endswith("\nisa avx2\n")]
    crashes, hangs = keys[3], keys[7]
    fault = _FAULT.format(crashes=crashes, hangs=hangs)
    (tmp_path / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = ["prewarm", str(prewarmed.config), "--dtype", "fp32", "--isa", "avx2", "--json"]
    done = command(*arguments, "--timeout", "100", code=1, PYTHONPATH=path, **COMPACT)
    result = json.loads(done.stdout)
    reasons = sorted(failure["reason"] for failure in result["failed"])
    assert reasons == ["ended by SIGSEGV", "no progress in 10 s"]
    for failure, key in ((f, k) for f in result["failed"] for k in (crashes, hangs)):
        first_line = key.splitlines()[0]
        assert failure["what"] in done.stderr
        assert first_line in done.stderr
    assert result["emitted"] == result["kernels"] == len(keys) - 2
    # What was there is not made again, and what is missing is made now.
    again = json.loads(command(*arguments, **COMPACT).stdout)
    assert again["emitted"] == 2 and again["kernels"] == len(keys)


def test_what_cannot_be_prewarmed(command, prewarmed: Prewarmed, tmp_path: Path) -> None:
    config = str(prewarmed.config)
    command("prewarm", config, "--isa", "avx2,pdp11", code=1)
    command("prewarm", config, "--dtype", "int3", code=2)
    command("prewarm", config, "--batch", "two", code=2)
    off = command("prewarm", config, code=1, TILEWRIGHT_CACHE="off")
    assert "cache" in off.stderr
    for name in ("nobody/no-such-model", str(tmp_path)):
        done = command("prewarm", name, code=1)
        assert f"tilewright: {name}: " in done.stderr and "Traceback" not in done.stderr
