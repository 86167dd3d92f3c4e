"""Encoded texts, and new tokens that an adapter adds to a tokenizer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.core.errors import RecipeError


class Encoded(NamedTuple):
    """A text as tokens, with the characters [start, end) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    before: int = 0
    """How many tokens the tokenizer put before the text, such as a BOS."""

    @classmethod
    def of(cls, ids: list[int], offsets: list[tuple[int, int]], special: list[int]) -> "Encoded":
        """From a tokenizer's result, where `special` is 1 for a token that it put around the text."""
        before = next((n for n, mark in enumerate(special) if not mark), len(special))
        end = next((n + 1 for n in reversed(range(len(special))) if not special[n]), before)
        doubled = before if ids[before : 2 * before] == ids[:before] else 0  # the text has a BOS of its own
        return cls(ids[doubled:end], offsets[doubled:end], before)


def extend_tokenizer(tokenizer: Any, original: Any, texts: Sequence[str], name: str) -> Any:
    """The tokenizer, or a copy that reads each of these texts as one token, in any text, messages too.

    Args:
        original: The tokenizer before any were added.
        name: The base's.

    Raises:
        RecipeError: There is no tokenizer, or it has such a token already.
    """
    from transformers import AddedToken

    texts = [text for text in texts if text not in added_tokens(tokenizer, original)]
    if not texts:
        return tokenizer
    if original is None:
        raise RecipeError(f"{name} has no tokenizer that {texts[0]!r} could be added to.")
    for text in texts:
        if len(original(text, add_special_tokens=False)["input_ids"]) == 1:
            raise RecipeError(f"{text!r} is a token of {name} already, so it cannot be a new one: list it under tokens.")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return larger


def added_tokens(tokenizer: Any, original: Any) -> dict[str, int]:
    """The tokens that `extend_tokenizer` added: texts and ids."""
    if tokenizer is original:
        return {}
    before = original.get_added_vocab()
    return {text: i for text, i in tokenizer.get_added_vocab().items() if text not in before}


def embedding_problem(ids: Sequence[int], size: int, tokenizer: Any, added: Mapping[str, int]) -> str | None:
    """A message if one of these tokens has no embedding, neither the model's nor an adapter's.

    Args:
        size: How many tokens the model has embeddings and head rows for.
        added: Texts and ids of tokens that adapters add.
    """
    missing = next((i for i in ids if i >= size and i not in added.values()), None)
    if missing is None:
        return None
    token = tokenizer.convert_ids_to_tokens(missing) if tokenizer is not None else None
    return (
        f"holds token {missing} ({token!r}), and the model has embeddings for {size:,} tokens only: the tokenizer is not the one that it was "
        "trained with. Use that one; or resize the model's embeddings (resize_token_embeddings), save both, and train them (method tokens)"
    )
