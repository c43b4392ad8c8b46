"""What a model's forward returns, made at each call.

transformers' outputs are dataclasses and dicts at once. Their constructor asks each field for its
default, value and place: 13 us, more than all checks of a call. What it does is the same each time,
so it is done here at once. A type that has any of it in a way of its own is constructed.

Thread-safe. Tested by tests/python/test_call_surface.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

from transformers.utils.generic import ModelOutput

_CONSTRUCTION = ("__new__", "__post_init__", "__setattr__", "__setitem__")


def model_output(kind: Any, **given: Any) -> Any:
    """kind(**given)"""
    fields = _fields(kind)
    if fields is None or not given.keys() <= fields.keys():
        return kind(**given)
    output = kind.__new__(kind)
    values = fields | given
    output.__dict__.update(values)
    for name, value in values.items():
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
    return output


@functools.cache
def _fields(kind: type) -> dict[str, None] | None:
    """The fields, in order, if the constructor is what transformers and dataclasses make of them:
    None is their default, and those with a value are items, too."""
    parameters = kind.__dict__.get("__dataclass_params__")
    if (
        not issubclass(kind, ModelOutput)
        or parameters is None
        or not parameters.init
        or any(getattr(kind, name) is not getattr(ModelOutput, name) for name in _CONSTRUCTION)
    ):
        return None
    fields = dataclasses.fields(kind)
    if not all(field.init and field.default is None for field in fields):
        return None
    return {field.name: None for field in fields}
