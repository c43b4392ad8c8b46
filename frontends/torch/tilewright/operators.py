"""torch.ops.tilewright.step: a run of a program as an operator of torch.

    step(int program, Tensor[] inputs, int[] sizes, int[] caches, bool decode, int threads)
        -> Tensor[]

`program` and `caches` are handles of core objects, `sizes` the numbers that a graph takes beside
tensors. Registered in C++ through torch's stable ABI (operators.cpp); here are its loading and its
fake implementation, which gives the shapes without running.

Thread-safe: a program runs one step at a time. Tested by tests/python/test_operators.py.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilewright import _core

# handle -> what tells the shapes of a program's results.
_fakes: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _load() -> Callable[..., list[torch.Tensor]]:
    path = str(Path(_core.__file__).with_name("_operators.so"))
    torch.ops.load_library(path)
    ctypes.CDLL(path).tilewright_connect(ctypes.c_void_p(_core.step_function()))
    # Not register_fake: it asks where its caller's source is, which looks at the files of all
    # loaded modules: 30 ms of a start.
    torch.library.impl("tilewright::step", "Meta")(_fake)
    return torch.ops.tilewright.step.default


def _fake(
    program: int,
    inputs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    caches: Sequence[int],
    decode: bool,
    threads: int,
) -> list[torch.Tensor]:
    executable = _fakes.get(program)
    if executable is None:
        raise RuntimeError("tilewright::step: this program is gone")
    results: list[torch.Tensor] = executable.empty_results(inputs, sizes)
    return results


def register(handle: int, executable: Any) -> None:
    """`executable.empty_results(inputs, sizes)` becomes the fake of this program."""
    _fakes[handle] = executable


step = _load()
