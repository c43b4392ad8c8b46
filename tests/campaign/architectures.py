"""Tiny random instances of the architectures that transformers has, for campaigns.

A row is a model class, a configuration that is small but keeps what makes the architecture special
(a sliding window shorter than the prompts, fewer key heads than heads, several experts), and a way
to make inputs. Every other causal language model gets a configuration by shrinking its defaults.

Tested by tests/campaign/models.py, which builds every one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 160
LAYERS = 4

# Sizes by the names that configurations use for them; each takes those that it knows.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "ffn_dim": 96,
    "d_ff": 96,
    "d_kv": 16,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "n_positions": 512,
    "max_position_embeddings": 512,
    "max_target_positions": 512,
    "max_source_positions": 64,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "expand": 2,
    "mamba_d_state": 8,
    "state_size": 8,
}
ROUTED = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# What `others` set where a configuration has it.
OPTIONAL = {**ROUTED, **LATENT, "is_decoder": True}

Inputs = Callable[[Any, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """`auto`: the name of transformers' auto class. `changes`: to the configuration."""

    model_type: str
    auto: str = "AutoModelForCausalLM"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What is compared: the tokens of "causal" and "sequence" models, else outputs only."""
        if self.auto == "AutoModelForCausalLM":
            return "causal"
        return "sequence" if "Seq2Seq" in self.auto else "other"


_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# The list of the project's goals.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture(
        "gemma3_text", changes={"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    ),
    "phi": Architecture("phi"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
    "gpt_neox": Architecture("gpt_neox"),
    "gptj": Architecture("gptj"),
    "opt": Architecture("opt"),
    "falcon": Architecture("falcon"),
    "falcon_alibi": Architecture("falcon", changes={"alibi": True, "multi_query": False}),
    "falcon_grouped": Architecture(
        "falcon", changes={"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "bloom": Architecture("bloom"),
    "mixtral": Architecture("mixtral"),
    "qwen3_moe": Architecture("qwen3_moe"),
    "gpt_oss": Architecture("gpt_oss"),
    "olmo2": Architecture("olmo2"),
    "stablelm": Architecture("stablelm"),
    "cohere": Architecture("cohere"),
    "bert": Architecture("bert", "AutoModel"),
    "modernbert": Architecture("modernbert", "AutoModel", {"local_attention": 16}),
    "vit": Architecture("vit", "AutoModel", _VISION),
    "t5": Architecture("t5", "AutoModelForSeq2SeqLM", {"decoder_start_token_id": 0}),
    "whisper": Architecture(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "llava": Architecture(
        "llava",
        "AutoModelForImageTextToText",
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "text_config": _TEXT,
            "image_token_index": VOCABULARY - 1,
            "image_token_id": VOCABULARY - 1,
        },
    ),
}


def others() -> dict[str, Architecture]:
    """Causal language models of transformers that have no row above."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = {architecture.model_type for architecture in ARCHITECTURES.values()}
    return {
        name: Architecture(name, changes=OPTIONAL)
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in listed
    }


def configuration(architecture: Architecture) -> Any:
    from transformers import AutoConfig

    defaults = type(AutoConfig.for_model(architecture.model_type))
    known = {**defaults().to_dict(), **defaults.attribute_map}
    settings = {k: v for k, v in _SMALL.items() if k in known}
    own = {k: v for k, v in architecture.changes.items() if k in known or k not in OPTIONAL}
    if known.get("qk_rope_head_dim"):  # of latent attention: all heads have keys of their own
        own.update(num_key_value_heads=4, head_dim=own["qk_rope_head_dim"])
    # A name that is only another spelling must not be given twice.
    for alias, name in defaults.attribute_map.items():
        if alias in settings and name in settings:
            del settings[alias]
    return defaults(**{**settings, **own})


def build(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Any:
    """The model in eval mode, with weights large enough that every part of it matters."""
    import transformers

    config = configuration(architecture)
    text = config.get_text_config()
    if (getattr(text, "num_hidden_layers", 0) or 0) > 12 or getattr(text, "hidden_size", 0) > 512:
        raise ValueError("the configuration cannot be shrunk")
    torch.manual_seed(7)
    model = getattr(transformers, architecture.auto).from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif not name.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.eos_token_id = None
        settings.pad_token_id = 0
    return model


def prompt(
    batch: int, tokens: int, padding: bool = False, draw: int = 0
) -> dict[str, torch.Tensor]:
    """Token ids, others for each draw; with padding on the left in all rows but the first."""
    generator = torch.Generator().manual_seed((draw * 100 + batch) * 1000 + tokens)
    ids = torch.randint(2, VOCABULARY - 1, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(1, batch):
            missing = min(row * max(1, tokens // 4), tokens - 1)
            ids[row, :missing] = 0
            mask[row, :missing] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_for(
    architecture: Architecture, model: Any, batch: int, tokens: int, draw: int = 0
) -> dict[str, Any]:
    """Keyword arguments for the model's forward and, where it has one, generate."""
    generator = torch.Generator().manual_seed((draw * 100 + batch) * 1000 + tokens)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if architecture.model_type == "vit":
        return {"pixel_values": noise(batch, 3, 32, 32)}
    if architecture.model_type == "whisper":
        return {"input_features": noise(batch, model.config.num_mel_bins, 128)}
    given: dict[str, Any] = prompt(batch, tokens, batch > 1, draw)
    if architecture.auto == "AutoModelForImageTextToText":
        patches = (_VISION["image_size"] // _VISION["patch_size"]) ** 2  # type: ignore[operator]
        image = torch.full((batch, patches), VOCABULARY - 1)
        ones = torch.ones_like(image)
        given["input_ids"] = torch.cat([given["input_ids"], image, given["input_ids"]], 1)
        given["attention_mask"] = torch.cat(
            [given["attention_mask"], ones, torch.ones_like(given["attention_mask"])], 1
        )
        given["pixel_values"] = noise(batch, 3, 32, 32)
    return given
