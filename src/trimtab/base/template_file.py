"""A chat template from a file of the user's, instead of the model's own or where it has none."""

from pathlib import Path

from trimtab.base.render_limits import parse_template
from trimtab.core.errors import RecipeError


def read_template(path: Path) -> str:
    """The chat template in a file. Raises RecipeError if there is none."""
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"model.chat_template: {path} cannot be read: {error}. Give a text file with a Jinja template."
        ) from None
    if not template.strip():
        raise RecipeError(f"model.chat_template: {path} is empty.")
    if parse_template(template) is None:
        raise RecipeError(f"model.chat_template: {path} is not a Jinja template that can be parsed.")
    return template
