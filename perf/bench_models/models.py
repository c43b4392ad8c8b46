"""The models: SmolLM2-135M with its real weights, and random weights in the true shapes of others.

Random weights are N(0, 0.02) in bf16, no zeros, made layer by layer (one shard per layer, so a 8B
model needs the memory of one layer) into a directory outside the repository, never committed.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_models import places


@dataclass(frozen=True)
class Shape:
    """What the limits and the makers need to know about a decoder."""

    architecture: str  # llama, qwen2 or qwen3
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    rope_theta: float
    tied: bool = True
    real_weights: bool = False

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear parts."""
        attention = 2 * self.heads * self.head_size + 2 * self.key_value_heads * self.head_size
        return self.hidden * (attention + 3 * self.intermediate)

    @property
    def read_per_token(self) -> int:
        """Parameters that a decoded token reads: every layer and the head, not the embedding."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.read_per_token + (0 if self.tied else self.vocabulary * self.hidden)


MODELS = {
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e5, real_weights=True),
    "smollm2-360m": Shape("llama", 49152, 960, 2560, 32, 15, 5, 64, 1e5),
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e6),
    "qwen3-0.6b": Shape("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 1e6),
    "llama-1b": Shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, 5e5),
    "qwen2.5-1.5b": Shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 1e6),
    "llama-3b": Shape("llama", 128256, 3072, 8192, 28, 24, 8, 128, 5e5),
    "qwen3-4b": Shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 1e6),
    "llama-8b": Shape("llama", 128256, 4096, 14336, 32, 32, 8, 128, 5e5, tied=False),
    # For the harness's own checks: seconds, not minutes.
    "tiny": Shape("llama", 512, 64, 128, 2, 4, 2, 16, 1e4),
}


def configuration(shape: Shape) -> Any:
    """The transformers configuration."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[shape.architecture]
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def _shard_of(name: str) -> str:
    """Parameters of one layer share a file."""
    parts = name.split(".")
    return f"layer-{int(parts[2]):03d}" if parts[:2] == ["model", "layers"] else "rest"


def _make_random(shape: Shape, directory: Path) -> None:
    """Writes configuration and shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = configuration(shape)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[tuple[str, Any]]] = {}
    for name, tensor in skeleton.state_dict().items():
        if not (shape.tied and name == "lm_head.weight"):
            shards.setdefault(_shard_of(name), []).append((name, tensor.shape))
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    total = 0
    for shard, entries in sorted(shards.items()):
        tensors = {}
        for name, size in entries:
            if name.endswith("norm.weight"):
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            else:
                drawn = torch.empty(size).normal_(0.0, 0.02, generator=generator)
                tensors[name] = drawn.to(torch.bfloat16)
            index[name] = f"model-{shard}.safetensors"
            total += 2 * tensors[name].numel()
        save_file(tensors, directory / f"model-{shard}.safetensors", metadata={"format": "pt"})
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(record, indent=1))
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(directory)


def directory_of(name: str) -> Path:
    """The model's directory, made at the first use; half-made ones are never used."""
    shape = MODELS[name]
    if shape.real_weights:
        from tilewright import demo

        directory = demo.model_directory()
        demo.prepare_model(directory)
        return directory
    directory = places.home() / "models" / name
    if (directory / "config.json").exists():
        return directory
    print(f"making random weights of {name} (once) ...", file=sys.stderr, flush=True)
    partial = directory.with_name(f"{name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _make_random(shape, partial)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def read_tensors(directory: Path) -> Iterable[tuple[str, Any]]:
    """(name, tensor) of every parameter, one file at a time."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
