"""Ways to generate that `models` has no row for, in one process with what they are compared to:
requests of all lengths at once (transformers' `generate_batch`) against eager's and against one
after the other, and prompt lookup against greedy search.

Each must give the tokens that a request gets alone by greedy search; how many do is in the record.
Blocks A B B A between probes of the machine, as everywhere; the first one is the baseline.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench_models import text
from bench_models.intervals import bootstrap, paired_ratio
from bench_models.rounds import Probe, Sample, run_rounds

Tokens = list[list[int]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LONGEST = 700  # tokens of a request; the shortest has 3
PIECES = 512  # tokens of a step: longer prompts come in pieces
QUESTION = "Write down the following list again, word for word, and then once more:\n"


def load(directory: Path, dtype: str) -> tuple[Any, Any]:
    """The model, and an optimised one."""
    import transformers

    import tilewright

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
    return model, tilewright.llm.optimize(model)


def alone(model: Any, requests: Tokens, new: int, **more: Any) -> Tokens:
    """One after the other, by greedy search."""
    more |= {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}

    def made(ids: list[int]) -> list[int]:
        given = torch.tensor([ids])
        result = model.generate(given, attention_mask=torch.ones_like(given), **more)
        tokens: list[int] = result[0, len(ids) :].tolist()
        return tokens

    return [made(ids) for ids in requests]


def together(model: Any, requests: Tokens, new: int, step_tokens: int) -> Tokens:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    outputs = model.generate_batch(
        requests,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=16, num_blocks=1024, max_batch_tokens=step_tokens
        ),
    )
    made = [output.generated_tokens for output in outputs.values()]
    if len(made) != len(requests):
        raise RuntimeError(f"{len(made)} of {len(requests)} requests came back")
    return made


def requests_case(
    directory: Path, dtype: str, count: int, new: int, probe: Probe, rounds: int
) -> dict[str, Any]:
    """`count` requests of 3 to LONGEST tokens, `new` tokens each."""
    model, optimized = load(directory, dtype)
    lengths = [3 + (LONGEST - 3) * i // max(count - 1, 1) for i in range(count)]
    ids = text.tokenized(directory, sum(lengths))
    if ids is None:
        ids = text.random_tokens(model.config.vocab_size, sum(lengths), seed=1)
    starts = [sum(lengths[:i]) for i in range(count)]
    requests = [ids[at : at + length] for at, length in zip(starts, lengths, strict=True)]
    whole = sum(lengths) + count
    ways: dict[str, Callable[[], Tokens]] = {
        "tilewright": lambda: together(optimized, requests, new, whole),
        "tilewright in pieces": lambda: together(optimized, requests, new, PIECES),
        "tilewright, one by one": lambda: alone(optimized, requests, new),
        "eager": lambda: together(model, requests, new, whole),
    }
    title = f"{dtype}, {count} requests of 3 to {LONGEST} tokens, {new} new"
    return measured(title, ways, alone(optimized, requests, new), new, probe, rounds)


def lookup_case(
    directory: Path, dtype: str, repeats: bool, new: int, probe: Probe, rounds: int
) -> dict[str, Any]:
    """Prompt lookup with 3 and 10 guesses, on an answer that repeats its prompt or does not."""
    from transformers import AutoTokenizer

    _, optimized = load(directory, dtype)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = text.reference_text()[:600]
    question = QUESTION + prompt if repeats else "Tell me a long story about a lighthouse."
    if tokenizer.chat_template is not None:
        question = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    request = [tokenizer(question)["input_ids"]]
    ways: dict[str, Callable[[], Tokens]] = {"greedy": lambda: alone(optimized, request, new)}
    for guesses in (3, 10):
        ways[f"lookup of {guesses}"] = lambda guesses=guesses: alone(  # type: ignore[misc]
            optimized, request, new, prompt_lookup_num_tokens=guesses
        )
    title = f"{dtype}, {'repeating' if repeats else 'free'} text, {new} new"
    return measured(title, ways, alone(optimized, request, new), new, probe, rounds)


def measured(
    title: str,
    ways: dict[str, Callable[[], Tokens]],
    wanted: Tokens,
    new: int,
    probe: Probe,
    rounds: int,
) -> dict[str, Any]:
    """One record; a way's ratio is how many times as fast the first one is."""
    made = {name: way() for name, way in ways.items()}  # and warm

    def measure(name: str) -> Sample:
        begin = time.perf_counter()
        ways[name]()
        return Sample(time.perf_counter() - begin, 0.0)

    found = run_rounds(list(ways), measure, probe, rounds)
    rows: dict[str, Any] = {
        name: {"alike": sum(a == b for a, b in zip(tokens, wanted, strict=True))}
        for name, tokens in made.items()
    }
    first = next(iter(ways))
    beside = [sample.prefill for blocks in found.blocks.values() for sample in blocks.baseline]
    for name, row in rows.items():
        seconds = beside
        if name != first:
            blocks = found.blocks[name]
            seconds = [sample.prefill for sample in blocks.own]
            row |= {"kept": blocks.kept, "dropped": blocks.dropped}
            if seconds:
                baseline = [sample.prefill for sample in blocks.baseline]
                row["ratio"] = paired_ratio(seconds, baseline).to_dict()
        if seconds:
            row["tokens_per_second"] = len(wanted) * new / bootstrap(seconds).median
    return {"case": title, "requests": len(wanted), "ways": rows}
