"""How answers are generated: the settings, the choice of the next token by them, and strings that end an answer."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from trimtab.core.config import Config, as_tuple
from trimtab.core.transfer import to_device

TextOf = Callable[[Sequence[int]], str]
"""Gives the text of tokens."""


class Generation(Config):
    """How answers are generated."""

    temperature: float = Field(0.0, ge=0)
    """0 is greedy decoding; otherwise tokens are sampled from softmax(logits / temperature)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability; 1 is all of them."""
    top_k: int = Field(0, ge=0)
    """Sample from this many of the most likely tokens; 0 is all of them."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Divide the logits of tokens that the prompt or the answer has, or multiply negative ones, by this; 1 changes nothing."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)] = ()
    """Texts that end an answer, which is cut off before them; stop tokens of the model end it, too."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the sampling, for each prompt by its index."""

    @model_validator(mode="after")
    def _check_is_sampled(self) -> "Generation":
        given = [name for name, off in (("top_p", 1.0), ("top_k", 0)) if getattr(self, name) != off]
        if given and not self.temperature:
            raise ValueError(
                f"{' and '.join(given)} would change nothing: with temperature 0, the most likely token is always taken. "
                "Set a temperature, such as 0.7."
            )
        return self


GREEDY = Generation()


class Sampler:
    """Chooses the next token of each sequence. Nothing in it waits for the device.

    Args:
        prompts: The sequences so far.
        numbers: Their indices, which together with the seed decide what is drawn for each, whatever else is in the batch.
    """

    def __init__(
        self, settings: Generation, prompts: Sequence[Sequence[int]], numbers: Sequence[int], device: torch.device
    ) -> None:
        self.settings, self._prompts = settings, prompts
        drawn = numbers if settings.temperature else ()
        self._draws = [torch.Generator(device).manual_seed(settings.seed * 1_000_003 + n) for n in drawn]
        self._seen: Tensor | None = None
        """Which tokens each sequence has, with a repetition penalty: B V."""

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each sequence, from its logits B V: B; -1 where they are NaN."""
        scores = self.filtered(logits)
        if self.settings.temperature:
            # As torch.multinomial does: the largest p / e, with e from the exponential distribution; but each row by its own generator.
            drawn = [torch.empty_like(scores[0]).exponential_(generator=draw) for draw in self._draws]
            scores = scores.softmax(dim=-1) / torch.stack(drawn)
        largest, tokens = scores.max(dim=-1)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens.masked_fill(largest.isnan(), -1)

    def filtered(self, logits: Tensor) -> Tensor:
        """The logits with penalty and temperature, and −∞ for tokens that must not be sampled; in the order of Transformers."""
        settings, scores = self.settings, logits
        if settings.repetition_penalty != 1.0:
            penalty = settings.repetition_penalty
            if self._seen is None:
                self._seen = _tokens_of(self._prompts, scores)
            scores = torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if settings.temperature:
            scores = scores / settings.temperature
        if settings.top_k:
            least = scores.topk(min(settings.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if settings.top_p < 1:
            ordered, order = scores.sort(dim=-1)
            unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
            unlikely[:, -1] = False  # the most likely token is always among them
            scores = scores.masked_fill(unlikely.scatter(1, order, unlikely), float("-inf"))
        return scores

    def select(self, places: Sequence[int]) -> None:
        """Keep only the sequences at these places."""
        self._draws = [self._draws[place] for place in places if self._draws]
        if self._seen is not None:
            self._seen = self._seen[to_device(places, self._seen.device)]


def _tokens_of(sequences: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens each sequence has: B V."""
    places = [(row, token) for row, ids in enumerate(sequences) for token in set(ids) if token < logits.shape[-1]]
    flat = to_device([row * logits.shape[-1] + token for row, token in places], logits.device)
    return torch.zeros(logits.numel(), dtype=torch.bool, device=logits.device).index_fill_(0, flat, True).view(logits.shape)


class GrowingText:
    """The text of tokens as they come. The text that a token adds depends on the one before it, but not on the whole answer."""

    def __init__(self, text_of: TextOf) -> None:
        self._text_of, self._ids = text_of, list[int]()
        self._start, self._end = 0, 0  # of the tokens before the new text, which has been given up to `end`

    def add(self, token: int) -> str:
        """The text that is complete now; "" inside a character of several tokens."""
        self._ids.append(token)
        before, now = self._text_of(self._ids[self._start : self._end]), self._text_of(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What has not been given yet: a character that never became complete."""
        return self._text_of(self._ids[self._start :])[len(self._text_of(self._ids[self._start : self._end])) :]


class StopWatch:
    """Notices when the text of an answer holds one of the strings that end it, however tokens divide them."""

    def __init__(self, stops: Sequence[str], text_of: TextOf) -> None:
        self._stops, self._text, self._tail = stops, GrowingText(text_of), ""

    def has_stopped(self, token: int) -> bool:
        """Whether the answer holds such a string now that it has one more token."""
        text = self._tail + self._text.add(token)
        self._tail = text[-max(map(len, self._stops)) :]
        return any(stop in text for stop in self._stops)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of these strings in it."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0] if stops else text


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of these strings."""
    return max((n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
