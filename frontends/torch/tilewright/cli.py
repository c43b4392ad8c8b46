"""The command `tilewright`: fill the kernel cache, look at it, run, generate, explain.

Results go to stdout, everything else to stderr; progress shows on a terminal only. Every command
takes --json, but for `run`. Exit codes: 0 done, 1 it could not be done or a check failed (the
reason is on stderr), 2 wrong usage.

Tested by tests/python/test_cli.py.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tilewright import cli_cache, cli_run
from tilewright.cli_output import DataType, Json, Model, err, fail, out, show

app = typer.Typer(
    help="Tilewright: LLM inference on x86 CPUs through generated machine code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_cache.app, name="cache")
app.command("prewarm")(cli_cache.prewarm)
app.command("run", context_settings={"allow_interspersed_args": False})(cli_run.run)


def main() -> None:
    app()


def load(name: str, dtype: str | None) -> tuple[Any, Any]:
    """The optimised model and its tokenizer."""
    try:
        import torch
        import transformers
    except ImportError as error:
        fail(f"{error}; pip install 'tilewright[transformers]'")
    import tilewright

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in types:
        raise typer.BadParameter(f"'{dtype}' is not one of {', '.join(types)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with err.status(f"loading {name}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=types[dtype] if dtype else "auto"
            )
        return tilewright.llm.optimize(model.eval(), inplace=True), tokenizer
    except (OSError, ValueError, TypeError) as error:
        fail(str(error).splitlines()[0])


@cli_cache.app.command("weights")
def cache_weights(model: Model, dtype: DataType = None, as_json: Json = False) -> None:
    """Write a model's packed weights, so that later starts map them instead of packing.

    Takes as much disk as the packed weights take memory. Exit code 1 if any could not be written.
    """
    from tilewright import kept_weights
    from tilewright.core import CoreError

    optimized, _ = load(model, dtype)
    try:
        result = kept_weights.keep_weights(optimized)
    except (CoreError, kept_weights.NotKeptError) as error:
        fail(str(error))
    text = (
        f"{result['written']} packed weights written, {result['mapped']} were there: "
        f"{result['directory']}"
    )
    show(result, as_json, text)
    if result["write_failures"]:
        fail(f"{result['write_failures']} were not written: {result['problem']}")


@app.command()
def env(as_json: Json = False) -> None:
    """Show the environment variables, what this machine offers, and the choices of speed for it."""
    from tilewright import core

    rows = core.variables()
    problems = list(core.settings()["problems"])
    if reason := core.unavailable():
        problems.append(f"everything runs in PyTorch: {reason}")
    threads = core.thread_limits()
    try:
        engine = core.engine()
        target, cache = dict(engine.target()), dict(engine.cache_state())
        choices = dict(engine.choices())
    except core.CoreError as error:
        target, cache, choices = {"problem": str(error)}, {}, {}
    table = Table(box=None, header_style="bold")
    for column in ("variable", "value", "values", "meaning"):
        table.add_column(column, no_wrap=column == "variable")
    for row in rows:
        value = row["value"] if row["value"] is not None else f"({row['default']})"
        table.add_row(row["name"], value, row["values"], row["documentation"])
    data = {
        "variables": rows,
        "problems": problems,
        "target": target,
        "threads": threads,
        "cache": cache,
        "choices": choices,
    }
    show(data, as_json, table)
    if as_json:
        return
    out.print(f"\nmachine: {target.get('model_name', '')}: {target.get('isa', target)}")
    out.print(
        f"threads: {threads['count']} ({threads['decided_by']}; torch {threads['torch']}, "
        f"affinity {threads['affinity']}, quota {threads['quota'] or 'none'})"
    )
    out.print(f"cache:   {cache.get('directory', '')} {cache.get('problem', '')}")
    for pack in cache.get("packs", []):
        out.print(f"pack:    {pack['problem'] or pack['name']}: {pack['kernels']} kernels")
    if choices:
        out.print(f"choices: {choices['source']} (of {choices['cpu']})", markup=False)
        table = Table(box=None, header_style="bold")
        for column in ("choice", "value", "meaning"):
            table.add_column(column, no_wrap=column != "meaning")
        for row in choices["values"]:
            table.add_row(row["name"], escape(row["value"]), row["documentation"])
        out.print(table)
    for problem in problems:
        err.print(f"tilewright: {problem}", markup=False)


@app.command()
def tune(
    rounds: Annotated[int, typer.Option(min=6, help="Turns of each candidate.")] = 11,
    only: Annotated[
        str, typer.Option(help="Choices to measure, separated by commas; all if not given.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Write no profile.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the choices of speed on this machine; keep those that beat the shipped ones.

    Let nothing else run meanwhile. What wins beyond the noise, twice, goes to this user's profile
    (TILEWRIGHT_PROFILE), which every later process reads.
    """
    from tilewright import core, tuning

    try:
        target = core.engine_for("", "{}").target()
        experiments = tuning.experiments(target["lanes"], "amx_bf16" in target["isa"])
    except core.CoreError as error:
        fail(str(error))
    if only:
        names = only.split(",")
        if unknown := set(names) - {experiment.choice for experiment in experiments}:
            raise typer.BadParameter(f"no choice to measure is called {', '.join(unknown)}")
        experiments = [experiment for experiment in experiments if experiment.choice in names]
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("choices", total=len(experiments))
        result = tuning.tune(experiments, rounds, lambda: progress.advance(task))
    table = Table(box=None, header_style="bold")
    for column in ("choice", "shipped", "candidate", "shipped time / candidate's", "by shape"):
        table.add_column(column)
    for again, outcomes in ((False, result.outcomes), (True, result.confirmations)):
        for outcome in outcomes:
            table.add_row(
                outcome.choice + (" (again)" if again else ""),
                escape(str(outcome.shipped)),
                escape(str(outcome.candidate)),
                escape(str(outcome.overall)),
                escape("; ".join(f"{k}: {v.median:.3f}" for k, v in outcome.by_shape.items())),
            )
    path = tuning.profile_path()
    # One that is there is of an older build or a worse day: it must not outlive this.
    written = not dry_run and path is not None and (bool(result.choices) or path.exists())
    if written and path is not None:
        try:
            tuning.write_profile(path, result)
        except OSError as error:
            fail(f"the profile cannot be written: {error}")
    show({**result.to_dict(), "profile": str(path) if written else None}, as_json, table)
    if not as_json:
        out.print(f"faster here: {json.dumps(result.choices)}", markup=False)
        out.print(f"profile: {path}" if written else "profile: not written", markup=False)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or a question.")],
    dtype: DataType = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template if it has one.")] = True,
    as_json: Json = False,
) -> None:
    """Generate text (greedy)."""
    optimized, tokenizer = load(model, dtype)
    text, tokens, seconds = run(optimized, tokenizer, prompt, max_new_tokens, chat)
    data = {"text": text, "tokens": tokens, "seconds": seconds}
    show(data, as_json, text)
    if not as_json:
        err.print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s")


@app.command()
def explain(
    model: Model,
    prompt: str = "The capital of France is",
    dtype: DataType = None,
    as_json: Json = False,
) -> None:
    """Run a few tokens and show what ran in our kernels, what did not, and why."""
    import tilewright

    optimized, tokenizer = load(model, dtype)
    run(optimized, tokenizer, prompt, 4, False)
    explanation = tilewright.explain(optimized)
    if as_json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        out.print(str(explanation), markup=False)


def run(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool
) -> tuple[str, int, float]:
    """Text, number of new tokens, seconds."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), seconds


if __name__ == "__main__":
    main()
