"""YAML 1.2, the language of recipes. PyYAML alone reads YAML 1.1, where 1e-4 is a text, and 010, 1:30 and no are not."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from trimtab.core.errors import RecipeError

_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_PLAIN = (
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("int", _INT, [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+.0123456789"]),
)
"""Plain scalars that are not texts: tag, pattern, and possible first characters ("" if it can be empty)."""


def load_file(path: Path) -> dict[str, Any]:
    """The mapping in a recipe's file. Raises RecipeError if it can't be read, or holds something else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe (looked in {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a recipe: byte {error.start:,} is not UTF-8 text.") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error.strerror}.") from None
    raw = load(text, str(path))
    if not isinstance(raw, dict | None):
        kinds = {str: repr(raw), list: "a list" if raw else "an empty list", bool: str(raw).lower()}
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys such as `model:` and `data:`, not {kinds.get(type(raw), raw)}."
        )
    return raw or {}


def load(text: str, where: str, *, lines: bool = True) -> Any:
    """The value that a YAML text describes: mappings with text keys, lists, texts, numbers, true, false, null.

    Args:
        where: The name of the text in errors.
        lines: Whether errors include the line.

    Raises:
        RecipeError: It is not YAML, gives a key twice, or has a tag for something else.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        line, reason = _explain(error, text)
        raise RecipeError(f"{where}{f':{line}' if lines else ''}: not valid YAML: {reason}.") from None
    except (ValueError, KeyError) as error:
        raise RecipeError(f"{where}: not valid YAML: {error} is not what its !!tag says.") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: nested too deeply.") from None


def dump(plain: dict[str, Any]) -> str:
    """Plain data as YAML that parsers of YAML 1.2 and of 1.1 read back unchanged."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_text(text: str) -> bool:
    """Whether this text, unquoted, is read as itself."""
    try:
        return bool(load(text, "text") == text)
    except RecipeError:
        return False


def is_number(text: str) -> bool:
    """Whether this text, unquoted, would be read as a number."""
    return bool(_INT.match(text) or _FLOAT.match(text))


def _explain(error: Any, text: str) -> tuple[int, str]:
    """The line and the reason of an error."""
    if isinstance(error, ReaderError):
        return text.count("\n", 0, error.position) + 1, f"the character {text[error.position]!r} is not allowed"
    reason = f"{error.context}, {error.problem}" if error.problem.startswith("but ") else error.problem
    return error.problem_mark.line + 1, reason


class _Loader(yaml.SafeLoader):
    """Builds plain data only, and refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, "a key that is not a text", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


def _construct_int(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))  # PyYAML's would read 010 as 8


def _represent_text(dumper: Any, text: str) -> Any:
    breaks = any(character in text for character in "\x85\u2028\u2029")  # line ends to PyYAML, unless in double quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _represent_text)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{tag}" for tag in ("null", "bool", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {tag: make for tag, make in _Loader.yaml_constructors.items() if tag is None or tag in _PLAIN_TAGS}
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
