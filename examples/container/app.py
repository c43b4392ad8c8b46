"""A program that uses transformers as any does; `tilewright run` makes its model fast.

The last line is for the operator: what was emitted (nothing, in a prewarmed image) and loaded.

Tested by tests/python/test_container.py.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.arange(1, 33).reshape(1, -1)  # a real program has a tokenizer
tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
print("tokens:", tokens[0, prompt.shape[1] :].tolist())

if "tilewright" in sys.modules:
    stats = sys.modules["tilewright"].stats()
    cache = stats["kernel_cache"]
    print(json.dumps({**stats["kernels"], "pack_hits": cache["pack_hits"]}))
