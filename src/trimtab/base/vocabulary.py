"""Texts as tokens, and tokens that are added to a tokenizer, so that what an adapter learns of them has a name in texts."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.core.errors import RecipeError


class Encoded(NamedTuple):
    """A text as tokens, with the characters [start, end) that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    before: int = 0
    """How many of the tokens the tokenizer put before the text, such as a BOS."""

    @classmethod
    def of(cls, ids: list[int], offsets: list[tuple[int, int]], put: list[int]) -> "Encoded":
        """From what a tokenizer says, where `put` marks what it put around the text."""
        before = next((n for n, mark in enumerate(put) if not mark), len(put))
        end = next((n + 1 for n in reversed(range(len(put))) if not put[n]), before)
        doubled = before if ids[before : 2 * before] == ids[:before] else 0  # the text says its BOS itself
        return cls(ids[doubled:end], offsets[doubled:end], before)


def grown(tokenizer: Any, own: Any, texts: Sequence[str], name: str) -> Any:
    """The tokenizer, or a copy that reads each of these texts as one token, in any text, messages too.

    Args:
        own: The tokenizer as it was before any were added.
        name: The base's.

    Raises:
        RecipeError: There is no tokenizer, or it has such a token of its own.
    """
    from transformers import AddedToken

    texts = [text for text in texts if text not in added(tokenizer, own)]
    if not texts:
        return tokenizer
    if own is None:
        raise RecipeError(f"{name} has no tokenizer that {texts[0]!r} could be added to.")
    for text in texts:
        if len(own(text, add_special_tokens=False)["input_ids"]) == 1:
            raise RecipeError(f"{text!r} is a token of {name} already, so it cannot be a new one: list it under tokens.")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return larger


def added(tokenizer: Any, own: Any) -> dict[str, int]:
    """What `grown` added: texts and ids."""
    if tokenizer is own:
        return {}
    before = own.get_added_vocab()
    return {text: i for text, i in tokenizer.get_added_vocab().items() if text not in before}


def unembedded(ids: Sequence[int], size: int, tokenizer: Any, added: Mapping[str, int]) -> str | None:
    """What is wrong with tokens that a model has no rows for, if one of them is not one that an adapter brings.

    Args:
        size: How many tokens the model has rows for, in its embeddings and its head.
        added: Texts and ids of tokens that adapters bring.
    """
    strange = next((i for i in ids if i >= size and i not in added.values()), None)
    if strange is None:
        return None
    token = tokenizer.convert_ids_to_tokens(strange) if tokenizer is not None else None
    return (
        f"holds token {strange} ({token!r}), and the model has rows for {size:,} tokens alone: the tokenizer is not the one that it was "
        "trained with. Use that one; or give the model more rows (resize_token_embeddings), save both, and train the new rows (method tokens)"
    )
