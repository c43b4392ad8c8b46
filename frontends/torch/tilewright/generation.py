"""Generate: `generate` of an optimised model, with a loop of ours where the arguments allow it.

transformers' loop prepares each step as if nothing were known of the one before, and a call of the
model must check that no part of it has changed: together several milliseconds of Python per token,
on memory that the weights have just swept out of the caches. Inside one call of `generate` neither
is needed. So greedy search and sampling go on from the first decode step by themselves: the same
cache, positions one further, and the same operations on the logits, so tokens and random numbers
are those of transformers' own loop. Prompt lookup is greedy search with guesses, which the core
makes and checks (ops/prompt_lookup.h); its tokens are those of greedy search, in every dtype: the
prompt is computed by itself, and a step has no more guesses than leave the bits as they are.
(transformers appends the first guesses to the prompt, which may round otherwise.) Code of the
user's own that runs between steps (a streamer, a processor, a criterion) may change the model or
the cache: after it both are looked at, and what changed is prepared anew. Whatever else is asked
for (beams, assistants), and a model with hooks, goes to transformers' loop.

Thread-safe: each step takes its turn. Tested by tests/python/test_generation.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers.generation import utils
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from tilewright import _core
from tilewright.decoder import Decoder
from tilewright.steps import Ends, NotRunnableError

# Of greedy steps in the core, until Python can be interrupted.
_SEARCH_SECONDS = 0.05

# What the loop stands for: a model that overrides one of these keeps its own.
_REPLACED = (
    "generate",
    "_sample",
    "_prefill",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)
# Settings of a generation that need another loop, unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "use_cache": (None, True),
    "return_dict_in_generate": (None, False),
    **dict.fromkeys(
        (
            "constraints",
            "force_words_ids",
            "assistant_early_exit",
            "dola_layers",
            "prefill_chunk_size",
            "use_mtp",
            "stop_strings",
        ),
        (None, False),
    ),
}
# Arguments of generate that the loop knows nothing of.
_UNKNOWN = ("custom_generate", "assistant_model", "synced_gpus", "tokenizer", "assistant_tokenizer")


class Generate:
    """Stands in the model's dictionary as `generate`, beside its Decoder as `forward`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        model: Any = decoder.model
        original = type(model).generate
        self.__doc__ = original.__doc__
        self.__name__ = "generate"
        self.__signature__ = inspect.signature(types.MethodType(original, model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._decoder.model
        bound = self.__signature__.bind(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        if _is_plain(model, given):
            kwargs["custom_generate"] = functools.partial(self._sample, given.get("streamer"))
        return type(model).generate(model, *args, **kwargs)

    # A copy of the model has a decoder of its own, which this finds in the same dictionary.

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return Generate(copy.deepcopy(self._decoder, memo))

    def __reduce__(self) -> Any:
        return (Generate, (self._decoder,))

    # --- the loop

    def _sample(
        self,
        streamer: Any,
        model: Any,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """As GenerationMixin._sample, for what `_is_plain` let through."""
        stops = _Stops(stopping_criteria, generation_config._pad_token_tensor)
        ends_from = _ends_from(logits_processor, stops)
        searches = not generation_config.do_sample and stops.usual and ends_from is not None
        finds = searches and not logits_processor and len(input_ids) == 1
        lookup = _lookup(generation_config) if finds else None
        modes = ("greedy_search", "sample") if lookup is None else ("assisted_generation",)
        if not (_only_logits_leave(model) and generation_config.get_generation_mode() in modes):
            name = utils.GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
            result: torch.Tensor = getattr(type(model), name)(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                **model_kwargs,
            )
            return result
        steps = _Steps(self._decoder, model_kwargs, lookup)
        watched = not _is_known(streamer, logits_processor, stopping_criteria)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            scores = logits_processor(input_ids, logits.to(copy=True, dtype=torch.float32))
            if not generation_config.do_sample:
                return stops.padded(torch.argmax(scores, dim=-1))
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            return stops.padded(torch.multinomial(probabilities, num_samples=1).squeeze(1))

        chosen = [choose(steps.prefill(input_ids, generation_config))]
        done = False
        while not done:
            for tokens in chosen:
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                done = stops.all_done(input_ids, tokens)
                if streamer is not None:
                    streamer.put(tokens)
            if done:
                break
            if watched:
                steps.look_again()
            # A streamer shows each token when it is there.
            seconds = _SEARCH_SECONDS if streamer is None else 0.0
            chosen = []
            if searches:
                ends = stops.ends(max(0, (ends_from or 0) - input_ids.shape[1]))
                chosen = steps.search(input_ids, stops.left(input_ids.shape[1]), ends, seconds)
            if not chosen:
                chosen = [choose(steps.next(input_ids))]
        if streamer is not None:
            streamer.end()
        return input_ids


class _Stops:
    """Which sequences are finished."""

    def __init__(self, criteria: Any, pad: torch.Tensor | None) -> None:
        self._criteria, self._pad = criteria, pad
        self._ends = any(hasattr(each, "eos_token_id") for each in criteria)
        self._unfinished: torch.Tensor | None = None  # [batch], once one of several is finished
        # Of the usual criteria: what they compare with, as numbers. Beyond the model's own limit
        # one of them warns.
        usual = all(type(each) in (EosTokenCriteria, MaxLengthCriteria) for each in criteria)
        lengths = [
            length
            for each in criteria
            if isinstance(each, MaxLengthCriteria)
            for length in (each.max_length, (each.max_position_embeddings or 1 << 62) + 1)
        ]
        self._length = min(lengths) if usual and lengths else 0
        self.usual = self._length > 0
        self.end_tokens = {
            int(token)
            for each in criteria
            if isinstance(each, EosTokenCriteria)
            for token in each.eos_token_id.reshape(-1)
        }

    def left(self, length: int) -> int:
        """How many tokens may follow before `all_done` has to look. REQUIRES: usual"""
        return self._length - length

    def ends(self, least_tokens: int) -> Ends:
        """With as many tokens before an end may come. REQUIRES: usual"""
        finished = [] if self._unfinished is None else (self._unfinished == 0).tolist()
        pad = 0 if self._pad is None else int(self._pad)
        return Ends(sorted(self.end_tokens), pad, finished, least_tokens)

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self._ends or self._unfinished is None:
            return tokens
        return tokens * self._unfinished + self._pad * (1 - self._unfinished)

    def all_done(self, input_ids: torch.Tensor, tokens: torch.Tensor) -> bool:
        """input_ids end with `tokens`."""
        if input_ids.shape[1] < self._length and self.end_tokens.isdisjoint(tokens.tolist()):
            return False  # those that are finished stay so, and not all are
        if self._unfinished is None:
            self._unfinished = torch.ones(len(tokens), dtype=torch.long)
        self._unfinished = self._unfinished & ~self._criteria(input_ids, None)
        return bool(self._unfinished.max() == 0)


class _Steps:
    """The logits of the last token, step after step."""

    def __init__(
        self, decoder: Decoder, model_kwargs: dict[str, Any], lookup: _core.PromptLookup | None
    ) -> None:
        self._decoder, self._model = decoder, decoder.model
        self._kwargs = model_kwargs
        self._lookup = lookup
        self._outputs: Any = None  # of the last call of the model
        self._behind = 0  # calls that model_kwargs do not know of
        self._prepared: Any = None
        self._seen = False  # by hooks: then only whole calls of the model will do

    def prefill(self, input_ids: torch.Tensor, generation_config: Any) -> torch.Tensor:
        model: Any = self._model
        first = not getattr(generation_config, "is_assistant", False)
        self._outputs = model._prefill(
            input_ids, generation_config, self._kwargs, is_first_iteration=first
        )
        self._behind = 1
        return self._last_logits()

    def look_again(self) -> None:
        """After code that may have changed the model or the cache."""
        self._seen = not _only_logits_leave(self._model)
        if self._prepared is not None and (
            self._seen or not self._decoder.is_still(self._prepared)
        ):
            self._prepared = None

    def next(self, input_ids: torch.Tensor) -> torch.Tensor:
        """After the last of input_ids [batch, tokens]."""
        if self._seen:
            return self._call(self._inputs(input_ids))
        try:
            if self._prepared is not None:
                logits = self._decoder.go_on(self._prepared, input_ids[:, -1:])
                self._behind += 1
                return logits[:, -1]
            inputs = self._inputs(input_ids)
            if self._lookup is not None:
                inputs["logits_to_keep"] = 0  # guesses need the logits of all
            self._prepared = self._decoder.prepared(inputs)
            logits = self._decoder.execute(self._prepared)
            self._behind = 1
            return logits[:, -1]
        except NotRunnableError:
            self._prepared = None
        return self._call(self._inputs(input_ids))

    def search(
        self, input_ids: torch.Tensor, most: int, ends: Ends, seconds: float
    ) -> list[torch.Tensor]:
        """The tokens [batch] of some greedy steps after input_ids, at most so many; none where only
        `next` can."""
        if self._prepared is None:
            return []
        if self._lookup is not None:
            self._lookup.set_text(input_ids[0].tolist())
        try:
            rows = self._decoder.search(
                self._prepared, input_ids[:, -1], ends, max(1, most), seconds, self._lookup
            )
        except NotRunnableError:
            return []  # the next step says what is wrong, if it is
        self._behind += len(rows)
        return list(rows)

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """The model's arguments, as transformers' loop makes them."""
        model: Any = self._model
        for _ in range(self._behind):
            self._kwargs = model._update_model_kwargs_for_generation(
                self._outputs, self._kwargs, is_encoder_decoder=False
            )
        self._behind = 0
        inputs: dict[str, Any] = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **self._kwargs
        )
        return inputs

    def _call(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What no program takes: the call says why, and counts it."""
        model: Any = self._model
        self._outputs = model(**inputs, return_dict=True)
        self._behind = 1
        return self._last_logits()

    def _last_logits(self) -> torch.Tensor:
        logits: torch.Tensor = self._outputs.logits[:, -1]
        return logits


def _ends_from(processors: Any, stops: _Stops) -> int | None:
    """The length from which on a sequence may end, if that is all that the processors decide."""
    length = 0
    for each in processors:
        if type(each) is MinLengthLogitsProcessor:
            least = each.min_length
        elif type(each) is MinNewTokensLengthLogitsProcessor:
            least = each.prompt_length_to_skip + each.min_new_tokens
        else:
            return None
        if stops.end_tokens != {int(token) for token in each.eos_token_id.reshape(-1)}:
            return None
        length = max(length, least)
    return length


def _lookup(generation_config: Any) -> _core.PromptLookup | None:
    """Guesses as many tokens as the configuration says, if it does."""
    guesses = generation_config.prompt_lookup_num_tokens
    matched = generation_config.max_matching_ngram_size
    matched = 2 if matched is None else matched
    if not all(isinstance(each, int) and each > 0 for each in (guesses, matched)):
        return None  # transformers says what is wrong
    return _core.PromptLookup(guesses, matched)


def install(decoder: Decoder) -> None:
    """Beside the decoder, if the model's generation is transformers' own."""
    if _takes_our_loop(decoder.model):
        decoder.model.__dict__["generate"] = Generate(decoder)


def uninstall(model: torch.nn.Module) -> None:
    if isinstance(model.__dict__.get("generate"), Generate):
        del model.__dict__["generate"]


def _takes_our_loop(model: Any) -> bool:
    mixin: Any = utils.GenerationMixin
    return (
        "custom_generate" in inspect.signature(mixin.generate).parameters
        and all(hasattr(mixin, name) for name in _REPLACED)
        and all(getattr(type(model), name, None) is getattr(mixin, name) for name in _REPLACED)
        and not any(name in model.__dict__ for name in _REPLACED)
    )


def _is_plain(model: Any, given: dict[str, Any]) -> bool:
    """Whether the arguments of `generate` ask for greedy search, sampling or prompt lookup only."""
    if any(given.get(name) for name in _UNKNOWN):
        return False
    if any(name in model.__dict__ for name in _REPLACED if name != "generate"):
        return False
    configurations = (given.get("generation_config"), getattr(model, "generation_config", None))
    for name, neutral in _NEUTRAL.items():
        values = [given.get(name), *(getattr(each, name, None) for each in configurations)]
        if any(isinstance(value, torch.Tensor) or value not in neutral for value in values):
            return False
    return True


def _is_known(streamer: Any, *lists: Any) -> bool:
    """Whether all that runs between steps is transformers' code, which changes no model."""
    each = [one for several in lists for one in several]
    if streamer is not None:
        each.append(streamer)
    return all(type(one).__module__.startswith("transformers.") for one in each)


def _only_logits_leave(model: Any) -> bool:
    """Whether nobody looks at the model's calls: no hooks, no compiled call."""
    return not (
        model._forward_hooks
        or model._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or getattr(model, "_compiled_call_impl", None)
    )
