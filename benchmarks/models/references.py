"""What plain Transformers says of a model: rows one by one, through the model's own forward pass."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from models.configurations import VOCABULARY
from torch import Tensor

import trimtab
from trimtab.data.example import TokenRow
from trimtab.engine import decode

Logits = Callable[[Any, Sequence[int]], Tensor]
"""From a model and a row of T tokens to logits: T V."""
HIGHEST_TOKEN = VOCABULARY - 8
"""Tokens above are special ones, such as those of images."""


NEW_TOKENS = 16
"""Of each generated answer."""
LONGEST = 75
"""Tokens of the longest row."""
_SHARED = 24


def rows(most: int = LONGEST) -> list[TokenRow]:
    """Six rows of 5 to 75 tokens; targets are the last two thirds of each.

    Four begin with the same 24 tokens, and two of those share the next one, so that a tree of them has a segment of a single token.

    Args:
        most: Of each row, that many tokens, which begin shortly before the end of what three of them share.
    """
    generator = torch.Generator().manual_seed(0)
    shared, *others = (_draw(length, generator) for length in (_SHARED, 40, 9, LONGEST, 5, 17, 6))
    texts = [
        shared + others[0],
        shared + others[1],
        others[2],
        others[3],
        shared + others[4],
        shared + others[0][:1] + others[5],
    ]
    texts = [text[max(0, min(len(text) - most, _SHARED - most // 2)) :][:most] for text in texts]
    return [TokenRow(ids, list(range(max(1, len(ids) // 3), len(ids))), f"row {n}") for n, ids in enumerate(texts)]


def prompts(most: int = LONGEST) -> list[list[int]]:
    """Four prompts of 4 to 30 tokens, of which two begin with the same 12; the last half of `most` of each."""
    generator = torch.Generator().manual_seed(1)
    shared = _draw(12, generator)
    texts = [shared + _draw(18, generator), _draw(7, generator), shared + _draw(6, generator), _draw(4, generator)]
    return [text[-(most // 2) :] for text in texts]


def _draw(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, HIGHEST_TOKEN, (length,), generator=generator).tolist()


def own_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """The logits of one row by the model's own forward pass."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def alone(model: Any, examples: Sequence[TokenRow], logits: Logits = own_logits) -> Tensor:
    """Σ log p of each row's targets, each row in a forward pass of its own."""
    sums = []
    for row in examples:
        logprobs = logits(model, row.ids).double().log_softmax(-1)
        sums.append(torch.stack([logprobs[t - 1, row.ids[t]] for t in row.target_indices]).sum())
    return torch.stack(sums)


@torch.no_grad()
def generated_difference(
    model: Any, asked: Sequence[list[int]], references: Sequence[Any], logits: Logits = own_logits, **settings: Any
) -> float:
    """How far `trimtab.generate` is from greedy decoding by full passes of the reference of each prompt.

    The larger of two: how far an answer's tokens are from the likeliest there (0 if full passes would choose the same tokens), and how
    far the logits that they were chosen by are from those of a full pass. Both as a share of the largest logit.
    """
    with seen_logits() as seen:
        answers = trimtab.generate(model, asked, [], max_new_tokens=NEW_TOKENS, **settings)
    worst = 0.0
    for number, (prompt, answer, reference) in enumerate(zip(asked, answers, references, strict=True)):
        scores = logits(reference, [*prompt, *answer])[len(prompt) - 1 : -1].double()
        worst = _worst(worst, (torch.stack(seen[number]).double() - scores).abs() / scores.abs().max())
        worst = max(worst, greedy_deficit(scores, answer))
    return worst


def greedy_deficit(scores: Tensor, answer: Sequence[int]) -> float:
    """How far the logits of an answer's tokens (T V) are from the highest ones, as a share of the largest logit."""
    chosen = scores.gather(1, torch.tensor(list(answer))[:, None])[:, 0]
    return _worst(0.0, (scores.max(-1).values - chosen) / scores.abs().max())


@contextmanager
def seen_logits() -> Iterator[dict[int, list[Tensor]]]:
    """What `trimtab.generate` chooses tokens by within the block: for each prompt, the logits of each step."""
    seen: dict[int, list[Tensor]] = defaultdict(list)
    sampler = decode.Sampler

    class Keeping(sampler):  # type: ignore[valid-type, misc]
        def __init__(self, settings: Any, prompts: Any, numbers: Sequence[int], device: torch.device) -> None:
            super().__init__(settings, prompts, numbers, device)
            self.rows = list(numbers)

        def choose(self, logits: Tensor) -> Tensor:
            for row, of_row in zip(self.rows, logits, strict=True):
                seen[row].append(of_row)
            return super().choose(logits)

        def select(self, places: Sequence[int]) -> None:
            self.rows = [self.rows[place] for place in places]
            super().select(places)

    decode.Sampler = Keeping
    try:
        yield seen
    finally:
        decode.Sampler = sampler


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest relative difference; infinite for values that are not finite."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return _worst(0.0, (ours - theirs).abs() / theirs.abs().clamp_min(1e-3))


def _worst(known: float, values: Tensor) -> float:
    highest = float(values.max())
    return max(known, highest) if highest == highest else float("inf")


@torch.no_grad()
def problem_of(model: Any) -> str:
    """Why this model says nothing that others could be compared with; "" for one that does."""
    row = rows()[2].ids
    other = [*row[:-1], (row[-1] + 1) % HIGHEST_TOKEN]
    first, second = own_logits(model, row), own_logits(model, other)
    if not torch.equal(first, own_logits(model, row)):
        return "its own logits differ from one pass to the next"
    if first.shape[0] != len(row) or not first.isfinite().all():
        return f"its own logits are not finite numbers of {len(row)} tokens"
    if not torch.allclose(first[:-1], second[:-1], atol=1e-4, rtol=1e-4):
        return "it is no causal model: a token changes the logits before it"
    return ""
