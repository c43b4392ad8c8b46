"""llm.optimize: makes a causal language model fast by itself, with `generate` unchanged.

Tested by tests/python/test_optimize.py, tests/python/test_bad_input.py.
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import torch
from torch import nn

from tilewright import core
from tilewright.installed import CompiledForward, InstalledForward, called_model, installed_in
from tilewright.packed import unpack_all

log = logging.getLogger("tilewright")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Keywords of the predecessor's llm.optimize, and what to do instead.
_REPLACEMENTS = {
    "quantization_config": "use quantization= (not available yet)",
    "qconfig_summary_file": "use quantization= (not available yet)",
    "low_precision_checkpoint": "load the checkpoint with transformers first",
    "deployment_mode": "drop it: nothing is traced to TorchScript",
    "sample_inputs": "drop it: no sample inputs are needed",
    "optimized_model": "drop it",
    "device": "drop it: the model runs on the CPU",
    "auto_kernel_selection": "set TILEWRIGHT_FALLBACK or TILEWRIGHT_DISABLE",
    "graph_mode": "use torch.compile(model, backend='tilewright')",
    "cache_weight_for_large_batch": "drop it: one packed layout serves every batch",
    "weights_prepack": "drop it: weights are packed at the first call",
}


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    quantization: Any = None,
    kv_cache_dtype: Any = None,
    **unknown: Any,
) -> nn.Module:
    """Returns a model that computes through our programs; `restore` undoes it.

    dtype: float32, bfloat16 or float16 for the parameters; None keeps them. inplace: change `model`
    itself, else a copy (which shares the parameters that keep their type). In place, the memory of
    weights is given back once they are packed; they return to it when something reads them
    (packed.py). The model must be in eval mode and on the CPU.

    kv_cache_dtype: "int8" keeps keys and values in 8 bits with a scale per token and head: half of
    the memory of bf16, a quarter of fp32, and results that differ a little. "auto": in the model's
    type. None: as TILEWRIGHT_KV_CACHE says, which is "auto" if it is not set.

    A causal language model of transformers runs as one program per step; any other module goes
    through torch.compile with our backend. Nothing is captured or packed before the first call.
    Calls that a program cannot run, and models
    that cannot be captured, keep the original forward, with a visible reason (`explain`). A model
    with adapters (PEFT) is optimised inside of its wrapper; adapters may change at any time.
    """
    _refuse_unknown(unknown)
    if quantization is not None:
        raise NotImplementedError("quantization is not available yet; pass quantization=None")
    _check_model(model)
    _check_dtype(dtype)
    stored = core.stored_dtype(kv_cache_dtype)
    if installed_in(model) is not None:
        raise ValueError("this model is optimised already; llm.restore(model) undoes that first")
    causal = _is_causal_language_model(called_model(model))
    if kv_cache_dtype is not None and stored is not None and not causal:
        raise ValueError("kv_cache_dtype is for causal language models of transformers")
    if inplace:
        before = {n: p.dtype for n, p in called_model(model).named_parameters()}
        _convert(model, dtype)
    else:
        before = {}
        model = _copy(model, dtype)
    installed: InstalledForward
    target = called_model(model)
    if causal:
        from tilewright import generation
        from tilewright.decoder import Decoder

        installed = Decoder(target, stored)
        installed.model_programs.frees = inplace
        generation.install(installed)
    else:
        installed = CompiledForward(target)
    installed.parameter_types = before
    installed.install()
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `optimize`: the model's own forward again, and the parameters' former types.

    Values that a conversion rounded stay rounded. A model that is not optimised is returned as is.
    """
    original = called_model(model)
    installed = installed_in(original)
    if installed is None:
        return model
    installed.uninstall()
    if (generation := sys.modules.get("tilewright.generation")) is not None:
        generation.uninstall(original)
    unpack_all(original)
    types = installed.parameter_types
    for name, parameter in original.named_parameters():
        if name in types and parameter.dtype != types[name]:
            parameter.data = parameter.data.to(types[name])
    return model


def _is_causal_language_model(model: nn.Module) -> bool:
    """One of transformers', whose whole step can be a program. Structure decides, not the name."""
    return (
        hasattr(model, "generate")
        and hasattr(getattr(model, "config", None), "get_text_config")
        and getattr(model, "get_output_embeddings", lambda: None)() is not None
        and not getattr(model.config, "is_encoder_decoder", False)
    )


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    for name in unknown:
        advice = _REPLACEMENTS.get(name)
        if advice:
            raise TypeError(f"llm.optimize() has no argument '{name}': {advice}")
        raise TypeError(f"llm.optimize() got an unexpected keyword argument '{name}'")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"llm.optimize() takes a torch.nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("optimize the model first, then torch.compile it")
    if model.training:
        raise ValueError("llm.optimize() is for inference: call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"'{name}' is on the meta device: load the weights first")
        if tensor.device.type != "cpu":
            raise ValueError(
                f"'{name}' is on device {tensor.device}: tilewright runs on the CPU, "
                "call model.cpu() first"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"'{name}' has layout {tensor.layout}: call .to_dense() first")


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(d) for d in DTYPES)
        raise ValueError(f"dtype must be one of {names} or None, not {dtype}")


def _kept_types(model: nn.Module) -> tuple[str, ...]:
    """Parts of names that transformers keeps in fp32 whatever the model's type."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(kept)


def parameter_type(
    model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype | None
) -> torch.dtype:
    """The type a parameter gets."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.dtype
    if any(part in name.split(".") for part in _kept_types(model)):
        return torch.float32
    return dtype


def _convert(model: nn.Module, dtype: torch.dtype | None) -> None:
    """As loading with `dtype` does it: parameters change, non-persistent buffers (the rotary
    frequencies) keep their precision. `model.to` would refuse models that came from GGUF files."""
    if dtype is None:
        return
    losses = Losses()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = losses.convert(
                parameter.data, parameter_type(model, name, parameter, dtype)
            )
    losses.report()
    _set_config_type(model, dtype)


def _copy(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the modules; parameters and buffers that keep their type are shared."""
    losses = Losses()
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        target = parameter_type(model, name, parameter, dtype)
        if target == parameter.dtype:
            memo[id(parameter)] = parameter
        else:
            memo[id(parameter)] = nn.Parameter(
                losses.convert(parameter.detach(), target), requires_grad=parameter.requires_grad
            )
    losses.report()
    copied: nn.Module = copy.deepcopy(model, memo)
    if dtype is not None:
        _set_config_type(copied, dtype)
    return copied


def _set_config_type(model: nn.Module, dtype: torch.dtype) -> None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "dtype"):
        config.dtype = dtype


class Losses:
    """Counts what conversions of float16 to bfloat16 (11 bits of precision to 8) round."""

    def __init__(self) -> None:
        self.values = self.changed = 0
        self.largest = 0.0

    def convert(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        if tensor.dtype == torch.float16 and dtype == torch.bfloat16:
            before, after = tensor.float(), result.float()
            error = (before - after).abs()
            self.values += tensor.numel()
            self.changed += int((error != 0).sum())
            relative = error / before.abs().clamp_min(torch.finfo(torch.float16).tiny)
            self.largest = max(self.largest, float(relative.max()) if tensor.numel() else 0.0)
        return result

    def report(self) -> None:
        if self.values:
            log.warning(
                "float16 to bfloat16 rounded %d of %d weights (%.1f %%), by at most %.2g of their "
                "value; dtype=torch.float16 or torch.float32 keeps them",
                self.changed,
                self.values,
                100.0 * self.changed / self.values,
                self.largest,
            )
