"""Makes GGUF files for llama.cpp from a model's directory: no vocabulary, tokens go in as ids.

fp32 and bf16 keep every weight; int8 is Q8_0 and int4 is Q4_0 (blocks of 32 with an fp16 scale:
8.5 and 4.5 bits a weight). Keys and queries of the llama architecture are permuted, as llama.cpp
rotates neighbours where transformers rotates halves. Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench_models.models import read_tensors

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FILE_TYPES = {"fp32": 0, "bf16": 32, "int8": 7, "int4": 2}


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls a parameter; None for what it computes itself."""
    if name in NAMES:
        return NAMES[name]
    if not name.startswith("model.layers."):
        return None
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}" if part in LAYER_NAMES else None


def permuted(tensor: Any, heads: int) -> Any:
    """Rows of each head: halves become neighbours."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _rope_theta(config: dict[str, Any]) -> float:
    """Where the versions of transformers keep it."""
    nested = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or nested.get("rope_theta") or 1e4)


def write(directory: Path, target: Path, dtype: str) -> None:
    """Writes the file under a temporary name first."""
    import gguf

    config = json.loads((directory / "config.json").read_text())
    architecture = config["model_type"]
    heads = config["num_attention_heads"]
    key_value_heads = config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    file = gguf.GGUFWriter(str(partial), architecture)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads)
    file.add_head_count_kv(key_value_heads)
    file.add_key_length(head_size)
    file.add_value_length(head_size)
    file.add_rope_dimension_count(head_size)
    file.add_rope_freq_base(_rope_theta(config))
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_vocab_size(config["vocab_size"])
    file.add_tokenizer_model("no_vocab")
    file.add_file_type(FILE_TYPES[dtype])
    kind = {
        "fp32": gguf.GGMLQuantizationType.F32,
        "bf16": gguf.GGMLQuantizationType.BF16,
        "int8": gguf.GGMLQuantizationType.Q8_0,
        "int4": gguf.GGMLQuantizationType.Q4_0,
    }[dtype]
    for name, tensor in read_tensors(directory):
        renamed = gguf_name(name)
        if renamed is None:
            continue
        values = tensor.float()
        if architecture == "llama" and ".q_proj." in name:
            values = permuted(values, heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permuted(values, key_value_heads)
        array = values.numpy()
        if array.ndim == 1 or dtype == "fp32":
            file.add_tensor(renamed, array)
        else:
            file.add_tensor(renamed, gguf.quantize(array, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    partial.rename(target)
