"""What the model says in a turn that is trained on: what the template writes behind the prompt as generation has it.

Many templates write a prompt otherwise once the answer follows it: they open the reasoning in the prompt and write none with an answer
(DeepSeek-R1), close an empty one in the prompt alone (Gemma 4), drop earlier reasoning (GPT-OSS), or write the system message before
the last question (Pixtral). So prompt and text are compared behind the last message before the answer, where a mark shows that it
ends; what stands before that is the prompt's, in training as in generation.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from trimtab.data.example import Refused
from trimtab.data.template_output import CLOSES, OPENS, REASONING, Writing, check_said, parted

Message = dict[str, Any]

LAST, REASONS = "qxlastxq", "qxreasonsxq"
"""Marks, which no template writes by itself: at the end of the last message before the answer, and for reasoning."""
_TAG = r"(<[^<>\s]+>|\[[^\[\]\s]+\])"
_PAIR = re.compile(rf"\s*{_TAG}[^<\[]*{_TAG}\s*")
_CLOSING = re.compile(r"[<\[](/|\|end_|\w+\|>)", re.IGNORECASE)
"""How a tag begins that closes what another has opened: `</think>`, `<|END_THINKING|>`, `<channel|>`, `[/THINK]`."""


class Template(Writing, Protocol):
    """What a base's template offers here. See `base.template.ChatTemplate`."""

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str: ...
    def ending_of(self, message: Message) -> Any: ...
    def switch_for(self, wanted: Any) -> str | None: ...


class Turn:
    """A turn of the assistant's that is trained on, and the conversation before it."""

    def __init__(self, template: Template, messages: Sequence[Message], number: int, tools: Sequence[Any] | None) -> None:
        self.template, self.number, self.tools = template, number, tools
        self.before, self.message = list(messages[:number]), messages[number]
        self.ending, self.calls = template.ending_of(self.message), bool(self.message.get("tool_calls"))
        self.prompt = template.render(self.before, tools, prompt=True)

    def said(self, text: str | None = None) -> str:
        """What the model is to say after the prompt, to the turn's end; checked to say what the message does.

        Args:
            text: The conversation up to this turn as it is written, if that is known.
        """
        try:
            return self._checked(text)
        except Refused as refused:
            switch = self.template.switch_for(self._is_said_with)
            advice = f"; it is taken if you set {switch}" if switch else ""
            raise Refused(f"messages[{self.number}] (assistant): {refused}{advice}") from None

    def _checked(self, text: str | None = None) -> str:
        said = self._behind_prompt(self.message, text)
        check_said(self.message, said, self._behind_prompt, self.template)
        return said

    def _is_said_with(self, template: Template) -> bool:
        try:
            return bool(Turn(template, [*self.before, self.message], self.number, self.tools)._checked())
        except Refused:
            return False

    def _behind_prompt(self, message: Message, text: str | None = None) -> str:
        """What is said with this message in the turn's place."""
        text = self._written(self.before, message) if text is None else text
        if text.startswith(self.prompt):
            return text[len(self.prompt) :]
        opening, rest = self._opening, self._behind_last(message)
        if not (self.prompt.endswith(opening) and text.endswith(rest)):
            raise Refused("the chat template writes the message before it otherwise than another in its place")
        said = rest[len(opening) :] if rest.startswith(opening) else self._after_reasoning(message, rest)
        if said is None:
            more, rest = _apart(opening, rest)
            raise Refused(
                f"the chat template ends the prompt with {more[:40]!r}, and writes {rest[:40]!r} there when the answer follows, so "
                "training would not see what generation sees"
            )
        return said

    def _after_reasoning(self, message: Message, rest: str) -> str | None:
        """What is said where the prompt alone has opened or closed the reasoning; None if it is something else that it has alone."""
        opening = self._opening
        more, answered = _apart(opening, rest)
        if not more.strip():
            return answered
        reasoning, answer = parted(message, opened=OPENS in more or CLOSES in more)
        if (closing := _closed(more)) and reasoning:
            raise Refused(
                "the chat template ends the reasoning in the prompt, and this turn has some: leave it out (data.ignore)"
            )
        if closing:
            return _without(more[more.rindex(closing) :], closing, answered)
        reasoned = self._behind_last({**answer, REASONING[0]: reasoning or REASONS})
        if reasoned.startswith(opening) and reasoned[len(opening) :].lstrip().startswith(reasoning or REASONS):
            return reasoned[len(opening) :].replace(REASONS, "")
        if more.strip() != OPENS:
            return None
        # It writes no reasoning (DeepSeek-R1): this goes on where the prompt opens it, and ends as the family ends it.
        return f"{reasoning.rstrip()}\n</think>\n\n{_apart(opening, self._behind_last(answer))[1]}"

    def _written(self, before: list[Message], message: Message) -> str:
        return self.template.render([*before, message], self.tools) + self.ending.text

    @cached_property
    def _marked(self) -> list[Message]:
        *earlier, last = self.before
        return [*earlier, {**last, "content": last["content"] + LAST}]

    @cached_property
    def _opening(self) -> str:
        """What the prompt has behind the last message."""
        return _behind(self.template.render(self._marked, self.tools, prompt=True))

    def _behind_last(self, message: Message) -> str:
        """What is written behind the last message before this one."""
        return _behind(self._written(self._marked, message))


def _behind(text: str) -> str:
    """What follows the mark; or the mark, with which no text ends, where it is not written."""
    return text.rpartition(LAST)[2] if LAST in text else LAST


def _closed(more: str) -> str | None:
    """The tag that closes reasoning at the end of a prompt, if that has it over: `<think></think>`, `<|channel>thought\n<channel|>`."""
    if more.strip() == CLOSES:
        return CLOSES
    pair = _PAIR.fullmatch(more)
    if pair is None or _name(pair[1]) != _name(pair[2]) or _CLOSING.match(pair[1]) or not _CLOSING.match(pair[2]):
        return None
    return pair[2]


def _without(end: str, closing: str, answered: str) -> str:
    """What follows the end of the reasoning, where the template writes that with the answer too."""
    rest = answered.lstrip()
    return next((rest[len(one) :] for one in (end, closing) if rest.startswith(one)), answered)


def _name(tag: str) -> str:
    return re.sub(r"(start|begin|end)_(of_)?|[\W_]", "", tag.lower())


def _apart(one: str, other: str) -> tuple[str, str]:
    """What follows where two texts are no longer the same; a tag that they part in is no common part of them."""
    at = shared_length(one, other)
    at = next((tag.start() for tag in re.finditer(_TAG, one) if tag.start() < at < tag.end()), at)
    return one[at:], other[at:]


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
