"""Small random language models: real architectures, sizes that run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

VOCABULARY = 160


def llama_config(layers: int = 4, **changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **changes})


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights large enough that greedy tokens vary."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def tiny_llama(layers: int = 4, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return build(llama_config(layers, **changes), dtype)


def prompt(batch: int = 1, tokens: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + tokens)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Left-padded prompts and their mask."""
    width = max(lengths)
    ids, mask = prompt(len(lengths), width), torch.ones(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}
