"""The system message that a recipe gives to examples without one, in addition to or in the place of their own."""

from dataclasses import replace
from typing import NamedTuple

from trimtab.core.errors import DataError, RecipeError
from trimtab.data.example import Conversation, Example, InvalidExample, Judged, Preference
from trimtab.data.rendering import Tokenizing


class SystemMessage(NamedTuple):
    """What a recipe says about system messages."""

    text: str | None = None
    """Of examples that have none."""
    drop: bool = False
    """Whether the examples' own are left out."""


AS_IT_IS = SystemMessage()


def with_system(example: Example, system: SystemMessage) -> Example:
    """The example with the system message that the recipe wants. Raises InvalidExample for a plain text, which can't have one."""
    if system == AS_IT_IS:
        return example
    if isinstance(example, Preference):
        return replace(example, chosen=_changed(example.chosen, system), rejected=_changed(example.rejected, system))
    if isinstance(example, Judged):
        return replace(example, conversation=_changed(example.conversation, system))
    if isinstance(example, Conversation):
        return _changed(example, system)
    if system.text is not None:
        raise InvalidExample(
            "is a plain text, which has no system message: data.system is for conversations alone, so leave it out"
        )
    return example


def _changed(example: Conversation, system: SystemMessage) -> Conversation:
    kept = [n for n, message in enumerate(example.messages) if not (system.drop and message["role"] == "system")]
    messages = [example.messages[n] for n in kept]
    if system.text is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system.text})
    shift = len(messages) - len(kept)
    return replace(
        example,
        messages=tuple(messages),
        weights={place + shift: example.weights[n] for place, n in enumerate(kept) if n in example.weights},
        prompt=sum(n < example.prompt for n in kept) + (shift if example.prompt else 0),
        is_completion=example.is_completion and not shift,
    )


def check_system(text: str | None, base: Tokenizing) -> None:
    """Raise RecipeError if the base's chat template can't write this system message."""
    if text is None:
        return
    instead = "Begin the prompt with it instead, with data.prompt, or leave data.system out."
    if not base.has_template:
        raise RecipeError(f"data.system: this model has no chat template, so it has no system messages. {instead}")
    user = {"role": "user", "content": "0"}
    try:
        base.template.render([user], prompt=True)
    except DataError:
        return  # it accepts no such conversation at all; each example says why it is not accepted
    try:
        rendered = base.template.render([{"role": "system", "content": text}, user], prompt=True)
    except DataError as error:
        raise RecipeError(f"data.system: the model's chat template takes no system message: {error}. {instead}") from None
    if text.strip() not in rendered:
        raise RecipeError(f"data.system: the model's chat template leaves the system message out. {instead}")
