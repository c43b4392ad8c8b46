"""RecordedPlan: a plan in a cache directory as a model to prewarm, where the model is not.

A process that ran the model left the plan (cache/README.md); kernels for other instruction sets,
and a pack of them, can be made of its file alone.

Tested by tests/python/test_prewarm.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright import _core, plans
from tilewright.graph_text import UnsupportedError
from tilewright.lowered import Lowered

SUFFIX = ".plan"


@dataclass(frozen=True)
class RecordedPlan:
    """An entry of the cache, verified."""

    key: str
    name: str
    text: str

    @staticmethod
    def read(source: str) -> RecordedPlan:
        """`source`: a file DIRECTORY/objects/../KEY.plan. OSError or ValueError with the reason if
        it is none, or not one of this build."""
        path = Path(source).absolute()
        if not path.is_file():
            raise OSError(f"{source}: no such file")
        directory = path.parents[2] if len(path.parents) > 2 else path.parent
        row = _row_of(directory, path)
        if row is None or row["kind"] != "plan":
            raise ValueError(f"{source}: not a plan in a cache directory")
        if row["problem"]:
            raise ValueError(f"{source}: {row['problem']}")
        if not row["current"]:
            raise ValueError(f"{source}: made by another build of Tilewright")
        text = _core.cache_entry(str(directory), row["generator"], row["key"])["recipe"]
        return RecordedPlan(row["key"], row["name"], text)

    def lowered(self) -> Lowered:
        """Raises UnsupportedError if it is malformed."""
        logits = re.search(r"^model .* logits (-?\d+)", self.key, re.MULTILINE)
        if logits is None:
            raise UnsupportedError("the key of this plan says nothing of logits")
        try:
            return plans.decode_without_model(self.text, int(logits[1]))
        except plans.MalformedPlanError as error:
            raise UnsupportedError(str(error)) from None


def _row_of(directory: Path, path: Path) -> dict[str, Any] | None:
    try:
        rows = _core.cache_entries(str(directory))
    except _core.CoreError:
        return None
    return next((row for row in rows if (directory / row["file"]) == path), None)
