"""The text of a turn that is trained on: of an assistant's, what the template writes after the prompt that generation uses.

Many templates write a prompt differently once the answer follows it: they open the reasoning in the prompt and write none with an
answer (DeepSeek-R1), close an empty one in the prompt alone (Gemma 4), drop earlier reasoning (GPT-OSS), or write the system message
before the last question (Pixtral). So prompt and text are compared behind the last message before the answer, whose end a mark
shows; everything before it is the prompt's, in training as in generation.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from trimtab.core.chat import CLOSES, OPENS, Message, common_length
from trimtab.core.errors import DataError
from trimtab.data.example import InvalidExample
from trimtab.data.template_output import REASONING, Template, check_answer, normalized, split_reasoning

LAST, REASONS = "qxlastxq", "qxreasonsxq"
"""Marks that no template writes by itself: at the end of the last message before the answer, and in place of reasoning."""
_TAG = r"(<[^<>\s]+>|\[[^\[\]\s]+\])"
_PAIR = re.compile(rf"\s*{_TAG}[^<\[]*{_TAG}\s*")
_CLOSING = re.compile(r"[<\[](/|\|end_|\w+\|>)", re.IGNORECASE)
"""The beginning of a closing tag: `</think>`, `<|END_THINKING|>`, `<channel|>`, `[/THINK]`."""


class OtherTurn(NamedTuple):
    """What a message says, and the token that ends its turn, as the template writes them."""

    start: int
    """Index of its first character in the text."""
    end: int
    weight: float = 1.0


def find_other_turn(
    template: Template,
    messages: Sequence[Message],
    number: int,
    tools: Sequence[Any] | None,
    text: str,
    ends: "re.Pattern[str]",
    prompt: bool = False,
) -> OtherTurn:
    """Where a text has what message `number` of the conversation says: found by rendering the conversation with a mark in its place.

    Args:
        text: The conversation as the template writes it.
        ends: The tokens that may end a turn.
        prompt: It is a prompt, in which the model's answer follows.

    Raises:
        InvalidExample: It can't be found.
    """
    message = messages[number]
    role = f"messages[{number}] ({message['role']})"
    instead = "use data.train_on=everything, which trains on all that the template writes, or leave this role out"
    if message.get("tool_calls") or any(message.get(key) for key in REASONING):
        raise InvalidExample(f"{role} is more than a text, so its own weight has no place with data.train_on=everything")

    def around_mark(messages: Sequence[Message], prompt: bool) -> tuple[str, str]:
        marked = [*messages[:number], {**message, "content": LAST}, *messages[number + 1 :]]
        try:
            before, mark, after = template.render(marked, tools, prompt=prompt).partition(LAST)
        except DataError as error:
            raise InvalidExample(f"{role} can't be trained on: where it ends is not known ({error}); {instead}") from None
        if not mark or LAST in after:
            raise InvalidExample(f"{role} can't be trained on: the model's chat template does not write it once; {instead}")
        return before, after

    before, after = around_mark(messages, prompt)
    content = text[len(before) : len(text) - len(after)]
    if f"{before}{content}{after}" != text or normalized(content) != normalized(message["content"]):
        raise InvalidExample(f"{role} can't be trained on: the model's chat template does not write it unchanged; {instead}")
    _, closing = around_mark(messages[: number + 1], False)
    if (end := ends.search(closing)) is None:
        raise InvalidExample(f"{role} can't be trained on: the model's chat template ends it with no special token; {instead}")
    # Where the same turn goes on with another message, as with results of several calls, less of it follows.
    return OtherTurn(len(before), len(before) + len(content) + common_length(closing[: end.end()], after))


class Turn:
    """An assistant turn that is trained on, and the conversation before it."""

    def __init__(self, template: Template, messages: Sequence[Message], number: int, tools: Sequence[Any] | None) -> None:
        self.template, self.number, self.tools = template, number, tools
        self.before, self.message = list(messages[:number]), messages[number]
        self.ending, self.calls = template.ending_of(self.message), bool(self.message.get("tool_calls"))
        self.prompt = template.render(self.before, tools, prompt=True)

    def answer(self, text: str | None = None) -> str:
        """The text that the model is to generate after the prompt, to the turn's end; checked to say what the message says.

        Args:
            text: The conversation up to this turn as the template writes it, if it is known.
        """
        try:
            return self._checked_answer(text)
        except InvalidExample as invalid:
            switch = self.template.switch_for(self._is_valid_with)
            advice = f"; it is valid if you set {switch}" if switch else ""
            raise InvalidExample(f"messages[{self.number}] (assistant): {invalid}{advice}") from None

    def _checked_answer(self, text: str | None = None) -> str:
        answer = self._after_prompt(self.message, text)
        check_answer(self.message, answer, self._after_prompt, self.template)
        return answer

    def _is_valid_with(self, template: Template) -> bool:
        try:
            return bool(Turn(template, [*self.before, self.message], self.number, self.tools)._checked_answer())
        except InvalidExample:
            return False

    def _after_prompt(self, message: Message, text: str | None = None) -> str:
        """The answer with this message in the turn's place."""
        text = self._rendered(self.before, message) if text is None else text
        if text.startswith(self.prompt):
            return text[len(self.prompt) :]
        opening, rest = self._opening, self._after_last(message)
        if not (self.prompt.endswith(opening) and text.endswith(rest)):
            raise InvalidExample("the chat template writes the message before it differently than another in its place")
        answer = rest[len(opening) :] if rest.startswith(opening) else self._after_reasoning(message, rest)
        if answer is None:
            more, rest = _difference(opening, rest)
            raise InvalidExample(
                f"the chat template ends the prompt with {more[:40]!r}, and writes {rest[:40]!r} there when the answer follows, so "
                "training would not see what generation sees"
            )
        return answer

    def _after_reasoning(self, message: Message, rest: str) -> str | None:
        """The answer where only the prompt opens or closes the reasoning; None if they differ in something else."""
        opening = self._opening
        more, continued = _difference(opening, rest)
        if not more.strip():
            return continued
        reasoning, answer = split_reasoning(message, opened=OPENS in more or CLOSES in more)
        if (closing := _closing_tag(more)) and reasoning:
            raise InvalidExample(
                "the chat template ends the reasoning in the prompt, and this turn has some: ignore it (data.ignore)"
            )
        if closing:
            end, rest = more[more.rindex(closing) :], continued.lstrip()  # the template may write the end with the answer too
            return next((rest[len(tag) :] for tag in (end, closing) if rest.startswith(tag)), continued)
        reasoned = self._after_last({**answer, REASONING[0]: reasoning or REASONS})
        if reasoned.startswith(opening) and reasoned[len(opening) :].lstrip().startswith(reasoning or REASONS):
            return reasoned[len(opening) :].replace(REASONS, "")
        if more.strip() != OPENS:
            return None
        # It writes no reasoning (DeepSeek-R1): the answer continues the reasoning that the prompt opens, and ends it as the family does.
        return f"{reasoning.rstrip()}\n</think>\n\n{_difference(opening, self._after_last(answer))[1]}"

    def _rendered(self, before: list[Message], message: Message) -> str:
        return self.template.render([*before, message], self.tools) + self.ending.text

    @cached_property
    def _marked(self) -> list[Message]:
        *earlier, last = self.before
        return [*earlier, {**last, "content": last["content"] + LAST}]

    @cached_property
    def _opening(self) -> str:
        """The prompt's text behind the last message."""
        return _behind_mark(self.template.render(self._marked, self.tools, prompt=True))

    def _after_last(self, message: Message) -> str:
        """What the template writes behind the last message before this one."""
        return _behind_mark(self._rendered(self._marked, message))


def _behind_mark(text: str) -> str:
    """The text behind the mark; the mark itself, which ends no text, where it is not written."""
    return text.rpartition(LAST)[2] if LAST in text else LAST


def _closing_tag(more: str) -> str | None:
    """The tag that closes empty reasoning at the end of a prompt, if one does: `<think></think>`, `<|channel>thought\n<channel|>`."""
    if more.strip() == CLOSES:
        return CLOSES
    pair = _PAIR.fullmatch(more)
    if pair is None or _name(pair[1]) != _name(pair[2]) or _CLOSING.match(pair[1]) or not _CLOSING.match(pair[2]):
        return None
    return pair[2]


def _name(tag: str) -> str:
    return re.sub(r"(start|begin|end)_(of_)?|[\W_]", "", tag.lower())


def _difference(first: str, second: str) -> tuple[str, str]:
    """What follows the common prefix of two texts, which never ends inside a tag."""
    at = common_length(first, second)
    at = next((tag.start() for tag in re.finditer(_TAG, first) if tag.start() < at < tag.end()), at)
    return first[at:], second[at:]
