"""The prompts, and the text that perplexity is measured on.

The text is real and on every machine: the language reference that CPython ships as the module
`pydoc_data.topics`. Models without a tokenizer get random token ids, the same for every system.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import random
from pathlib import Path

from bench_models.cells import Cell

SOURCE = "pydoc_data.topics (the language reference shipped with CPython)"
SKIPPED = 400  # characters of headings


def reference_text() -> str:
    """Topics in the order of their names."""
    from pydoc_data.topics import topics

    return "\n".join(" ".join(topics[name].split()) for name in sorted(topics))[SKIPPED:]


def tokenized(directory: Path, count: int) -> list[int] | None:
    """The first tokens of the text, or None for a model without a tokenizer."""
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(file)).encode(reference_text()[: 12 * count]).ids
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than {count}")
    return ids[:count]


def random_tokens(vocabulary: int, count: int, seed: int) -> list[int]:
    """The same on every machine."""
    generator = random.Random(seed)
    return [generator.randrange(5, vocabulary) for _ in range(count)]


def prompts_of(cell: Cell, directory: Path) -> list[list[int]]:
    """One prompt per sequence of the batch, all different."""
    total = cell.prompt * cell.batch
    ids = tokenized(directory, total) or random_tokens(cell.shape.vocabulary, total, seed=1)
    return [ids[row * cell.prompt : (row + 1) * cell.prompt] for row in range(cell.batch)]


def accuracy_tokens(cell: Cell, directory: Path, count: int) -> list[int]:
    """What logits are compared on."""
    return tokenized(directory, count) or random_tokens(cell.shape.vocabulary, count, seed=2)
