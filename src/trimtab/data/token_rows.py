"""Examples as tokens, and which of them are learned. The only place where a loss mask is made.

What is learned is what the assistant says, and the token that ends its turn. It is found by rendering the conversation
with the model's own template up to where each answer starts, and once whole, and by tokenizing both: text and tokens of
the first must begin those of the second, or the conversation is laid out turn by turn. Markers are never searched for.
So before an answer stand exactly the tokens that ask for it when the model generates; and what stands there as the answer
says what the message says (see `written`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from trimtab.core.errors import DataError
from trimtab.data.example import Account, Conversation, Example, Judged, Preference, Refusal, Refused, Side, Text, TokenRow
from trimtab.data.rendering import Answer, Message, NotAPrefix, RenderedText, Tokenizing, turn_by_turn, whole

AT_A_TIME = 1000
"""Examples that are tokenized at a time: what a tokenizer says of a text takes a hundred times the memory of its tokens."""

_known: dict[int, int] = {}
"""Every number once, however many rows hold it: a number that Python makes anew takes four times a reference's memory."""


def make_sequences(
    examples: Iterable[Example],
    base: Tokenizing,
    account: Account,
    *,
    max_length: int | None = None,
    truncate: bool = False,
    limit: str | None = None,
) -> list[TokenRow]:
    """Examples as sequences, in their order; what can't be used goes to the account, with its reason.

    Args:
        max_length: The most tokens a sequence may have.
        truncate: Cut longer ones instead of refusing them; one cut before its first learned token is still refused.
        limit: What to call `max_length`, with its number.
    """
    cut = _Cut(max_length, truncate, limit or f"max_length {max_length or 0:,}")
    examples, usable = iter(examples), []
    while some := list(islice(examples, AT_A_TIME)):
        made_of_each = iter(_made([part for example in some for part in _parts(example)], base, cut))
        for example in some:
            made = _joined(example, [next(made_of_each) for _ in _parts(example)])
            if isinstance(made, str):
                account.refused.append(Refusal(example.where, made))
            else:
                account.used += 1
                usable += made
    return usable


def _parts(example: Example) -> Iterable[Conversation | Text]:
    """What of it is tokenized, one by one."""
    if isinstance(example, Preference):
        return example.chosen, example.rejected
    return (example.conversation,) if isinstance(example, Judged) else (example,)


def _joined(example: Example, made: list[list[TokenRow] | str]) -> list[TokenRow] | str:
    """The sequences of an example, from those of its parts; or why it can't be used."""
    if isinstance(example, Judged) and not isinstance(made[0], str):
        return [replace(made[0][0], side="good" if example.good else "bad")]
    if not isinstance(example, Preference):
        return made[0]
    both: list[TokenRow] = []
    for name, part in zip(("chosen", "rejected"), made, strict=True):
        if isinstance(part, str):
            return f"{name}: {part}"
        both += part
    chosen, rejected = both  # a sequence each, because only the last turn of each is learned
    if chosen.ids[: chosen.target_indices[0]] != rejected.ids[: rejected.target_indices[0]]:
        return "chosen and rejected come after different tokens, so they can't be compared"
    if chosen.ids == rejected.ids:
        return "chosen and rejected are the same tokens as far as they are read, so neither is the better one"
    sides: tuple[Side, Side] = ("good", "bad") if example.apart else ("chosen", "rejected")
    return [replace(one, side=side) for one, side in zip((chosen, rejected), sides, strict=True)]


def _made(examples: Sequence[Conversation | Text], base: Tokenizing, cut: "_Cut") -> Iterator[list[TokenRow] | str]:
    """Of each example, its sequences, or why it can't be used."""
    found: dict[int, list[TokenRow] | str] = {}
    for draft in (whole, turn_by_turn):
        drafts: dict[int, list[RenderedText]] = {}
        for number, example in enumerate(examples):
            if number not in found:
                try:
                    with suppress(NotAPrefix):
                        drafts[number] = draft(example, base)
                except (Refused, DataError) as refused:
                    found[number] = str(refused)
        encoded = _encode([d for several in drafts.values() for d in several], base)
        for number, several in drafts.items():
            tokens = list(islice(encoded, len(several)))
            try:
                with suppress(NotAPrefix):
                    sequences = [_sequence(d, t, base, examples[number].where) for d, t in zip(several, tokens, strict=True)]
                    found[number] = cut.cut(sequences)
            except Refused as refused:
                found[number] = str(refused)
    unending = "the chat template does not end every answer with the token that the model stops at"
    return (found.get(number, unending) for number in range(len(examples)))


def prompt_of(messages: Sequence[Message], base: Tokenizing, tools: Iterable[Any] = ()) -> list[int]:
    """The tokens that ask for the next message, as training has them; for a base without a template, those of the one message's text."""
    if base.has_template:
        (encoded,) = base.encode([base.render(messages, list(tools), prompt=True)])
    else:
        (encoded,) = base.encode([messages[0]["content"]], special=True)
    if strange := base.unembedded(encoded.ids):
        raise DataError(f"the prompt: {strange}.")
    return list(encoded.ids)


def asked(examples: Iterable[Conversation], base: Tokenizing) -> list[tuple[list[int], list[int]]]:
    """The tokens of each conversation's last answer that is trained on, and those that ask for it; these first.

    Raises:
        DataError: One can't be used.
    """
    found = []
    for example, made in zip(examples := list(examples), _made(examples, base, _Cut()), strict=True):
        if isinstance(made, str):
            raise DataError(f"{example.where}: {made}")
        start = last_run(made[-1])
        found.append((made[-1].ids[:start], made[-1].ids[start:]))
    return found


def last_run(row: TokenRow) -> int:
    """Where the last run of tokens that are trained on begins."""
    at = len(row.target_indices) - 1
    while at > 0 and row.target_indices[at - 1] == row.target_indices[at] - 1:
        at -= 1
    return row.target_indices[at]


def _encode(drafts: list[RenderedText], base: Tokenizing) -> Iterator[list[Any]]:
    """The tokens of each draft's text, and of the text before each of its answers. Plain texts begin with a BOS, if any."""
    done: dict[int, list[Any]] = {}
    for in_turns in (True, False):
        chosen = [n for n, draft in enumerate(drafts) if draft.in_turns == in_turns]
        texts = [[drafts[n].text, *(drafts[n].text[: a.start] for a in drafts[n].answers)] for n in chosen]
        encoded = iter(base.encode([text for several in texts for text in several], special=not in_turns))
        done |= {n: list(islice(encoded, len(several))) for n, several in zip(chosen, texts, strict=True)}
    return (done[n] for n in range(len(drafts)))


def _sequence(draft: RenderedText, encoded: list[Any], base: Tokenizing, where: str) -> TokenRow:
    ids, ends, firsts = _split_at_answers(draft, encoded, base)
    learned: list[int] = []
    for first, answer in zip(firsts, draft.answers, strict=True):
        if draft.in_turns:
            stops = [t for t in range(first, len(ids)) if ids[t] == answer.end and ends[t] <= answer.limit]
            if not stops:
                raise NotAPrefix
            if not answer.calls and base.decode(ids[stops[0] + 1 : stops[-1]]).strip():
                raise Refused("the chat template ends the turn in its midst, and the model would stop there")
            last = stops[-1] if answer.calls else stops[0]
        else:
            if base.end_of_text is not None and ids[-1:] != [base.end_of_text]:
                ids = [*ids, base.end_of_text]
            last = len(ids) - 1
        learned += range(max(first, 1), last + 1)  # nothing comes before the first token, so nothing can predict it
    if strange := base.unembedded(ids[: learned[-1] + 1] if learned else []):
        raise Refused(strange)
    return TokenRow(ids, learned, where, len(ids))


def _split_at_answers(draft: RenderedText, encoded: list[Any], base: Tokenizing) -> tuple[list[int], list[int], list[int]]:
    """The tokens, where they end in the text, and the first token of each answer, before which stand exactly the prompt's tokens.

    A tokenizer may join the prompt's last characters with the answer's first ("2+" and "+" as "++"), or divide the prompt
    in another way when something follows it.
    """
    text, *prompts = encoded
    ids, ends = list(text.ids), [end for _, end in text.offsets]
    if draft.answers[0].start == 0:
        return ids, ends, [text.before]

    def begins(prompt: Any, answer: Answer) -> bool:
        n = len(prompt.ids)
        return ids[:n] == list(prompt.ids) and all(end <= answer.start for end in ends[:n])

    firsts = [len(prompt.ids) for prompt in prompts]
    if all(begins(prompt, answer) for prompt, answer in zip(prompts, draft.answers, strict=True)):
        return ids, ends, firsts
    if len(draft.answers) > 1:
        raise NotAPrefix
    start = draft.answers[0].start
    (rest,) = base.encode([draft.text[start:]])
    cut = [*prompts[0].ids, *rest.ids]
    if base.decode(cut) != base.decode(ids):
        raise Refused("the tokenizer joins the end of the prompt with the start of the answer, and cannot write them apart")
    return cut, [*(end for _, end in prompts[0].offsets), *(start + end for _, end in rest.offsets)], firsts


class _Cut(NamedTuple):
    """How long sequences may be, and what becomes of longer ones."""

    max_length: int | None = None
    truncate: bool = False
    limit: str = ""

    def cut(self, sequences: list[TokenRow]) -> list[TokenRow]:
        """Sequences of one example up to their last learned token, each no longer than it may be."""
        needed = max((s.target_indices[-1] + 1 for s in sequences if s.target_indices), default=0)
        if self.max_length is not None and needed > self.max_length:
            if not self.truncate:
                raise Refused(f"has {needed:,} tokens up to the end of its last answer, more than {self.limit}")
            sequences = [replace(s, target_indices=[t for t in s.target_indices if t < self.max_length]) for s in sequences]
        whole = [
            replace(s, ids=shared(s.ids[: s.target_indices[-1] + 1]), target_indices=shared(s.target_indices))
            for s in sequences
            if s.target_indices
        ]
        if not whole:
            raise Refused("has no token to learn" + (f" within {self.limit}" if needed else ""))
        return whole


def shared(numbers: list[int]) -> list[int]:
    """The same numbers, in memory that all rows share."""
    return [_known.setdefault(n, n) for n in numbers]
