"""The command tilewright: results, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")


def test_env(command) -> None:
    data = json.loads(command("env", "--json", TILEWRIGHT_MAX_CPU_ISA="avx2").stdout)
    rows = {row["name"]: row for row in data["variables"]}
    assert rows["TILEWRIGHT_MAX_CPU_ISA"]["value"] == "avx2"
    assert data["target"]["isa"] == "avx2"
    text = command("env").stdout
    assert all(name in text for name in rows)
    assert f"choices: {data['choices']['source']}" in text
    assert all(row["name"] in text for row in data["choices"]["values"])


def test_readme_has_the_same_table(command, source_directory: Path) -> None:
    rows = json.loads(command("env", "--json").stdout)["variables"]
    expected = [
        f"| `{row['name']}` | {row['default']} | {row['values']} | {row['documentation']} |"
        for row in rows
    ]
    readme = (source_directory / "README.md").read_text()
    found = [line for line in readme.splitlines() if line.startswith("| `TILEWRIGHT_")]
    assert found == expected, "README's table of settings should be:\n" + "\n".join(expected)


def test_env_reports_bad_values(command) -> None:
    done = command("env", "--json", TILEWRIGHT_CACHE="sometimes")
    assert any("TILEWRIGHT_CACHE" in problem for problem in json.loads(done.stdout)["problems"])


def test_generate(command, model_directory: Path) -> None:
    done = command("generate", str(model_directory), "abc", "--max-new-tokens", "5", "--json")
    assert json.loads(done.stdout)["tokens"] == 5
    plain = command("generate", str(model_directory), "abc", "--max-new-tokens", "5")
    assert "tokens/s" in plain.stderr and "tokens/s" not in plain.stdout


def test_explain(command, model_directory: Path) -> None:
    text = command("explain", str(model_directory), "--prompt", "abc").stdout
    assert "prefill: 1 runs" in text and "decode: 3 runs" in text


def test_exit_codes(command, tmp_path: Path) -> None:
    missing = command("generate", str(tmp_path / "nothing"), "abc", code=1)
    assert missing.stderr.startswith("tilewright: ") and "Traceback" not in missing.stderr
    command("nonsense", code=2)


def test_no_escape_sequences_in_a_pipe(command) -> None:
    done = command("env")
    assert "\x1b" not in done.stdout + done.stderr
