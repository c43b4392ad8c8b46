"""A model of the right shapes whose weights are not there, for prewarm.

Kernels depend on shapes, types and the storage of weights, never on values. So a configuration is
enough: parameters are memory that nothing touches, which costs addresses and no pages; what a model
computes at construction (rotary frequencies) is computed. Nothing is ever downloaded.

Tested by tests/python/test_prewarm.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tilewright import llm

TYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def model_of_shapes(source: str, dtype: str | None) -> Any:
    """`source`: a directory, a config.json, a .gguf file, or a name that is on disk already.

    `dtype`: one of TYPE_NAMES, or None for the checkpoint's own. OSError or ValueError with the
    reason if there is no such model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = configuration(source)
    wanted = TYPE_NAMES[dtype] if dtype else _stored_type(source, config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted).eval()
    model.tie_weights()  # initialisation would have
    for name, parameter in model.named_parameters():
        kept = llm.parameter_type(model, name, parameter, wanted)
        if kept != parameter.dtype:
            parameter.data = torch.empty_like(parameter, dtype=kept)
    return model


def configuration(source: str) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    if path.suffix == ".gguf":
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if not path.exists() and (path.is_absolute() or path.suffix in (".json", ".pt2")):
        raise OSError(f"{source}: no such file or directory")
    return AutoConfig.from_pretrained(source, local_files_only=True)


def _stored_type(source: str, config: Any) -> torch.dtype:
    """What `from_pretrained` with dtype="auto" gives: the configuration's, else the weights'."""
    stated = getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated)
    if isinstance(stated, torch.dtype):
        return stated
    for file in sorted(Path(source).glob("*.safetensors")):
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if (found := weights.get_slice(name).get_dtype()) in ("F32", "BF16", "F16"):
                    return {"F32": torch.float32, "BF16": torch.bfloat16}.get(found, torch.float16)
    return torch.float32
