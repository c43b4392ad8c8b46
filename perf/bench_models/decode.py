"""Our decode, token by token, with memory read between tokens: its share of what memory allows.

Memory of a shared machine changes by 1.5x within minutes, or seconds: a block of `models` behind
16384 tokens takes minutes and is dropped. Here memory is read before and after each token, and a
token counts if both agree. Ratios to peers are `models`' business.

Bytes of a token: all weights that it reads, in 16 or 32 bits whatever they are stored in, and its
keys and values as they are stored.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench_models import generation, text
from bench_models.cells import CACHE_BYTES, WEIGHT_BYTES

AGREEMENT = 0.08  # of memory before and after a token
PHASE = 1.2  # memory that much faster is another phase
WARM_TOKENS = 4
SCALE_BYTES = 4  # of a row of 8 bits
METHOD = (
    "One process; memory is read before and after each decode step, and a step counts if both "
    "agree to 8 %; medians over the steps of slow and of fast memory; a share is the bytes of "
    "weights, in 16 or 32 bits, and of keys and values over time and memory. No peer."
)


@dataclass(frozen=True)
class Case:
    """What is decoded."""

    dtype: str
    context: int
    new: int
    batch: int = 1
    padding: int = 0  # tokens of each context that the mask leaves out
    cache: str = "auto"  # or int8

    @property
    def title(self) -> str:
        parts = [f"{self.dtype}, {self.context} tokens"]
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.padding > 0:
            parts.append(f"{self.padding} of them padding")
        if self.cache != "auto":
            parts.append(f"keys and values in {self.cache}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Token:
    """One step: seconds, bytes, and bytes a second of memory before and after it."""

    seconds: float
    bytes: float
    before: float
    after: float

    @property
    def memory(self) -> float:
        return (self.before + self.after) / 2

    @property
    def steady(self) -> bool:
        return abs(self.after - self.before) <= AGREEMENT * self.memory

    @property
    def share(self) -> float:
        return self.bytes / self.seconds / self.memory


def bytes_of(config: Any, weights: int, case: Case, keys: int) -> float:
    """That a step of `case` reads, of `weights` parameters and `keys` keys of each sequence."""
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    int8 = case.cache == "int8"
    row = size + SCALE_BYTES if int8 else size * CACHE_BYTES[case.dtype]
    per_key = 2 * config.num_hidden_layers * heads * row
    return weights * WEIGHT_BYTES[case.dtype] + case.batch * keys * per_key


def tokens_of(directory: Path, case: Case, read: Callable[[], float]) -> list[Token]:
    """The steps behind the context. read: bytes a second of memory, now."""
    import transformers

    import tilewright

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=generation.DTYPES[case.dtype]
    ).eval()
    config = model.config
    head = {id(model.get_output_embeddings().weight)}
    embedding = {id(model.get_input_embeddings().weight)} - head
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embedding)
    model = tilewright.llm.optimize(model, inplace=True, kv_cache_dtype=case.cache)
    count = case.context * case.batch
    ids = text.tokenized(directory, count) or text.random_tokens(config.vocab_size, count, seed=1)
    mask = torch.ones(case.batch, case.context, dtype=torch.long)
    mask[:, : case.padding] = 0
    found = []
    with torch.inference_mode():
        prompt = torch.tensor(ids).view(case.batch, case.context)
        out = model(prompt, attention_mask=mask, use_cache=True, logits_to_keep=1)
        before = read()
        for index in range(case.new + WARM_TOKENS):
            mask = torch.cat([mask, torch.ones(case.batch, 1, dtype=torch.long)], 1)
            token = out.logits[:, -1:].argmax(-1)
            given = {"attention_mask": mask} if case.padding > 0 else {}
            begin = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True, **given)
            seconds = time.perf_counter() - begin
            after = read()
            if index >= WARM_TOKENS:
                keys = case.context - case.padding + index + 1
                size = bytes_of(config, weights, case, keys)
                found.append(Token(seconds, size, before, after))
            before = after
    return found


def phases_of(tokens: list[Token]) -> list[list[Token]]:
    """Steady tokens, those of slow memory and those of fast memory apart if there are both."""
    steady = sorted((token for token in tokens if token.steady), key=lambda token: token.memory)
    gaps = [
        (after.memory / before.memory, index + 1)
        for index, (before, after) in enumerate(itertools.pairwise(steady))
    ]
    if not gaps or steady[-1].memory < PHASE * steady[0].memory:
        return [steady] if steady else []
    _, cut = max(gaps)
    return [steady[:cut], steady[cut:]]


def measured(directory: Path, case: Case, read: Callable[[], float]) -> dict[str, Any]:
    """One record."""
    tokens = tokens_of(directory, case, read)
    phases = [
        {
            "tokens": len(phase),
            "milliseconds": 1e3 * statistics.median(token.seconds for token in phase),
            "read_gb_per_second": statistics.median(token.memory for token in phase) / 1e9,
            "share": statistics.median(token.share for token in phase),
        }
        for phase in phases_of(tokens)
    ]
    samples = [asdict(token) for token in tokens]
    return {"case": case.title, "tokens": len(tokens), "phases": phases, "samples": samples}
