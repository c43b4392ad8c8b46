"""Step: a call of a model in the form that programs take, and what of a call's arguments it needs.

Whatever a program does not compute with, or would not read as the model's own forward does, makes a
call one for that forward: NotRunnableError says why.

Tested by tests/python/test_call_surface.py, test_generate.py, test_architectures.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# What a program computes with; any other argument must be None or false.
_KNOWN = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "return_dict",
    }
)


class NotRunnableError(Exception):
    """This call is not for a program; the message says why."""


class NotCapturedError(NotRunnableError):
    """No program can be made of this model."""


@dataclass(eq=False, repr=False)
class Step:
    """A call in the form that programs take."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cache: Any
    logits_to_keep: int


@dataclass(eq=False, repr=False)
class Ends:
    """When sequences are finished, and which are."""

    tokens: list[int]
    pad: int
    finished: list[bool]  # per sequence, or empty: none
    least_tokens: int = 0  # that come before one of `tokens` may


def checked(arguments: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The call's input_ids and logits_to_keep, if the other arguments are for a program."""
    for name, value in arguments.items():
        if name not in _KNOWN and value is not None and value is not False:
            raise NotRunnableError(f"the argument {name} is given")
    keep = arguments.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 0:
        raise NotRunnableError("logits_to_keep is a tensor")
    input_ids = arguments.get("input_ids")
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.dim() != 2
        or not input_ids.is_cpu
        or input_ids.numel() == 0
    ):
        raise NotRunnableError("input_ids is not a CPU tensor [batch, tokens]")
    # Before the caller's cache gets our layers: a mask that was made for its own would not fit.
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise NotRunnableError("attention_mask is not [batch, keys]")
    return input_ids, keep


def flattened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Bound arguments with `**kwargs` taken apart."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat.update(value if name == "kwargs" else {name: value})
    return flat


def positions_of(given: Any, batch: int, tokens: int, past: int) -> torch.Tensor:
    if given is None and tokens == 1:
        return torch.full((batch, 1), past)
    if given is None:
        return torch.arange(past, past + tokens).expand(batch, tokens).contiguous()
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or given.shape[1] != tokens:
        raise NotRunnableError("position_ids is not [batch, tokens]")
    return given.to(torch.int64).expand(batch, tokens).contiguous()


def counted_positions(counted: str, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of the last `tokens` keys of the mask [b, keys]: all are counted, or those that it keeps."""
    ones = torch.ones_like(mask) if counted == "tokens" else mask
    return (ones.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def is_run(positions: Any) -> bool:
    """Whether each row counts up by one."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return True
    return bool((positions[:, 1:] - positions[:, :-1] == 1).all())


def first_keys_of(mask: torch.Tensor | None, batch: int, keys: int) -> list[int]:
    """Where each sequence begins: the number of leading zeros of its mask."""
    if mask is None:
        return [0] * batch
    if tuple(mask.shape) != (batch, keys):
        raise NotRunnableError(f"attention_mask is {tuple(mask.shape)}, not {(batch, keys)}")
    if bool(mask.all()):
        return [0] * batch
    mask = mask.bool()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all()):
        raise NotRunnableError("attention_mask is not left padding")
    return [int(n) for n in (keys - mask.sum(-1)).tolist()]
