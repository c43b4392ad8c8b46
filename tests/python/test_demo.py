"""The demo's frame: rows are compared with eager's tokens, and a difference is an error.

What it measures is covered by the tests of optimize, backend and generate; the real model takes a
minute and runs as ``./dev demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tilewright import demo


def counted() -> dict[str, Any]:
    return {
        "own_flops_share": 1.0,
        "own_time_share": 1.0,
        "fallback_calls": 0,
        "steps_per_layer": 5.0,
    }


def row(name: str, tokens: list[int]) -> demo.Row:
    explanation = {"phases": {"prefill": counted(), "decode": counted()}}
    return demo.Row(name, text="a text", tokens=tokens, explanation=explanation)


@pytest.mark.parametrize(("tokens", "code"), [([1, 2, 3], 0), ([1, 2, 4], 1)])
def test_rows_are_compared_with_eager(
    tokens: list[int],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    rows = {name: row(name, [1, 2, 3]) for name in demo.ROWS}
    rows["compile"] = row("compile", tokens)
    monkeypatch.setattr(demo, "prepare_model", lambda directory: None)
    monkeypatch.setattr(demo, "run_in_process", lambda name, *rest: rows[name])
    assert demo.main(["--model", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert printed.count("identical to eager") == 4 - code
    assert ("DIFFERENT from eager" in printed) == bool(code)
    assert "steps_per_layer 5" in printed and "a text" in printed


def test_the_converted_model_lies_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.model_directory().is_relative_to(tmp_path)


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    demo.prepare_model(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
