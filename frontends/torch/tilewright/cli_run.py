"""`tilewright run -- python app.py`: an unchanged program whose models are optimised.

The program gets an environment in which Python imports run_hook/sitecustomize.py first, and takes
the place of this process: signals, exit code and terminal are its own.

Tested by tests/python/test_run.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tilewright.cli_output import fail

HOOK = Path(__file__).resolve().parent / "run_hook"
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(
    command: Annotated[
        list[str], typer.Argument(help="The program and its arguments, as python app.py.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; each model's own if not given."),
    ] = None,
) -> None:
    """Run a program with every model that it loads by from_pretrained optimised."""
    name = _TYPES.get(dtype, dtype) if dtype is not None else None
    if name is not None and name not in _TYPES.values():
        raise typer.BadParameter(f"'{dtype}' is not one of {', '.join(_TYPES.values())}")
    try:
        os.execvpe(command[0], command, environment(os.environ, name))
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}")


def environment(given: Mapping[str, str], dtype: str | None) -> dict[str, str]:
    """With the hook, and the type for its models."""
    paths = [str(HOOK), *filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
    changed = {**given, "PYTHONPATH": os.pathsep.join(paths)}
    if dtype is not None:
        changed["TILEWRIGHT_RUN_DTYPE"] = dtype
    return changed
