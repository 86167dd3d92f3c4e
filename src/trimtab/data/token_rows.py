"""Examples as token rows with target tokens. The only place where a loss mask is made.

Target tokens are what the assistant says, and the token that ends its turn, unless `data.train_on` says otherwise. They are found
by rendering the conversation with the model's own template once whole and once up to where each answer starts, and by tokenizing
both: text and tokens of the second must begin those of the first, or the conversation is rendered turn by turn.
Markers are never searched for. So before
an answer are exactly the tokens of the prompt that generation uses, and the answer says what the message says (see `template_output`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from trimtab.core.chat import Message
from trimtab.core.errors import DataError
from trimtab.data.example import (
    Conversation,
    Example,
    InvalidExample,
    Judged,
    Preference,
    RejectedExample,
    Side,
    SourceReport,
    Text,
    TokenRow,
    TooLong,
    parts_of,
)
from trimtab.data.lengths import NO_LIMIT, LengthLimit, limit_length
from trimtab.data.plain_texts import WINDOW, tokenize_texts
from trimtab.data.rendering import Answer, NotAPrefix, RenderedText, Tokenizing, render_turn_by_turn, render_whole
from trimtab.data.trained import as_answered

BATCH = 1000
"""Examples that are tokenized at a time: a tokenizer's result takes a hundred times the memory of its tokens."""


def tokenize_examples(
    examples: Iterable[Example], base: Tokenizing, report: SourceReport, limit: LengthLimit = NO_LIMIT
) -> list[TokenRow]:
    """Examples as token rows, in their order; the report lists those that can't be used, with their reasons."""
    rows: list[TokenRow] = []
    for batch in _batches(examples):
        of_parts = iter(_tokenize_parts([part for example in batch for part in parts_of(example)], base, limit))
        for example in batch:
            try:
                made = _join_parts(example, [next(of_parts) for _ in parts_of(example)])
            except TooLong:
                report.dropped.append(example.where)
            except InvalidExample as invalid:
                report.rejected.append(RejectedExample(example.where, str(invalid)))
            else:
                rows += [replace(row, source=example.source) for row in made] if example.source else made
                report.used += 1
                if isinstance(example, Text) and len(made) > 1:
                    report.split, report.blocks = report.split + 1, report.blocks + len(made)
    return rows


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """BATCH examples at a time, or fewer if they hold long texts."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += len(example.text) if isinstance(example, Text) else 0
        if len(batch) == BATCH or characters > WINDOW:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _join_parts(example: Example, parts: list[list[TokenRow] | InvalidExample]) -> list[TokenRow]:
    """The rows of an example, from those of its parts or why these can't be used. Raises InvalidExample."""
    rows: list[TokenRow] = []
    for name, part in zip(("chosen", "rejected"), parts, strict=False):
        if isinstance(part, InvalidExample):
            raise type(part)(f"{name}: {part}") if isinstance(example, Preference) else part
        rows += part
    if isinstance(example, Judged):
        return [replace(rows[0], side="good" if example.good else "bad")]
    if not isinstance(example, Preference):
        return rows
    chosen, rejected = rows  # a row each, because only the last turn of each is trained on
    if chosen.ids[: chosen.target_indices[0]] != rejected.ids[: rejected.target_indices[0]]:
        raise InvalidExample("chosen and rejected come after different tokens, so they can't be compared")
    if chosen.ids == rejected.ids:
        raise InvalidExample("chosen and rejected are the same tokens up to where they end, so neither is the better one")
    sides: tuple[Side, Side] = ("good", "bad") if example.as_judged else ("chosen", "rejected")
    return [replace(chosen, side=sides[0]), replace(rejected, side=sides[1])]


def _tokenize_parts(
    parts: Sequence[Conversation | Text], base: Tokenizing, limit: LengthLimit = NO_LIMIT
) -> list[list[TokenRow] | InvalidExample]:
    """Of each part its token rows, or why it can't be used."""
    plain = {number: part for number, part in enumerate(parts) if isinstance(part, Text)}
    results = dict(zip(plain, tokenize_texts([*plain.values()], base, limit), strict=True))
    for render in (render_whole, render_turn_by_turn):
        rendered: dict[int, list[RenderedText]] = {}
        for number, part in enumerate(parts):
            if number not in results and isinstance(part, Conversation):
                try:
                    with suppress(NotAPrefix):
                        rendered[number] = render(part, base)
                except (InvalidExample, DataError) as error:
                    results[number] = InvalidExample(str(error))
        encoded = _encode([text for texts in rendered.values() for text in texts], base)
        for number, texts in rendered.items():
            encodings = list(islice(encoded, len(texts)))
            try:
                with suppress(NotAPrefix):
                    rows = [_token_row(text, e, base, parts[number].where) for text, e in zip(texts, encodings, strict=True)]
                    results[number] = limit_length(rows, limit)
            except InvalidExample as invalid:
                results[number] = invalid
    unending = InvalidExample("the chat template does not end every answer with the token that the model stops at")
    return [results.get(number, unending) for number in range(len(parts))]


def tokenize_prompt(
    messages: Sequence[Message], base: Tokenizing, tools: Iterable[Any] = (), switches: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens of the prompt for the next message, as training has them; without a template, those of the only message's text.

    Args:
        switches: Those of the chat template that the example sets.
    """
    if base.has_template:
        tools = list(tools)
        (encoded,) = base.encode([base.template.chosen(tools, switches or {}).render(messages, tools, prompt=True)])
    else:
        (encoded,) = base.encode([messages[0]["content"]], special=True)
    if problem := base.embedding_problem(encoded.ids):
        raise DataError(f"the prompt: {problem}.")
    return list(encoded.ids)


def tokenize_answers(examples: Iterable[Conversation], base: Tokenizing) -> list[tuple[list[int], list[int]]]:
    """Of each conversation the prompt of its last trained answer, or of its last answer, and that answer, both as tokens.

    Raises:
        DataError: One can't be used.
    """
    answers, examples = [], [_as_answered(example) for example in examples]
    for example, rows in zip(examples, _tokenize_parts(examples, base), strict=True):
        if isinstance(rows, InvalidExample):
            raise DataError(f"{example.where}: {rows}")
        start = last_answer_start(rows[-1])
        answers.append((rows[-1].ids[:start], rows[-1].ids[start:]))
    return answers


def _as_answered(example: Conversation) -> Conversation:
    try:
        return as_answered(example)
    except InvalidExample as invalid:
        raise DataError(f"{example.where}: {invalid}") from None


def last_answer_start(row: TokenRow) -> int:
    """Index of the first token in the last run of target tokens."""
    at = len(row.target_indices) - 1
    while at > 0 and row.target_indices[at - 1] == row.target_indices[at] - 1:
        at -= 1
    return row.target_indices[at]


def _encode(texts: list[RenderedText], base: Tokenizing) -> Iterator[list[Any]]:
    """Of each text its encoding, and that of the text before each of its answers. Plain texts begin with a BOS, if any."""
    encodings: dict[int, list[Any]] = {}
    for by_template in (True, False):
        numbers = [n for n, text in enumerate(texts) if text.by_template == by_template]
        pieces = [[texts[n].text, *(texts[n].text[: a.start] for a in texts[n].answers)] for n in numbers]
        encoded = iter(base.encode([piece for of_text in pieces for piece in of_text], special=not by_template))
        encodings |= {n: list(islice(encoded, len(of_text))) for n, of_text in zip(numbers, pieces, strict=True)}
    return (encodings[n] for n in range(len(texts)))


def _token_row(text: RenderedText, encodings: list[Any], base: Tokenizing, where: str) -> TokenRow:
    ids, offsets, firsts = _split_at_answers(text, encodings, base)
    ends, targets, weights = [end for _, end in offsets], list[int](), list[float]()
    for first, answer in zip(firsts, text.answers, strict=True):
        if text.by_template:
            stops = [t for t in range(first, len(ids)) if ids[t] == answer.end and ends[t] <= answer.limit]
            if not stops:
                raise NotAPrefix
            if not answer.calls and base.decode(ids[stops[0] + 1 : stops[-1]]).strip():
                raise InvalidExample(
                    "the chat template writes the turn's end token inside the turn, where the model would stop"
                )
            last = stops[-1] if answer.calls else stops[0]
        else:
            if base.end_of_text is not None and ids[-1:] != [base.end_of_text]:
                ids = [*ids, base.end_of_text]
            last = len(ids) - 1
        targets += range(max(first, 1), last + 1)  # nothing can predict the first token of a row
        weights += [answer.weight] * (len(targets) - len(weights))
    if text.others or text.rest:
        targets, weights = _with_others(text, offsets, dict(zip(targets, weights, strict=True)), len(ids))
    if problem := base.embedding_problem(ids[: targets[-1] + 1] if targets else []):
        raise InvalidExample(problem)
    return TokenRow(ids, targets, where, len(ids), weights=weights if any(weight != 1 for weight in weights) else None)


def _with_others(
    text: RenderedText, offsets: list[tuple[int, int]], of_answers: dict[int, float], length: int
) -> tuple[list[int], list[float]]:
    """The targets and their weights: those of answers, tokens that have a character of another trained turn, and the rest."""
    of_others = {
        t: other.weight
        for other in text.others
        for t, (start, end) in enumerate(offsets)
        if start < other.end and end > other.start and end > start
    }
    found = {**dict.fromkeys(range(length), text.rest), **of_others, **of_answers}
    targets = [t for t in sorted(found) if found[t] and t > 0]
    return targets, [found[t] for t in targets]


def _split_at_answers(
    text: RenderedText, encodings: list[Any], base: Tokenizing
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """The tokens, where they start and end in the text, and the index of each answer's first token, before which are exactly the prompt's.

    A tokenizer may join the prompt's last characters with the answer's first ("2+" and "+" as "++"), or divide the prompt
    differently when something follows it.
    """
    encoded, *prompts = encodings
    ids, offsets = list(encoded.ids), list(encoded.offsets)
    if not text.answers:
        return ids, offsets, []

    def begins(prompt: Any, answer: Answer) -> bool:
        n = len(prompt.ids)
        return ids[:n] == list(prompt.ids) and all(end <= answer.start for _, end in offsets[:n])

    firsts = [len(prompt.ids) for prompt in prompts]
    if all(begins(prompt, answer) for prompt, answer in zip(prompts, text.answers, strict=True)):
        return ids, offsets, firsts
    if len(text.answers) > 1:
        raise NotAPrefix
    start = text.answers[0].start
    (rest,) = base.encode([text.text[start:]])
    split = [*prompts[0].ids, *rest.ids]
    if base.decode(split) != base.decode(ids):
        raise InvalidExample(
            "the tokenizer joins the end of the prompt with the start of the answer, and cannot write them separately"
        )
    shifted = ((start + first, start + end) for first, end in rest.offsets)
    return split, [*prompts[0].offsets, *shifted], firsts
