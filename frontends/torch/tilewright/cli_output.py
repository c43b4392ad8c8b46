"""What the commands of `tilewright` share: where they write, and their common arguments.

Tested by tests/python/test_cli.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[str, typer.Argument(help="A directory or a name that transformers can load.")]
DataType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the model's own if not given.")
]


def fail(reason: str) -> NoReturn:
    err.print(f"tilewright: {reason}", style="red", markup=False)
    raise typer.Exit(1)


def show(data: Any, as_json: bool, text: Any) -> None:
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        out.print(text)
