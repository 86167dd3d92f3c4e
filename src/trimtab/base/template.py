"""A chat template with its switches set, at one moment. What it reads, and how it ends a turn, is found by probing it."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from trimtab.base import render_limits
from trimtab.base.switches import Switches, switches_of
from trimtab.base.template_forms import Form, in_form, with_fixed_date
from trimtab.base.template_probes import CALL_ID, LONG_ID, PROBE, TOOLS, answer, call, result, user
from trimtab.core.chat import CLOSES, OPENS, Message, common_length
from trimtab.core.errors import DataError, RecipeError

BY_EXAMPLE = "chat_template_kwargs"
"""The column in which an example sets switches; TRL has it, too."""
MOST_SWITCHED = 64
"""How many sets of switches are kept with what probing the template found."""


class Ending(NamedTuple):
    """How the assistant's turn ends."""

    token: int
    text: str = ""
    """A text to append to the turn, where the next turn begins with this token (GLM's `<|user|>`)."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        switches: Values of the template's own variables.
        stops: Tokens that end a generation.
        by_example: Names of the switches that an example sets.
        source: One of the tokenizer's templates, if it has several by name; all of them unless given.
    """

    moment: datetime
    """The present moment, for templates that write the date."""

    def __init__(
        self,
        tokenizer: Any,
        switches: Switches,
        stops: frozenset[int],
        by_example: frozenset[str] = frozenset(),
        source: str | None = None,
    ) -> None:
        self.tokenizer, self.switches, self.stops, self.by_example = tokenizer, switches, stops, by_example
        self.source: str | dict[str, str] = tokenizer.chat_template if source is None else source
        self.frames: set[tuple[str, ...]] = set()
        """What the template is known to write around any text; see `data.template_output`."""
        self._by_switches: dict[str, ChatTemplate] = {}
        self._by_name: dict[str, ChatTemplate] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        prompt: bool = False,
        form: Form | None = None,
    ) -> str:
        """The text of a conversation; with `prompt`, up to where the model's answer begins.

        Args:
            form: How messages are given to it; as it needs them unless given.

        Raises:
            DataError: The template does not accept this conversation.
        """
        if isinstance(self.source, dict):
            return self._named(bool(tools)).render(messages, tools, prompt=prompt, form=form)
        template = self.source
        if form is None:
            with_calls = any(message.get("tool_calls") for message in messages)
            form = Form(self._needs_parts, with_calls and self._needs_json_arguments, with_calls and self._needs_short_ids)
        return render_limits.render_within_limits(
            template,
            lambda: self.tokenizer.apply_chat_template(
                [in_form(message, form) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=with_fixed_date(template, self.moment),
                tokenize=False,
                add_generation_prompt=prompt,
                **self.switches,
            ),
        )

    # What it reads

    @cached_property
    def _needs_parts(self) -> bool:
        """It reads contents only as lists of parts (LLaVA's, Idefics')."""
        talk = [user(PROBE)]
        return PROBE not in self._probe(talk, form=Form()) and PROBE in self._probe(talk, form=Form(parts=True))

    @cached_property
    def _needs_json_arguments(self) -> bool:
        """It reads a call's arguments only as JSON text (DeepSeek's)."""
        talk, form = [user("0"), call(PROBE)], Form(self._needs_parts)
        json_form = form._replace(json_arguments=True)
        return PROBE not in self._probe(talk, TOOLS, form=form) and PROBE in self._probe(talk, TOOLS, form=json_form)

    @cached_property
    def _needs_short_ids(self) -> bool:
        """It rejects ids of calls but those of nine letters (Mistral's)."""
        long, short = ([user("0"), call(PROBE, id), result(id)] for id in (LONG_ID, CALL_ID))
        form = Form(self._needs_parts, self._needs_json_arguments)
        return not self._probe(long, TOOLS, form=form) and PROBE in self._probe(short, TOOLS, form=form)

    @cached_property
    def reads_reasoning(self) -> bool:
        """It writes the reasoning of a final answer from the message's key for it."""
        return PROBE in self._probe([user("0"), {**answer("1"), "reasoning_content": PROBE}])

    @cached_property
    def keeps_thinking(self) -> bool:
        """It writes the reasoning at the beginning of a final answer's content."""
        return PROBE in self._probe([user("0"), answer(f"<think>\n{PROBE}\n</think>\n\n1")])

    @cached_property
    def answer_separator(self) -> str:
        """The text between reasoning and answer; of it only what is before every answer, if anything is."""
        question, final = [user("0")], answer(PROBE)
        plain = self._probe([*question, final]).partition(PROBE)[0]
        plain = plain[common_length(plain, self._probe(question, prompt=True)) :]
        reasoned = self._probe([*question, {**final, "reasoning_content": "Reasons."}])
        between = reasoned.partition("Reasons.")[2].partition(PROBE)[0]
        common = between[len(between) - common_length(plain[::-1], between[::-1]) :]
        return common.strip() or between.strip() or CLOSES

    @cached_property
    def opens_reasoning(self) -> bool:
        """Its prompt opens the reasoning, which the model's answer continues."""
        return self._probe([user("0")], prompt=True).rstrip().endswith(OPENS)

    @property
    def switch_names(self) -> list[str]:
        """The names of its switches: variables that it reads, and does not set itself or only where they are not set."""
        templates = self.source.values() if isinstance(self.source, dict) else [self.source]
        return sorted({name for template in templates for name in switches_of(template)})

    def switch_for(self, wanted: Callable[["ChatTemplate"], bool]) -> str | None:
        """A setting of one of its switches that has a wanted effect, as it is written on the command line."""
        for setting, template in self._switched.items():
            template.moment = self.moment
            with suppress(DataError):
                if wanted(template):
                    return setting
        return None

    @cached_property
    def _switched(self) -> dict[str, "ChatTemplate"]:
        """Setting of one switch -> this template with it."""
        settings: dict[str, ChatTemplate] = {}
        for name in self.switch_names:
            form = f"{BY_EXAMPLE}={{{name}: {{}}}}" if name in self.by_example else f"model.template.{name}={{}}"
            for value in (True, False):
                switched = self._with({name: value}, self.by_example)
                settings[form.replace("{}", str(value).lower())] = switched
        return settings

    def chosen(self, tools: Sequence[Any], switches: Switches) -> "ChatTemplate":
        """What an example with these tools and switches is written with.

        Raises:
            DataError: It does not read one of the switches, or of several templates by name, there is none for it.
        """
        return self._named(bool(tools)).with_switches(switches)

    def _named(self, with_tools: bool) -> "ChatTemplate":
        """Of several templates by name the one that Transformers chooses: tool_use with tools, if there is one, or default."""
        if not isinstance(self.source, dict):
            return self
        name = "tool_use" if with_tools and "tool_use" in self.source else "default"
        if name not in self.source:
            raise DataError(
                f"the model has several chat templates by name ({', '.join(self.source)}), and none that is called default: choose one with "
                f"model.chat_template={next(iter(self.source))}"
            )
        if name not in self._by_name:
            self._by_name[name] = ChatTemplate(self.tokenizer, self.switches, self.stops, self.by_example, self.source[name])
        template = self._by_name[name]
        template.moment = self.moment
        return template

    def _with(self, switches: Switches, by_example: frozenset[str]) -> "ChatTemplate":
        source = self.source if isinstance(self.source, str) else None
        return ChatTemplate(self.tokenizer, {**self.switches, **switches}, self.stops, by_example, source)

    def with_switches(self, switches: Switches) -> "ChatTemplate":
        """This template with the switches that an example sets; the same object for the same ones, so that it is probed once.

        Raises:
            DataError: It does not read one of them.
        """
        if not switches:
            return self
        template = self._by_switches.get(key := json.dumps(switches, sort_keys=True))
        if template is None:
            template = self._with(switches, frozenset(switches))
            if problem := template.unread_switch(switches):
                raise DataError(f"{BY_EXAMPLE}.{problem}")
            if len(self._by_switches) >= MOST_SWITCHED:
                self._by_switches.pop(next(iter(self._by_switches)))
            self._by_switches[key] = template
        template.moment = self.moment
        return template

    def unread_switch(self, switches: Switches) -> str | None:
        """A message that names one of these switches which the template does not read; None if it reads all."""
        known = self.switch_names if switches else []
        reads = f"reads {', '.join(known)}" if known else "has no switches"
        return next((f"{name}: the chat template does not read it: it {reads}" for name in switches if name not in known), None)

    def check_switches(self) -> None:
        """Raise RecipeError for a switch that the template does not read."""
        if problem := self.unread_switch(self.switches):
            raise RecipeError(f"model.template.{problem}.")

    # How it ends a turn

    def ending_of(self, message: Message) -> Ending | None:
        """How it ends this assistant turn; None if by no special token."""
        return self.call_ending if message.get("tool_calls") else self.ending

    @cached_property
    def ending(self) -> Ending | None:
        """How an answer ends; None if by no special token. Some templates accept no conversation without tools (Hermes 2 Pro's)."""
        return self._ending([user("0")], answer, user("0"), None) or self._ending([user("0")], answer, user("0"), TOOLS)

    @cached_property
    def call_ending(self) -> Ending | None:
        """How a turn ends that calls a tool."""
        return self._ending([user("0")], call, result(CALL_ID), TOOLS)

    def _ending(
        self, prompt: list[Message], answer: Callable[[str], Message], after: Message, tools: list[Any] | None
    ) -> Ending | None:
        """The token behind an answer: one that stays there when the conversation continues, if any does; the first that is known to end a
        generation, or the last special one. If there is none, the token with which the next turn begins."""
        text, other = (self._probe([*prompt, answer(content)], tools) for content in ("0", "1"))
        if text == other:
            return None
        longer = self._probe([*prompt, answer("0"), after], tools)
        start = len(text) - common_length(text[::-1], other[::-1])
        stays = common_length(text, longer)
        added = {i: token.special for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = {*self.tokenizer.all_special_ids, *(i for i, is_special in added.items() if is_special)}
        behind = self._tokens(text, start, len(text))
        for ids in (self._tokens(text, start, stays), behind):
            for chosen in ([i for i in ids if i in self.stops][:1], [i for i in ids if i in special][-1:]):
                if chosen:
                    return Ending(chosen[0])
        following = self._tokens(longer[len(text) :], 0, len(longer))[:1] if stays == len(text) else []
        own = [Ending(i) for i in behind if i in added]
        next_turns = [Ending(i, self.tokenizer.convert_ids_to_tokens(i)) for i in following if i in special | self.stops]
        known = [ending for ending in next_turns if ending.token in self.stops]
        return next(iter([*known, *own[-1:], *next_turns]), None)

    def _tokens(self, text: str, start: int, end: int) -> list[int]:
        """The tokens of a text between these characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [i for i, (first, last) in tokens if start <= first and last <= end]

    def _probe(self, messages: list[Message], tools: list[Any] | None = None, **arguments: Any) -> str:
        """What `render` gives; nothing if the template does not accept it."""
        try:
            return self.render(messages, tools, **arguments)
        except DataError:
            return ""
