"""Generation: prompts of any lengths prefilled without padding, then one token at a time with a key-value cache."""

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.base import context_length
from trimtab.core.errors import DataError, NonFinite, RecipeError
from trimtab.core.processes import processes
from trimtab.core.transfer import to_device
from trimtab.data.prefix_tree import lay_out
from trimtab.engine.check import ensure_checked
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import Cache, DecodeLayout, PrefillLayout
from trimtab.engine.pass_mode import mode_of
from trimtab.engine.sampling import GREEDY, Generation, Sampler, StopWatch, TextOf
from trimtab.methods import Routing, Switch, max_row_length, routed, switch_of

BATCH_TOKENS = 4096
"""Prompt tokens that are prefilled, and then decoded, together."""

Ended = Literal["stopped", "length", "context"]
"""Why an answer ended: at a stop token or string, at the most tokens asked for, or because the model's context is full."""


class Answer(list[int]):
    """The new tokens of a prompt; of a string that ended it, they spell the whole."""

    ended: Ended = "length"

    @classmethod
    def of(cls, ids: Iterable[int], ended: Ended) -> "Answer":
        answer = cls(ids)
        answer.ended = ended
        return answer


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    stop_ids: Iterable[int],
    *,
    max_new_tokens: int,
    settings: Generation = GREEDY,
    text_of: TextOf | None = None,
    owners: Sequence[str | None] | None = None,
    first: int = 0,
) -> list[Answer]:
    """Continue each prompt up to a stop token or string, `max_new_tokens`, or the end of the model's context.

    Args:
        stop_ids: Tokens that end an answer; they are not returned.
        text_of: Gives the text in which `settings.stop` are looked for, such as `base.raw_text`.
        owners: For each prompt, the name of the adapter that answers it, or None for the base alone; unless given, the
            adapters that are on answer all of them.
        first: The index of the first prompt, if these are a part of more: by it and the seed, the prompts are sampled.

    Returns:
        The new tokens of each prompt, in the prompts' order; each says how it `ended`.

    Raises:
        DataError: A prompt is longer than the context.
        NonFinite: The model's logits are NaN.
        UnsupportedModel: The model cannot be computed exactly.
    """
    ensure_checked(model)
    answers = [Answer() for _ in prompts]
    job = _Job(model, prompts, _limits(model, prompts, max_new_tokens), frozenset(stop_ids), settings, text_of, first)
    switches = [switch_of(model, owner) for owner in owners] if owners is not None else None
    for group in _groups(prompts):
        for number, event in _decode(job, group, switches):
            if isinstance(event, int):
                answers[number].append(event)
            else:
                answers[number].ended = event
    return answers


def stream_tokens(
    model: Any,
    prompt: list[int],
    stop_ids: Iterable[int],
    *,
    max_new_tokens: int,
    settings: Generation = GREEDY,
    text_of: TextOf | None = None,
) -> Generator[int, None, Ended]:
    """`generate` for one prompt, token by token; returns how it ended."""
    ensure_checked(model)
    job = _Job(model, [prompt], _limits(model, [prompt], max_new_tokens), frozenset(stop_ids), settings, text_of)
    for _, event in _decode(job, [0]):
        if not isinstance(event, int):
            return event
        yield event
    raise AssertionError("an answer ends in one of these ways")


class _Job(NamedTuple):
    """What is to be continued, and how."""

    model: Any
    prompts: Sequence[list[int]]
    limits: Sequence[tuple[int, Ended]]
    stop_ids: frozenset[int]
    settings: Generation
    text_of: TextOf | None
    first: int = 0

    def watches(self, rows: Sequence[int]) -> dict[int, StopWatch]:
        """By prompt, what notices the strings that end its answer."""
        if not self.settings.stop:
            return {}
        if self.text_of is None:
            raise RecipeError("stop: these strings are looked for in a text, so text_of has to be given: base.raw_text.")
        return {row: StopWatch(self.settings.stop, self.text_of) for row in rows}


def _limits(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[tuple[int, Ended]]:
    """The most tokens of each answer, and how it ends there."""
    context = max_row_length(model, context_length(model))
    if context is None:
        return [(max_new_tokens, "length") for _ in prompts]
    for number, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise DataError(f"Prompt {number} has {len(prompt):,} tokens, and the model's context has {context:,}.")
    left = [context - len(prompt) for prompt in prompts]
    return [(max_new_tokens, "length") if max_new_tokens <= most else (most, "context") for most in left]


def _groups(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Indices of prompts, in batches of similar length, the longest first."""
    groups: list[list[int]] = []
    free = 0
    for number in sorted(range(len(prompts)), key=lambda n: -len(prompts[n])):
        if not groups or len(prompts[number]) > free:
            groups.append([])
            free = BATCH_TOKENS
        groups[-1].append(number)
        free -= len(prompts[number])
    return groups


@torch.no_grad()
def _decode(job: _Job, rows: list[int], switches: Sequence[Switch | None] | None = None) -> Iterator[tuple[int, int | Ended]]:
    """(index, token) of the prompts at the indices `rows`, a token of each in turn; after its last token, (index, how it ended)."""
    model, limits = job.model, job.limits
    yield from ((row, limits[row][1]) for row in rows if not limits[row][0])
    rows = [row for row in rows if limits[row][0]]
    if not rows:
        return
    device = next(model.parameters()).device
    owners = Routing([switches[n] for n in rows]) if switches is not None else None
    texts, watches = [job.prompts[n] for n in rows], job.watches(rows)
    sampler = Sampler(job.settings, texts, [job.first + n for n in rows], device)
    cache, hidden = _prefill(model, texts, device, owners)
    for count in itertools.count(1):
        with routed(owners):
            chosen = sampler.choose(head_of(model).logits(hidden))
        if processes.equal_passes:  # all go on as the first does, though their devices may round differently
            processes.from_first_(chosen)
        tokens, unfinished = chosen.tolist(), []  # all that is read of the device in a step
        if -1 in tokens:
            raise NonFinite(
                f"Prompt {rows[tokens.index(-1)]}: the logits of the token after it are NaN, so it cannot be continued."
            )
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token in job.stop_ids:
                yield row, "stopped"
                continue
            yield row, token
            if watches and watches[row].has_stopped(token):
                yield row, "stopped"
            elif count == limits[row][0]:
                yield row, limits[row][1]
            else:
                unfinished.append(place)
        if not unfinished:
            return
        if len(unfinished) < len(rows):
            sampler.select(unfinished)
            owners = owners.select(unfinished) if owners is not None else None
        rows, tokens = [rows[place] for place in unfinished], [tokens[place] for place in unfinished]
        if not mode_of(model).caches:
            texts = [[*texts[place], token] for place, token in zip(unfinished, tokens, strict=True)]
            hidden = _prefill(model, texts, device, owners)[1]
            continue
        if len(unfinished) < len(cache.counts):
            chosen = chosen[cache.select(unfinished)]
        hidden = _step(model, chosen, cache, owners)


def _step(model: Any, tokens: Tensor, cache: Cache, owners: Routing | None) -> Tensor:
    """The hidden states of one more token of each sequence: B d. It does not wait for the device."""
    layout = DecodeLayout(cache)
    with routed(owners):
        hidden = hidden_states(model, tokens, cache.lengths, layout)
    layout.advance()
    return hidden


def _prefill(model: Any, prompts: list[list[int]], device: torch.device, owners: Routing | None) -> tuple[Cache, Tensor]:
    """The prompts' keys and values, and the hidden state of each prompt's last token: B d."""
    tree, cache = lay_out(prompts, share=owners is None), Cache()
    tokens = [number for number, prompt in enumerate(prompts) for _ in prompt]
    ids, positions = (torch.from_numpy(array).to(device) for array in (tree.ids, tree.positions))
    with routed(owners.select(tokens) if owners is not None else None):
        hidden = hidden_states(model, ids, positions, PrefillLayout(tree, cache, device))
    return cache, hidden[to_device([tree.segments[leaf].end - 1 for leaf in tree.leaves], device)]
