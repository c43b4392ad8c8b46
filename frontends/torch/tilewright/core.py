"""The compiled core: the only module that imports `tilewright._core`.

One engine (target, cache on disk, kernels) per process, made at first use, so that `import
tilewright` reads no file and starts no thread.

Tested by tests/python/test_backend.py.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from importlib import metadata
from typing import Any

import torch

from tilewright import _core

log = logging.getLogger("tilewright")
CoreError = _core.CoreError
KvCache = _core.KvCache
PagedCaches = _core.PagedCaches

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_said: set[str] = set()
_lock = threading.Lock()


def _sink(level: int, message: str) -> None:
    log.log(_LEVELS[level], "%s", message)


@functools.cache
def engine() -> Any:
    """The engine of this process. CoreError when this machine cannot run our code at all."""
    _configure_logging()
    _core.forward_log(_sink)
    atexit.register(_core.forward_log, None)
    _core.log_problems()
    if settings()["onednn"]:
        _load_onednn()
    return _core.Engine()


def engine_for(rung: str, choices: str = "") -> Any:
    """An engine that emits for another machine, to fill the cache; or that has other choices of
    speed (a JSON object; {} are the shipped ones), to measure them."""
    return _core.Engine(rung, choices)


@functools.cache
def settings() -> dict[str, Any]:
    """What the environment variables say, typed."""
    return dict(_core.settings())


@functools.cache
def unavailable() -> str:
    """Why everything runs in PyTorch; "" if it does not.

    Where executable memory is refused, the first call also switches PyTorch's oneDNN off for the
    process, which emits code as well: some of PyTorch's ops raise with it.
    """
    if settings()["disable_all"]:
        return "TILEWRIGHT_DISABLE=1"
    try:
        problem = str(engine().problem)
    except CoreError as error:
        return str(error)
    if _core.executable_memory_problem():
        torch.backends.mkldnn.set_flags(False)
    return problem


def stored_dtype(given: Any = None) -> torch.dtype | None:
    """The type in which caches keep keys and values: int8, or None, the model's own. given: "int8",
    "auto", or None, which is what TILEWRIGHT_KV_CACHE says. Raises ValueError."""
    asked = settings()["kv_cache"] if given is None else given
    if asked in ("int8", torch.int8):
        return torch.int8
    if asked == "auto":
        return None
    raise ValueError(f"kv_cache_dtype is None, 'auto' or 'int8', not {given!r}")


def threads() -> int:
    """Of a step that begins now: what torch, the affinity mask and the control group's quota allow,
    or TILEWRIGHT_NUM_THREADS."""
    return _core.thread_count(torch.get_num_threads())


def thread_limits() -> dict[str, Any]:
    """The count of `threads`, what decided it ("torch", "affinity", "quota", or "setting"), and the
    limits."""
    return _core.thread_limits(torch.get_num_threads())


def say_once(message: str) -> None:
    """A warning that is worth one line per process."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    log.warning("%s", message)


def say_fallback(what: str, reason: str) -> None:
    """That `what` runs in PyTorch: one warning, and one for all of them if everything does."""
    subject = "everything" if reason == unavailable() else what
    say_once(f"{subject} runs in PyTorch: {reason}")


def _configure_logging() -> None:
    """TILEWRIGHT_VERBOSE speaks on stderr unless the program has set up logging itself."""
    verbose = settings()["verbose"]
    if verbose and not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tilewright: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


def _load_onednn() -> None:
    """oneDNN from the PyPI package onednn-cpu-gomp, or from where the loader looks."""
    path = ""
    for package in ("onednn-cpu-gomp", "onednn-devel-cpu-gomp"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        libraries = [file for file in files if file.name.startswith("libdnnl.so")]
        if libraries:
            path = os.fspath(sorted(libraries, key=lambda f: len(f.name))[0].locate())
            break
    try:
        _core.load_onednn(path)
    except CoreError as error:
        say_once(f"TILEWRIGHT_FALLBACK=onednn: {error}; ATen is used instead")


def variables() -> list[dict[str, Any]]:
    """The table of environment variables with their present values."""
    return list(_core.variables())


def counters() -> dict[str, Any]:
    """Kernels emitted and loaded by this process so far."""
    return dict(engine().kernel_counters())


def weight_counters() -> dict[str, Any]:
    """Weights that this process packed, mapped from files and wrote to files so far."""
    return dict(engine().weight_counters())
