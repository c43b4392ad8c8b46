"""tilewright run: unchanged programs, with their models optimised."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")

# A program that knows nothing of us, but for the last lines, in which the test looks behind it.
_APP = """
import sys
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
ids = torch.arange(1, 20).reshape(1, -1)
tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(tokens.tolist())

if "tilewright" in sys.modules:
    import tilewright
    print(tilewright.stats()["tokens"], next(model.parameters()).dtype)
    print(tilewright.explain(model).to_dict()["kernels_emitted"] is not None)
"""


def test_a_program_is_optimised(command, model_directory: Path, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(_APP)
    program = [sys.executable, str(app), str(model_directory)]
    plain = command("run", "--", *program).stdout.splitlines()
    assert plain[1] == "22 torch.float32"  # 19 of the prompt, 3 of 4 steps more
    half = command("run", "--dtype", "bf16", "--", *program).stdout.splitlines()
    assert half[1] == "22 torch.bfloat16"
    import subprocess

    alone = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert alone.splitlines() == plain[:1]


def test_what_cannot_be_optimised_goes_on(command, model_directory: Path, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(
        "import sys, tilewright.llm\n"
        "def refuse(*args, **kwargs): raise ValueError('for a reason')\n"
        "tilewright.llm.optimize = refuse\n" + _APP.split('if "tilewright"')[0]
    )
    done = command("run", "--", sys.executable, str(app), str(model_directory))
    assert "LlamaForCausalLM is not optimised: for a reason" in done.stderr
    assert done.stdout.startswith("[[1, 2, 3")


def test_other_programs_are_not_touched(command, tmp_path: Path) -> None:
    """Neither imports nor paths nor exit codes change, and a sitecustomize of the site runs."""
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.site_was_here = True\n")
    code = (
        "import sys, os\n"
        "print(site_was_here, sys.modules['sitecustomize'].__file__)\n"
        "print([m for m in ('torch', 'tilewright', 'transformers') if m in sys.modules])\n"
        "print([p for p in sys.path if 'run_hook' in p])\n"
        "print(sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = command("run", "--", sys.executable, "-c", code, "--dtype", "x", code=7,
                   PYTHONPATH=paths)  # fmt: skip
    assert done.stdout.splitlines() == [
        f"True {tmp_path / 'sitecustomize.py'}",
        "[]",
        "[]",
        "['--dtype', 'x']",
    ]
    assert done.stderr == ""
    # Programs of any kind.
    assert command("run", "echo", "--dtype").stdout == "--dtype\n"
    assert "no-such-program" in command("run", "--", "no-such-program", code=1).stderr
    command("run", "--dtype", "int3", "--", "true", code=2)


def test_children_are_optimised_too(command, model_directory: Path, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(_APP)
    parent = (
        f"import subprocess, sys; subprocess.run({[sys.executable, str(app)]!r} + sys.argv[1:])"
    )
    done = command("run", "--", sys.executable, "-c", parent, str(model_directory))
    assert done.stdout.splitlines()[1].startswith("22 ")
