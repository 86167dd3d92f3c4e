"""A chat template as a run uses it: with its switches, at one moment; what it reads, and how it ends a turn, is found by trying it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from trimtab.base import render_limits
from trimtab.core.errors import DataError, RecipeError

Message = dict[str, Any]
"""A chat message: `role`, `content`, and what else the model's template reads (`tool_calls`, …)."""
Switches = Mapping[str, Any]
"""Variables of a template that are the user's to set, such as `enable_thinking`."""

ID = "abcdefghi"
"""Of a call. Mistral's templates want nine letters."""
PROBE = "Zanzibar"
"""A word that no template writes by itself."""
GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token", "sep_token",
    "cls_token", "mask_token", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner",
    "continue_final_message",
}  # fmt: skip
"""What Transformers and Jinja give to every template."""
OPENS, CLOSES = "<think>", "</think>"
"""How reasoning begins and ends where the template does not say."""


class Ending(NamedTuple):
    """How the assistant's turn ends."""

    token: int
    text: str = ""
    """What has to be added to the turn for that, where it is the next turn that begins with this token (GLM's `<|user|>`)."""


class ChatTemplate:
    """What a tokenizer's chat template makes of conversations.

    Args:
        switches: The template's own variables that are set.
        stops: Tokens that are known to end a generation.
    """

    moment: datetime
    """Today, for templates that write the date."""

    def __init__(self, tokenizer: Any, switches: Switches, stops: frozenset[int]) -> None:
        self.tokenizer, self.switches, self.stops = tokenizer, switches, stops
        self.source = tokenizer.chat_template
        self.frames: set[tuple[str, ...]] = set()
        """What is known to be written around any text; see `data.written`."""

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the model speaks.

        Raises:
            DataError: The template does not accept this conversation.
        """
        return self._rendered(messages, tools, prompt, self._parts, _calls(messages) and self._argument_texts)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool, parts: bool, texts: bool
    ) -> str:
        try:
            template = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
        except ValueError as error:  # several templates, and none for this
            raise DataError(f"the model's tokenizer has no chat template for it: {error}") from None
        return render_limits.rendered(
            template,
            lambda: self.tokenizer.apply_chat_template(
                [_in_form(message, parts, texts) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=dated(template, self.moment),
                tokenize=False,
                add_generation_prompt=prompt,
                **self.switches,
            ),
        )

    # What it reads

    @cached_property
    def _parts(self) -> bool:
        """It reads contents as lists of parts alone (LLaVA's, Idefics')."""
        asked = [_user(PROBE)]
        return PROBE not in self._tried(asked, parts=False) and PROBE in self._tried(asked, parts=True)

    @cached_property
    def _argument_texts(self) -> bool:
        """It reads a call's arguments as JSON text alone (DeepSeek's)."""
        talk = [_user("0"), _call(PROBE)]
        return PROBE not in self._tried(talk, TOOLS, texts=False) and PROBE in self._tried(talk, TOOLS, texts=True)

    @cached_property
    def reads_reasoning(self) -> bool:
        """It writes the reasoning of a final answer from the message's own key for it."""
        return PROBE in self._tried([_user("0"), {**_answer("1"), "reasoning_content": PROBE}])

    @cached_property
    def keeps_thinking(self) -> bool:
        """It writes the reasoning that a final answer's content begins with."""
        return PROBE in self._tried([_user("0"), _answer(f"<think>\n{PROBE}\n</think>\n\n1")])

    @cached_property
    def answer_mark(self) -> str:
        """What stands between reasoning and answer; what stands before any answer, if that ends alike."""
        asked, said = [_user("0")], _answer(PROBE)
        alone = self._tried([*asked, said]).partition(PROBE)[0]
        alone = alone[_agreeing(alone, self._tried(asked, prompt=True)) :]
        reasoned = self._tried([*asked, {**said, "reasoning_content": "Reasons."}]).partition("Reasons.")[2].partition(PROBE)[0]
        shared = reasoned[len(reasoned) - _agreeing(alone[::-1], reasoned[::-1]) :]
        return shared.strip() or reasoned.strip() or CLOSES

    @cached_property
    def opens_reasoning(self) -> bool:
        """Its prompt begins the reasoning, so that what the model says goes on with that."""
        return self._tried([_user("0")], prompt=True).rstrip().endswith(OPENS)

    @property
    def variables(self) -> list[str]:
        """The names of its switches: variables that it reads and does not set itself, unless only where they are not set."""
        found: set[str] = set()
        for template in self.source.values() if isinstance(self.source, dict) else [self.source]:
            found |= _switches(template)
        return sorted(found)

    def switch_for(self, wanted: Callable[["ChatTemplate"], bool]) -> str | None:
        """A setting of one of its switches with which it does what is wanted, as it is written on the command line."""
        for setting, other in self._switched.items():
            other.moment = self.moment
            with suppress(DataError):
                if wanted(other):
                    return setting
        return None

    @cached_property
    def _switched(self) -> dict[str, "ChatTemplate"]:
        """Itself with another setting of each of its switches."""
        return {
            f"model.template.{name}={str(value).lower()}": ChatTemplate(
                self.tokenizer, {**self.switches, name: value}, self.stops
            )
            for name in self.variables
            for value in (True, False)
        }

    def check_switches(self) -> None:
        """Raise RecipeError for a switch that the template does not read."""
        for name in self.switches:
            if name not in (known := self.variables):
                has = f"reads {', '.join(known)}" if known else "has no switches"
                raise RecipeError(f"model.template.{name}: the chat template does not read it: it {has}.")

    # How it ends a turn

    def ending_of(self, message: Message) -> Ending | None:
        """How it ends this turn of the assistant's; None if by no special token."""
        return self.call_ending if message.get("tool_calls") else self.ending

    @cached_property
    def ending(self) -> Ending | None:
        """How an answer ends; None if by no special token. Some templates accept no conversation without tools (Hermes 2 Pro's)."""
        return self._ending([_user("0")], _answer, _user("0"), None) or self._ending([_user("0")], _answer, _user("0"), TOOLS)

    @cached_property
    def call_ending(self) -> Ending | None:
        """How a turn ends that calls a tool."""
        return self._ending([_user("0")], _call, {"role": "tool", "name": "tool", "tool_call_id": ID, "content": "0"}, TOOLS)

    def _ending(
        self, asked: list[Message], say: Callable[[str], Message], after: Message, tools: list[Any] | None
    ) -> Ending | None:
        """A token behind what is said: one that stays there when the conversation goes on, if any does; the first that is known to end a
        generation, or the last special one. If there is none, the token with which the turn after begins."""
        one, other = (self._tried([*asked, say(word)], tools) for word in ("0", "1"))
        if one == other:
            return None
        longer = self._tried([*asked, say("0"), after], tools)
        start = len(one) - _agreeing(one[::-1], other[::-1])
        stays = _agreeing(one, longer)
        added = {i: token.special for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = {*self.tokenizer.all_special_ids, *(i for i, is_special in added.items() if is_special)}
        behind = self._tokens(one, start, len(one))
        for ids in (self._tokens(one, start, stays), behind):
            for chosen in ([i for i in ids if i in self.stops][:1], [i for i in ids if i in special][-1:]):
                if chosen:
                    return Ending(chosen[0])
        following = self._tokens(longer[len(one) :], 0, len(longer))[:1] if stays == len(one) else []
        own = [Ending(i) for i in behind if i in added]
        theirs = [Ending(i, self.tokenizer.convert_ids_to_tokens(i)) for i in following if i in special | self.stops]
        known = [ending for ending in theirs if ending.token in self.stops]
        return next(iter([*known, *own[-1:], *theirs]), None)

    def _tokens(self, text: str, start: int, end: int) -> list[int]:
        """The tokens of a text between these characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        each = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [i for i, (first, last) in each if start <= first and last <= end]

    def _tried(
        self,
        talk: list[Message],
        tools: list[Any] | None = None,
        *,
        prompt: bool = False,
        parts: bool | None = None,
        texts: bool | None = None,
    ) -> str:
        """What it writes; nothing if it does not accept it."""
        parts = self._parts if parts is None else parts
        texts = _calls(talk) and self._argument_texts if texts is None else texts
        try:
            return self._rendered(talk, tools, prompt, parts, texts)
        except DataError:
            return ""


TOOLS = [{
    "type": "function",
    "function": {
        "name": "tool", "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]},
    },
}]  # fmt: skip


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call(argument: str) -> Message:
    function = {"name": "tool", "arguments": {"x": argument}}
    return {**_answer(""), "tool_calls": [{"type": "function", "id": ID, "function": function}]}


def _calls(messages: Sequence[Message]) -> bool:
    return any(message.get("tool_calls") for message in messages)


def _in_form(message: Message, parts: bool, texts: bool) -> Message:
    """The message as the template reads it."""
    if reasoning := message.get("reasoning_content") or message.get("thinking"):
        message = {"reasoning": reasoning, **message}  # the other names are Transformers' doing
    if parts:
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    if texts and message.get("tool_calls"):
        calls = [
            {
                **call,
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
            }
            for call in message["tool_calls"]
        ]
        message = {**message, "tool_calls": calls}
    return message


def _agreeing(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _switches(template: str) -> set[str]:
    from jinja2 import meta, nodes

    tree = render_limits.parsed(template)
    if tree is None:
        return set()
    asked = {
        t.node.name for t in tree.find_all(nodes.Test) if t.name in ("defined", "undefined") and isinstance(t.node, nodes.Name)
    }
    asked |= {f.node.name for f in tree.find_all(nodes.Filter) if f.name in ("default", "d") and isinstance(f.node, nodes.Name)}
    asked -= {argument.name for macro in tree.find_all(nodes.Macro) for argument in macro.args}
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    read = meta.find_undeclared_variables(tree)
    return {name for name in read - GIVEN if (name not in own or name in asked) and not name.startswith("_")}


@lru_cache(maxsize=8)
def dated(template: str, moment: datetime) -> str:
    """The template, for which it is always this moment: it may ask `strftime_now`, which would say another day tomorrow."""
    if "strftime_now" not in template:
        return template
    forms = {text: moment.strftime(text) for text in re.findall(r"""["']([^"']*%[^"']*)["']""", template)}
    return (
        "{%- macro strftime_now(form) -%}{%- set said = " + json.dumps(forms) + " -%}"
        "{{- said[form] if form in said else raise_exception('the form ' ~ form ~ ' of the date is not written out in the template') -}}"
        "{%- endmacro -%}" + template
    )
