"""Examples that are there twice: the same tokens with the same targets and weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from trimtab.data.example import TokenRow


def digest(value: object) -> bytes:
    return hashlib.blake2b(str(value).encode(), digest_size=16).digest()


def by_example(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    """The rows of each example: a conversation that is rendered turn by turn, a long text and a pair have several."""
    return (list(group) for _, group in groupby(rows, key=lambda row: (row.source, row.where)))


def repeated(rows: Iterable[TokenRow]) -> list[tuple[str, str]]:
    """The place of each example that repeats an earlier one, and the place of that one."""
    first: dict[bytes, TokenRow] = {}
    pairs = ((example[0], first.setdefault(_content(example), example[0])) for example in by_example(rows))
    return [(row.where, earlier.where) for row, earlier in pairs if row is not earlier]


def without_repeated(rows: Iterable[TokenRow], seen: set[bytes]) -> tuple[list[TokenRow], list[str]]:
    """The rows without examples that have been `seen`, and the places of these; the others are seen from now on."""

    def is_seen(example: Sequence[TokenRow]) -> bool:
        known = len(seen)
        seen.add(_content(example))
        return len(seen) == known

    return _without(rows, is_seen)


def without_texts_of(others: Iterable[TokenRow], rows: Iterable[TokenRow]) -> tuple[list[TokenRow], list[str]]:
    """The rows without examples that one of the others repeats, whatever of it is trained on; and the places of these."""
    texts = set(map(_text, by_example(others)))
    return _without(rows, lambda example: _text(example) in texts)


def _without(rows: Iterable[TokenRow], unwanted: Callable[[Sequence[TokenRow]], bool]) -> tuple[list[TokenRow], list[str]]:
    kept: list[TokenRow] = []
    removed: list[str] = []
    for example in by_example(rows):
        if unwanted(example):
            removed.append(example[0].where)
        else:
            kept += example
    return kept, removed


def _text(example: Sequence[TokenRow]) -> bytes:
    return digest([row.ids for row in example])


def _content(example: Sequence[TokenRow]) -> bytes:
    return digest([(row.ids, row.target_indices, row.weights, row.side) for row in example])
