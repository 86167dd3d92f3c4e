"""Parts of a model found by its structure: what makes keys and values, and where feed-forward layers end."""

import re
from typing import Any

from trimtab.core.errors import NoSuchModule
from trimtab.methods._targets import ALL_LINEAR, ATTENTION, ATTENTION_NAMES, matrices

KEYS_VALUES = re.compile(r"(k|v|key|value)(_proj)?|c_attn|qkv(_proj)?|query_key_value|Wqkv")
"""What attention modules call the matrices that make keys and values, alone or together with queries."""


def in_attention(path: str) -> bool:
    return not ATTENTION_NAMES.isdisjoint(path.split("."))


def makes_keys_or_values(path: str) -> bool:
    """Whether the matrix at this path does, perhaps queries too."""
    return in_attention(path) and bool(KEYS_VALUES.fullmatch(path.rpartition(".")[2]))


def keys_values(model: Any, key: str) -> list[str]:
    """The matrices that make keys and values. Raises NoSuchModule, which begins with the recipe's `key`, if none is found."""
    found = [path for path in matrices(model, [ATTENTION], key=key) if makes_keys_or_values(path)]
    return found or _refuse(model, key, "keys and values")


def feed_forward_ends(model: Any, key: str) -> list[str]:
    """Of matrices side by side, outside attention, the last whose outputs can be the inputs of all others. Raises NoSuchModule."""
    shapes = {path: shape for path, shape in matrices(model, [ALL_LINEAR], key=key).items() if not in_attention(path)}
    found = []
    for layer in dict.fromkeys(path.rpartition(".")[0] for path in shapes):
        group = [path for path in shapes if path.rpartition(".")[0] == layer]
        back = [one for one in group if all(shapes[other][0] == shapes[one][1] for other in group if other != one)]
        found += back[-1:] if len(group) > 1 else []
    return found or _refuse(model, key, "feed-forward layers")


def _refuse(model: Any, key: str, what: str) -> list[str]:
    raise NoSuchModule(f"{key}: auto finds no {what} in {type(model).__name__}. Name the matrices instead.")
