"""A chat template of the user's choice: from a file, or one of several that the model has by name."""

import json
from pathlib import Path
from typing import Any

from trimtab.base.render_limits import parse_template
from trimtab.core.errors import RecipeError
from trimtab.core.files import expand_user

Templates = str | dict[str, str]
"""A chat template, or several by name."""


def choose_template(choice: str, own: Templates | None) -> tuple[Templates, str]:
    """The chat template that `model.chat_template` means, and what means it from anywhere: the file's whole path, or the name.

    Args:
        own: The model's.

    Raises:
        RecipeError: There is none.
    """
    path = expand_user(choice)
    if not path.exists() and isinstance(own, dict) and path.name == choice and not path.suffix:
        if choice not in own:
            raise RecipeError(
                f"model.chat_template: {choice} is no file, and none of the model's templates: {', '.join(own)}. Give one of these or a file."
            )
        return own[choice], choice
    return read_template(path), str(path.absolute())


def read_template(path: Path) -> Templates:
    """The chat template in a file, or in the `chat_template` of a tokenizer's JSON file. Raises RecipeError if there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"model.chat_template: {path} cannot be read: {error}. Give a text file with a Jinja template."
        ) from None
    template = _in_json(text, path) if path.suffix.lower() == ".json" else text
    for name, source in template.items() if isinstance(template, dict) else [("", template)]:
        which = f"{path}: {name}" if name else path
        if not source.strip():
            raise RecipeError(f"model.chat_template: {which} is empty.")
        if parse_template(source) is None:
            raise RecipeError(f"model.chat_template: {which} is not a Jinja template that can be parsed.")
    return template


def _in_json(text: str, path: Path) -> Templates:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"model.chat_template: {path} is not valid JSON: {error}.") from None
    template = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, list) and template and all(isinstance(one, dict) for one in template):
        template = {one.get("name"): one.get("template") for one in template}
    if isinstance(template, dict) and template and all(isinstance(text, str) for pair in template.items() for text in pair):
        return template
    if not isinstance(template, str):
        raise RecipeError(
            f"model.chat_template: {path} has no chat_template: give a tokenizer_config.json that has one, or a file with the Jinja template."
        )
    return template
