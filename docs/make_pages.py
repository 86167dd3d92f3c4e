"""Write what the documents say about the code from the code: python docs/make_pages.py. A test holds them to it.

docs/recipe.md comes from the recipe's own declarations, the tree in README.md from the files' first lines.
"""

import ast
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "recipe.md", ROOT / "README.md"
FLOORS = (
    ("words and pages", ("cli.py", "commands.py", "__main__.py", "__init__.py")),
    ("a run, top to bottom", ("recipe.py", "run.py", "api.py")),
    ("scores, handing over, reports", ("evaluate", "deploy", "report")),
    ("the loop", ("train",)),
    ("what makes an answer good", ("objectives",)),
    ("what is computed", ("engine",)),
    ("neighbours that do not know each other", ("base", "methods", "data", "artifacts")),
    ("the ground", ("errors.py", "files.py", "config.py", "yaml12.py", "startup.py", "attention.py")),
)
HEAD = """# The recipe

Everything that decides a run's result, in one YAML file; a copy with every default written out is kept in the run, and repeats it. Unknown keys,
wrong types and values out of range are refused. On the command line, `trimtab train RECIPE.yaml section.key=value …` overrides any key.
Relative paths start where the command runs. This page is written from the code by `docs/make_pages.py`.

"""


def tree() -> str:
    """src/trimtab, the highest floor first, a line a file."""
    source, lines = ROOT / "src" / "trimtab", []
    for number, (what, names) in reversed(list(enumerate(reversed(FLOORS)))):
        lines.append(f"{number}  {what}")
        for name in names:
            files = [source / name] if name.endswith(".py") else sorted((source / name).glob("*.py"))
            for file in files:
                if file.name == "__init__.py" and file.parent != source:
                    continue
                summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")
                lines.append(f"   {file.relative_to(source).as_posix():22} {summary}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def readme() -> str:
    """README.md with the tree as it is now."""
    before, _, rest = README.read_text(encoding="utf-8").partition("<!-- tree -->\n")
    _, _, after = rest.partition("<!-- end of tree -->\n")
    return f"{before}<!-- tree -->\n{tree()}<!-- end of tree -->\n{after}"


def page() -> str:
    """The whole of docs/recipe.md."""
    parts = [
        HEAD,
        "| key | default | |\n|---|---|---|\n| `output` | "
        + _default(Recipe.model_fields["output"])
        + " | The run's folder, a new one. |\n",
    ]
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
    rows = [
        f"| `{key}` | {_default(field)} | {field.description}{_choices(field)} |" for key, field in kind.model_fields.items()
    ]
    return "\n| key | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _choices(field: Any) -> str:
    options = get_args(field.annotation)
    return f" One of {', '.join(f'`{o}`' for o in options)}." if options and all(isinstance(o, str) for o in options) else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and len(value) == 1:
        return f"`{value[0]}`"
    return "none" if value is None else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
