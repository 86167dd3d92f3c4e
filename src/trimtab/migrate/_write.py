"""A recipe as YAML, with comments."""

from typing import Any

from trimtab.core import yaml12
from trimtab.run.recipe import Recipe

WIDTH = 100


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} as the mapping of a recipe, its sections in the order of docs/recipe.md, and names first."""
    found: dict[str, Any] = {section: {} for section in Recipe.model_fields}
    for key in sorted(flat, key=_order):
        node = found
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = flat[key]
    return {section: value for section, value in found.items() if value != {}}


def _order(key: str) -> int:
    section, _, leaf = key.partition(".")
    names = list(getattr(Recipe.model_fields[section].annotation, "model_fields", {})) if section in Recipe.model_fields else []
    name = leaf.partition(".")[0]
    return -1 if name == "name" else names.index(name) if name in names else len(names)


def write(plain: dict[str, Any], comments: dict[str, str], head: str) -> str:
    """The text of a recipe.

    Args:
        comments: Dotted key -> what its line says beside it.
    """
    return "\n".join([f"# {head}", *_lines(plain, comments, "", ""), ""])


def _lines(node: dict[str, Any], comments: dict[str, str], path: str, indent: str) -> list[str]:
    lines = []
    for key, value in node.items():
        dotted = f"{path}{key}"
        comment = comments.get(dotted)
        if isinstance(value, dict) and value:
            lines += [f"{indent}# {comment}"] if comment else []
            lines += [
                f"{indent}{yaml12.dump({key: None}).partition(':')[0]}:",
                *_lines(value, comments, f"{dotted}.", f"{indent}  "),
            ]
            continue
        written = yaml12.dump({key: value}).rstrip("\n").split("\n")
        beside = comment and len(written) == 1 and len(indent) + len(written[0]) + len(comment) < WIDTH
        lines += [f"{indent}# {comment}"] if comment and not beside else []
        lines += [f"{indent}{line}" for line in written]
        if beside:
            lines[-1] += f"  # {comment}"
    return lines
