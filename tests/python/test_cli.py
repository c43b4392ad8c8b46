"""The command tilewright: results, JSON, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_models import tiny_llama

pytest.importorskip("tilewright._core")
pytest.importorskip("typer")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    tiny_llama(3).save_pretrained(directory)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(c): c - 30 for c in range(33, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def command(fresh_cache: Path) -> Iterator:
    def run(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "tilewright.cli", *arguments],
            env={
                **os.environ,
                "TILEWRIGHT_CACHE": "rw",
                "TILEWRIGHT_CACHE_DIR": str(fresh_cache),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    yield run


def test_env(command) -> None:
    data = json.loads(command("env", "--json", TILEWRIGHT_MAX_CPU_ISA="avx2").stdout)
    rows = {row["name"]: row for row in data["variables"]}
    assert rows["TILEWRIGHT_MAX_CPU_ISA"]["value"] == "avx2"
    assert data["target"]["isa"] == "avx2"
    text = command("env").stdout
    assert all(name in text for name in rows)
    assert f"choices: {data['choices']['source']}" in text
    assert all(row["name"] in text for row in data["choices"]["values"])


def test_env_reports_bad_values(command) -> None:
    done = command("env", "--json", TILEWRIGHT_CACHE="sometimes")
    assert any("TILEWRIGHT_CACHE" in problem for problem in json.loads(done.stdout)["problems"])


def test_prewarm_fills_the_cache(command, model_directory: Path) -> None:
    first = json.loads(command("prewarm", str(model_directory), "--json").stdout)
    assert first["emitted"] > 0 and first["loaded"] == 0
    again = json.loads(command("prewarm", str(model_directory), "--json").stdout)
    assert again["emitted"] == 0 and again["loaded"] == first["emitted"]
    entries = json.loads(command("cache", "ls", "--json").stdout)["entries"]
    assert len(entries) == first["emitted"]
    explained = json.loads(
        command("explain", str(model_directory), "--prompt", "abc", "--json").stdout
    )
    assert explained["kernels_emitted"] == 0 and explained["kernels_loaded"] > 0


def test_prewarm_for_another_machine(command, model_directory: Path) -> None:
    for isa in ("avx2", "avx512"):
        result = json.loads(command("prewarm", str(model_directory), "--isa", isa, "--json").stdout)
        assert result["emitted"] > 0 and isa in result["isa"]
    table = command("cache", "ls").stdout
    assert "avx512" in table and "this build" in table


def test_generate(command, model_directory: Path) -> None:
    done = command("generate", str(model_directory), "abc", "--max-new-tokens", "5", "--json")
    assert json.loads(done.stdout)["tokens"] == 5
    plain = command("generate", str(model_directory), "abc", "--max-new-tokens", "5")
    assert "tokens/s" in plain.stderr and "tokens/s" not in plain.stdout


def test_explain(command, model_directory: Path) -> None:
    text = command("explain", str(model_directory), "--prompt", "abc").stdout
    assert "prefill: 1 runs" in text and "decode: 3 runs" in text


def test_exit_codes(command, model_directory: Path, tmp_path: Path) -> None:
    missing = command("generate", str(tmp_path / "nothing"), "abc", code=1)
    assert missing.stderr.startswith("tilewright: ") and "Traceback" not in missing.stderr
    command("prewarm", str(model_directory), "--isa", "pdp11", code=1)
    command("prewarm", str(model_directory), "--dtype", "int3", code=2)
    command("prewarm", str(model_directory), "--batch", "two", code=2)
    command("nonsense", code=2)
    off = command("prewarm", str(model_directory), code=1, TILEWRIGHT_CACHE="off")
    assert "cache" in off.stderr


def test_no_escape_sequences_in_a_pipe(command) -> None:
    done = command("env")
    assert "\x1b" not in done.stdout + done.stderr
