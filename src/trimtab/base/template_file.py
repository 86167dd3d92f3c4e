"""A chat template from a file of the user's, instead of the model's own or where it has none."""

import json
from pathlib import Path
from typing import Any

from trimtab.base.render_limits import parse_template
from trimtab.core.errors import RecipeError


def read_template(path: Path) -> str:
    """The chat template in a file, or in the `chat_template` of a tokenizer's JSON file. Raises RecipeError if there is none."""
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"model.chat_template: {path} cannot be read: {error}. Give a text file with a Jinja template."
        ) from None
    if path.suffix.lower() == ".json":
        template = _in_json(template, path)
    if not template.strip():
        raise RecipeError(f"model.chat_template: {path} is empty.")
    if parse_template(template) is None:
        raise RecipeError(f"model.chat_template: {path} is not a Jinja template that can be parsed.")
    return template


def _in_json(text: str, path: Path) -> str:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"model.chat_template: {path} is not valid JSON: {error}.") from None
    template = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, list | dict):
        named = template if isinstance(template, dict) else [str(one.get("name")) for one in template if isinstance(one, dict)]
        raise RecipeError(
            f"model.chat_template: {path} holds several templates ({', '.join(named)}). Write the one to use into a file with the ending .jinja."
        )
    if not isinstance(template, str):
        raise RecipeError(
            f"model.chat_template: {path} has no chat_template: give a tokenizer_config.json that has one, or a file with the Jinja template."
        )
    return template
