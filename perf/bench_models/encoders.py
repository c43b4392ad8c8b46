"""An encoder, ours against eager and Inductor in one process: BERT-base's shape, a padded batch.

Generation shows nothing of an encoder, so it has no row in `models`. Random weights of the true
shape; sequences of different lengths, padded to the longest. Blocks A B B A between probes of the
machine, as everywhere. The error is that of the last hidden states of all tokens that are no
padding, relative to their largest value, against eager in fp64 on two of the sequences.
One use of a compiler per run: Dynamo shares what it compiled between models of one class, so a
second one would measure how parameters are swapped.
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench_models.intervals import bootstrap, paired_ratio
from bench_models.rounds import Probe, Sample, run_rounds

Call = Callable[[], torch.Tensor]
CHECKED = 2  # sequences; fp64 takes its time


@dataclass(frozen=True)
class Encoder:
    """A shape: BERT-base unless said."""

    batch: int = 32
    tokens: int = 128
    layers: int = 12
    hidden: int = 768

    @property
    def title(self) -> str:
        return (
            f"bert {self.layers} x {self.hidden}, batch {self.batch} x {self.tokens}, padded, fp32"
        )

    @property
    def flops(self) -> float:
        """Of linear layers and attention, padding included: all systems compute it."""
        per_token = 2.0 * self.layers * 12 * self.hidden * self.hidden
        attention = 4.0 * self.layers * self.hidden * self.tokens
        return self.batch * self.tokens * (per_token + attention)

    def model(self) -> Any:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            intermediate_size=4 * self.hidden,
        )
        return BertModel(config, add_pooling_layer=False).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        ids = torch.randint(1000, 30000, (self.batch, self.tokens))
        lengths = torch.linspace(self.tokens // 4, self.tokens, self.batch).long()
        mask = (torch.arange(self.tokens)[None] < lengths[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask}


def _optimized(model: Any) -> Any:
    import tilewright

    return tilewright.llm.optimize(copy.deepcopy(model), inplace=True)


def _compiled(model: Any) -> Any:
    from tilewright.backend import backend

    return torch.compile(copy.deepcopy(model), backend=backend)


def _inductor(model: Any) -> Any:
    return torch.compile(copy.deepcopy(model))


def _inductor_freezing(model: Any) -> Any:
    import torch._inductor.config as inductor

    inductor.freezing = True  # for the process: it is read whenever a shape compiles
    return torch.compile(copy.deepcopy(model))


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "tilewright": _optimized,
    "tilewright:compile": _compiled,
    "eager": lambda model: model,
    "inductor": _inductor,
    "inductor:freezing": _inductor_freezing,
}

STANDARD = ("tilewright", "eager", "inductor")


def check_names(names: list[str]) -> None:
    """Raises ValueError for unknown ones, and for two uses of one compiler."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"no system '{name}'; there are {', '.join(IMPLEMENTATIONS)}")
    compilers = [name.split(":")[0] for name in names]
    if len(set(compilers)) < len(names):
        raise ValueError("one use of each compiler per run: Dynamo shares their code")


def _share(model: Any) -> float:
    import tilewright

    return float(tilewright.explain(model).own_flops_share)


def _errors(results: dict[str, torch.Tensor], encoder: Encoder, model: Any) -> dict[str, float]:
    inputs = {name: value[:CHECKED] for name, value in encoder.inputs().items()}
    kept = inputs["attention_mask"].bool()
    wanted = copy.deepcopy(model).double()(**inputs).last_hidden_state[kept]
    scale = wanted.abs().max()
    return {
        name: float((result[:CHECKED][kept].double() - wanted).abs().max() / scale)
        for name, result in results.items()
    }


def run_encoder(
    encoder: Encoder,
    names: list[str],
    probe: Probe,
    rounds: int,
    peak_gflops: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One record; the first name is the baseline of the ratios."""
    model, inputs = encoder.model(), encoder.inputs()
    record: dict[str, Any] = {"case": encoder.title, "flops": encoder.flops, "implementations": {}}
    rows = record["implementations"]
    calls: dict[str, Call] = {}
    results: dict[str, torch.Tensor] = {}

    def prepared(name: str) -> Call:
        made = IMPLEMENTATIONS[name](model)

        def call() -> torch.Tensor:
            result: torch.Tensor = made(**inputs).last_hidden_state
            return result

        results[name] = call()
        rows[name] = {"status": "ok"}
        if name.startswith("tilewright"):
            rows[name]["own_flops_share"] = _share(made)
        return call

    with torch.inference_mode():
        for name in names:
            say(f"preparing {name} ...")
            try:
                calls[name] = prepared(name)
            except Exception as error:
                rows[name] = {"status": "failed", "reason": str(error).splitlines()[0][:160]}
        for name, difference in _errors(results, encoder, model).items():
            rows[name]["relative_error"] = difference

        def measure(name: str) -> Sample:
            begin = time.perf_counter()
            calls[name]()
            return Sample(time.perf_counter() - begin, 0.0)

        say("measuring ...")
        found = run_rounds(list(calls), measure, probe, rounds)
    for name, blocks in found.blocks.items():
        rows[name] |= {"kept": blocks.kept, "dropped": blocks.dropped}
        if not blocks.kept:
            continue
        seconds = [sample.prefill for sample in blocks.own]
        median = bootstrap(seconds).median
        rows[name] |= {
            "seconds": bootstrap(seconds).to_dict(),
            "gflops": encoder.flops / median / 1e9,
            "share_of_limit": encoder.flops / (peak_gflops * 1e9) / median,
            "ratio": paired_ratio(seconds, [s.prefill for s in blocks.baseline]).to_dict(),
        }
    return record
