"""Plain texts as token rows: all of a text is trained on, and the token that ends it."""

from collections.abc import Sequence
from typing import NamedTuple

from trimtab.data.example import InvalidExample, Text, TokenRow
from trimtab.data.lengths import LengthLimit, interned, limit_length, split_text
from trimtab.data.rendering import Tokenizing

WINDOW, OVERLAP = 1_000_000, 4_000
"""Characters that are tokenized at a time, and how many of these are the end of the window before: a tokenizer's result takes a
hundred times the memory of its tokens."""
SAME = 16
"""Two windows are joined in their overlap, where so many tokens in a row are the same in both."""

Token = tuple[int, int, int]
"""A token, and the characters [start, end) of the text that it stands for."""


class Tokens(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    before: int
    """How many the tokenizer put before the text, such as a BOS."""


def tokenize_texts(texts: Sequence[Text], base: Tokenizing, limit: LengthLimit) -> list[list[TokenRow] | InvalidExample]:
    """Of each text its token rows, or why it can't be used."""
    short = iter(base.encode([example.text for example in texts if len(example.text) <= WINDOW], special=True))
    results: list[list[TokenRow] | InvalidExample] = []
    for example in texts:
        if len(example.text) <= WINDOW:
            encoded = next(short)
            tokens = Tokens(list(encoded.ids), encoded.before)
        else:
            tokens = encode_long(example.text, base)
        try:
            results.append(text_rows(tokens, example.where, base, limit))
        except InvalidExample as invalid:
            results.append(invalid)
    return results


def ended(ids: list[int], base: Tokenizing) -> list[int]:
    """A text's tokens with the one that ends it. Raises InvalidExample if the model has no embedding of one of them."""
    if base.end_of_text is not None and ids[-1:] != [base.end_of_text]:
        ids.append(base.end_of_text)
    if problem := base.embedding_problem(ids):
        raise InvalidExample(problem)
    return ids


def text_rows(tokens: Tokens, where: str, base: Tokenizing, limit: LengthLimit) -> list[TokenRow]:
    """The token rows of a text. Raises InvalidExample."""
    ids, first = ended(tokens.ids, base), max(tokens.before, 1)  # nothing can predict the first token of a row
    if limit.overlong == "split" and limit.tokens is not None and len(ids) > limit.tokens:
        return split_text(ids, first, limit.tokens, where)
    return limit_length([TokenRow(ids, list(range(first, len(ids))), where, len(ids))], limit)


def encode_long(text: str, base: Tokenizing) -> Tokens:
    """A text, window by window, as the tokens that it has as a whole."""
    (head,) = base.encode([text[:WINDOW]], special=True)
    ids: list[int] = []
    last, end = _placed(head.ids, head.offsets, 0), WINDOW
    while end < len(text):
        if (joined := _next_window(text, last, end, base)) is None:  # as in a text that is a single word
            (whole,) = base.encode([text], special=True)
            return Tokens(list(whole.ids), whole.before)
        settled, last, end = joined
        ids += interned([token for token, _, _ in settled])
    return Tokens(ids + interned([token for token, _, _ in last]), head.before)


def _next_window(text: str, last: list[Token], end: int, base: Tokenizing) -> tuple[list[Token], list[Token], int] | None:
    """The last window up to where the next one agrees with it, the next one from there on, and its end; None if nowhere."""
    start = end - OVERLAP
    (encoded,) = base.encode([text[start : start + WINDOW]])
    window = _placed(encoded.ids, encoded.offsets, start)
    places = {token: n for n, token in enumerate(window) if token[1] < end}
    for n, token in enumerate(last[:-SAME]):
        at = places.get(token)
        if token[1] > start + OVERLAP // 2 and at is not None and window[at : at + SAME] == last[n : n + SAME]:
            return last[:n], window[at:], start + WINDOW
    return None


def _placed(ids: Sequence[int], offsets: Sequence[tuple[int, int]], start: int) -> list[Token]:
    return [(token, start + first, start + after) for token, (first, after) in zip(ids, offsets, strict=True)]
