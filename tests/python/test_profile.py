"""TILEWRIGHT_VERBOSE=profile: the table names what ran, and its rows add up to the time."""

from __future__ import annotations

import re
from typing import Any

STEPS = """
import time, torch, tilewright
from transformers import LlamaConfig, LlamaForCausalLM, DynamicCache

torch.manual_seed(0)
config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
model = tilewright.llm.optimize(LlamaForCausalLM(config).eval())
with torch.inference_mode():
    cache = model(torch.arange(32).view(1, -1), use_cache=True).past_key_values
    model(torch.tensor([[1]]), past_key_values=cache)
    start = time.perf_counter()
    for token in range(50):
        model(torch.tensor([[token]]), past_key_values=cache)
    print(time.perf_counter() - start)
"""


def test_rows_add_up_to_the_time(run_python: Any) -> None:
    done = run_python(STEPS, {"TILEWRIGHT_VERBOSE": "profile"})
    measured = float(done.stdout) / 50
    table = done.stderr[done.stderr.index("tilewright: where the time went") :]
    prefill, decode = table.split("decode: ")
    assert "prefill: 1 runs" in prefill
    header = re.match(r"(\d+) runs, ([\d.]+) ms each", decode)
    assert header is not None and int(header[1]) == 51
    found = [
        re.match(r" +([\d.]+) +[\d.]+%.*? ([a-z][^:]*): ", line) for line in decode.splitlines()[2:]
    ]
    rows = {row[2]: float(row[1]) for row in found if row}
    assert len(rows) >= 8 and {"the caller", "runs"} <= set(rows)
    assert any("linear" in name for name in rows) and any("attention" in name for name in rows)
    # The first decode step has a kernel to make; all others were measured.
    total = float(header[2]) / 1e3 * 51 - measured * 50
    assert total > -0.05 * measured * 50, (header[2], measured)


def test_silent_otherwise(run_python: Any) -> None:
    assert "where the time went" not in run_python(STEPS, {"TILEWRIGHT_VERBOSE": "1"}).stderr
