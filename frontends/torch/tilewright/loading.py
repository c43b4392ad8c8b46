"""from_pretrained under `tilewright run`: every model that a program loads is optimised in place.

Whatever goes wrong is one warning that names the model and the reason, and the program goes on
with the model as it was loaded.

Tested by tests/python/test_run.py.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

log = logging.getLogger("tilewright")

_nested = threading.local()  # a model of several models loads them by the same method


def install(base: Any) -> None:
    """`base`: transformers' PreTrainedModel, whose class method is replaced."""
    original = base.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        _nested.depth = getattr(_nested, "depth", 0) + 1
        try:
            result = original(cls, *args, **kwargs)
        finally:
            _nested.depth -= 1
        if _nested.depth == 0:
            _optimize(result[0] if isinstance(result, tuple) else result)
        return result

    base.from_pretrained = classmethod(from_pretrained)


def _optimize(model: Any) -> None:
    try:
        import torch

        from tilewright import core, llm

        core.engine()  # a machine that cannot run our code at all is a reason, too
        name = core.settings()["run_dtype"]
        llm.optimize(model, dtype=getattr(torch, name) if name else None, inplace=True)
        log.info("%s is optimised", type(model).__name__)
    except Exception as error:
        log.warning("%s is not optimised: %s", type(model).__name__, error)
