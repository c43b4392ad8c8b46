"""What the Python tests share: a kernel cache of their own, and fresh processes.

Tested by the tests that use it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]

# Where the package is not installed, its pure Python parts can still be tested from the sources.
if importlib.util.find_spec("tilewright") is None:
    sys.path.insert(0, str(SOURCE / "frontends" / "torch"))

# Settings are read once, when tilewright is imported: the tests' cache must be named before that.
# A cache that the caller names is used as it is.
_own_cache = tempfile.TemporaryDirectory(prefix="tilewright-tests-")
os.environ.setdefault("TILEWRIGHT_CACHE_DIR", os.path.join(_own_cache.name, "cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def source_directory() -> Path:
    """The root of the source tree."""
    return SOURCE


@pytest.fixture
def fresh_cache(tmp_path: Path) -> Path:
    """The path of a cache directory that does not exist yet."""
    return tmp_path / "kernel-cache"


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    from tiny_models import tiny_llama

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
def command(fresh_cache: Path) -> Iterator[Command]:
    """Runs the command tilewright in a new process with a cache of its own; checks its code."""

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


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_python() -> Iterator[RunPython]:
    """Runs Python code in a new process and checks that it succeeds, unless check=False."""

    def run(
        code: str,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    yield run
