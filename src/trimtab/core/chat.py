"""Chat messages and texts: what bases and data both need to know of them."""

from typing import Any

Message = dict[str, Any]
"""A chat message: `role` (system, user, assistant, tool), `content`, and what else chat templates read (`tool_calls`, …)."""

OPENS, CLOSES = "<think>", "</think>"
"""The tags of reasoning where a chat template has no others."""


def common_length(first: str, second: str) -> int:
    """How many characters the common prefix of two texts has."""
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
