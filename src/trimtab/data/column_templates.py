"""Templates that write a prompt or completion from the columns of a file: `prompt: "Translate: {source}"`."""

import difflib
import json
import re
from collections.abc import Mapping, Set
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from trimtab.data.example import InvalidExample
from trimtab.data.strict_json import kind

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|([{}])")
"""A literal brace, a placeholder, or a brace that is neither."""


def _quoted(raw: Any) -> Any:
    if isinstance(raw, dict):
        column = next(iter(raw), "column")
        raise ValueError(f"in YAML, braces without quotes are a mapping: write '{{{column}}}' in quotes.")
    return raw


def _checked(template: str) -> str:
    """The template itself. Raises ValueError if a brace is left open, or it has no placeholder."""
    columns = []
    for part in _PARTS.finditer(template):
        if part[2]:
            raise ValueError(f"the brace {part[2]} at character {part.start() + 1} is alone: write {part[2] * 2} for a brace.")
        if part[1] is not None and not part[1].strip():
            raise ValueError("{} names no column: write the column's name between the braces.")
        columns += [part[1]] if part[1] else []
    if not columns:
        raise ValueError(f"{template!r} has no column in braces, so it is the same in every example: write {{column}}.")
    return template


ColumnTemplate = Annotated[str, BeforeValidator(_quoted), AfterValidator(_checked)]
"""A text with names of columns in braces; `{{` and `}}` are literal braces."""


def columns_of(template: str) -> set[str]:
    """The columns that a template names."""
    return {part[1] for part in _PARTS.finditer(template) if part[1]}


def fill(templates: Mapping[str, str], row: dict[str, Any], kept: Set[str] = frozenset()) -> dict[str, Any]:
    """The row with the columns that the templates write, without those that they read.

    Args:
        templates: Name of a column -> its template.
        kept: Columns that are read otherwise, too.

    Raises:
        InvalidExample: A column is missing or null, or all columns of a template are empty.
    """
    read = {column for template in templates.values() for column in columns_of(template)}
    for name in templates:
        if name in row and name not in read:
            raise InvalidExample(
                f"has a column {name}, in whose place data.{name} writes another without reading it: use it there as {{{name}}}, or ignore "
                f"it with data.ignore=[{name}]"
            )
    written = {name: _fill(f"data.{name}", template, row) for name, template in templates.items()}
    return {**{name: value for name, value in row.items() if name not in read - kept}, **written}


def _fill(name: str, template: str, row: dict[str, Any]) -> str:
    texts = {column: _text(name, column, row) for column in columns_of(template)}
    if not any(text.strip() for text in texts.values()):
        raise InvalidExample(f"{name}: every column that it reads is empty ({', '.join(sorted(texts))})")
    return _PARTS.sub(lambda part: texts[part[1]] if part[1] else part[0][0], template)


def _text(name: str, column: str, row: dict[str, Any]) -> str:
    """A column's value as text: a text as it is, anything else as JSON writes it."""
    if column not in row:
        raise InvalidExample(f"{name}: there is no column {column!r}{_advice(column, row)}; the example has {', '.join(row)}")
    value = row[column]
    if isinstance(value, str):
        return value
    if value is None:
        raise InvalidExample(
            f"{name}: column {column!r} is null: write a text there, or leave the example out (data.bad_rows=skip)"
        )
    if isinstance(value, list) and any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value):
        raise InvalidExample(
            f"{name}: column {column!r} is a list of messages, which can't be part of a text: use data.columns"
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        shown = kind(value) if isinstance(value, float | list | dict) else type(value).__name__
        raise InvalidExample(f"{name}: column {column!r} holds {shown} that JSON can't write: write it as a text") from None


def _advice(column: str, row: dict[str, Any]) -> str:
    whole = re.split(r"[.!:\[]", column, maxsplit=1)[0]
    if whole != column and whole in row:
        return f" ({whole!r} is one: braces hold the whole name of a column, without attributes, indices or formats)"
    named = {str(name).strip().lower(): name for name in row}
    near = difflib.get_close_matches(column.strip().lower(), named, n=1)
    return f" (is it {named[near[0]]!r}?)" if near else ""
