"""What the model says in a turn, where the template writes the prompt otherwise once the answer follows it.

Many do: they open the reasoning in the prompt and write none with an answer (DeepSeek-R1), close an empty one in the prompt alone (Gemma 4),
drop earlier reasoning once an answer follows (GPT-OSS), or write the system message with the last question (Mistral Nemo). What is
trained on comes after the prompt as generation has it, and is what the template writes from where the prompt ends.
"""

import re
from collections.abc import Callable
from typing import Any

from trimtab.data.written import forms, parted

Message = dict[str, Any]

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_ABOUT = r"[^<>\[\]\s]*(?:think|thought|reason|channel)[^<>\[\]\s]*"
_CLOSES = rf"(?:</{_ABOUT}|<\|end_{_ABOUT}|<\w*{_ABOUT}\||\[/{_ABOUT})[>\]]"
_CLOSED = re.compile(rf"\s*(?:[<\[]{_ABOUT}[>\]]\s*\w*\s*)?({_CLOSES})\s*", re.IGNORECASE)
"""How a prompt ends that has the reasoning over: `<think></think>`, `<|channel>thought\n<channel|>`, `</think>`."""
_REASONS = "qxreasonsxq"


def said_after(
    prompt: str, text: str, before: list[Message], message: Message, write: Callable[[Message], str]
) -> str | None:
    """What is said after a prompt that is not how the text begins; None if nobody can know.

    Args:
        text: The conversation up to this message.
        before: The messages before it.
        write: Writes the text with another message in its place.
    """
    if (start := _elsewhere(prompt, text, before)) is not None:
        return text[start:]
    more, rest = apart(prompt, text)
    if not more.strip():
        return rest
    reasoning, answer = parted(message)
    if closed := _CLOSED.fullmatch(more):
        return None if reasoning else _without(closed[1], rest)
    if reasoning:
        more, rest = apart(prompt, write(answer))
    if _TAG.fullmatch(more.strip()) and re.match(rf"\s*{_CLOSES}", rest, re.IGNORECASE):
        return reasoning + rest
    if not reasoning:
        reasoned = write({**answer, "reasoning_content": _REASONS})
        if reasoned.startswith(prompt) and reasoned[len(prompt) :].lstrip().startswith(_REASONS):
            return reasoned[len(prompt) :].replace(_REASONS, "", 1)
    if more.strip() == "<think>":
        return f"{reasoning.rstrip()}\n</think>\n\n{rest}"
    return None


def apart(prompt: str, text: str) -> tuple[str, str]:
    """What follows in a prompt, and in a text, where they are no longer the same; a tag that they part in is no common part of them."""
    at = shared_length(prompt, text)
    opens = max(prompt.rfind("<", 0, at), prompt.rfind("[", 0, at))
    tag = _TAG.match(prompt, opens) if opens >= 0 else None
    at = opens if tag and tag.end() > at else at
    return prompt[at:], text[at:]


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _elsewhere(prompt: str, text: str, before: list[Message]) -> int | None:
    """Where a turn begins in a text that has what came before the last message otherwise than the prompt has it."""
    last = next((form for form in forms(before[-1]["content"].strip()) if form and form in prompt), "")
    at = prompt.rfind(last)
    if not last or shared_length(prompt, text) >= at + len(last):
        return None
    found = text.rfind(prompt[at:])
    return None if found < 0 else found + len(prompt) - at


def _without(closing: str, rest: str) -> str:
    """What follows the end of the reasoning, which the prompt has already."""
    return rest.lstrip().removeprefix(closing) if rest.lstrip().startswith(closing) else rest
