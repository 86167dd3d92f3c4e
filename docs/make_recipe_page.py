"""Write docs/recipe.md from the recipe's own declarations: python docs/make_recipe_page.py. A test compares the two."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"
HEAD = """# The recipe

Everything that decides a run's result, in one YAML file; a copy with every default written out is kept in the run, and repeats it. Unknown keys,
wrong types and values out of range are refused. On the command line, `trimtab train RECIPE.yaml section.key=value …` overrides any key.
Relative paths start where the command runs. This page is written from the code by `docs/make_recipe_page.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "| key | default | |\n|---|---|---|\n| `output` | " + _default(Recipe.model_fields["output"]) + " | The run's folder, a new one. |\n"]
    for key, field in Recipe.model_fields.items():
        kind = _model_of(field.annotation)
        if kind is None:
            continue
        parts.append(f"\n## {key}\n\n{field.description}\n")
        if kind in (Method, Objective):
            for name in kind.names():
                member = kind.member(name)
                summary = (member.__doc__ or "").strip().splitlines()[0]
                parts.append(f"\n### `{key}: {{name: {name}}}`\n\n{summary}\n{_table(member)}")
        else:
            parts.append(_table(kind))
    return "".join(parts)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _table(kind: type[BaseModel]) -> str:
    if not kind.model_fields:
        return "\nIt has no keys.\n"
    rows = [f"| `{key}` | {_default(field)} | {field.description} |" for key, field in kind.model_fields.items()]
    return "\n| key | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, tuple) and len(field.default) == 1:
        return f"`{field.default[0]}`"
    return "none" if field.default is None else f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
