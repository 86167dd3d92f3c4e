"""Configuration: frozen, strictly validated parts of a recipe, and error messages that name the key.

No key of a recipe is declared here. Each floor declares its part beside the code that reads it; `run/recipe.py` combines them.
"""

import importlib
import json
import pkgutil
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from trimtab.core import yaml12
from trimtab.core.errors import RecipeError, listing
from trimtab.core.synonyms import suggest, translate_choice, translate_key

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelMetaclass
else:
    _ModelMetaclass = type(BaseModel)


SHORT = ""
"""What an override's text stands under in a mapping that it had been alone for: `model: NAME` is short for {name: NAME}, and a source
for {path: SOURCE}."""


class _RaisesRecipeError(_ModelMetaclass):
    """Metaclass by which `LoRA(rank=0)` in Python raises the same RecipeError as the recipe does."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise RecipeError(_explain(error, values)) from None


class Config(BaseModel, metaclass=_RaisesRecipeError):
    """A frozen part of a recipe: unknown keys, wrong types and values out of range are errors that name the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _report_unknown_keys(cls, raw: Any, handler: Any) -> Any:
        """Validate, and report unknown keys together with every other problem."""
        first = next(iter(cls.model_fields), "name")
        if isinstance(raw, dict) and SHORT in raw:
            raw = {first: raw[SHORT], **{key: value for key, value in raw.items() if key != SHORT}}
        if not isinstance(raw, dict | cls):
            raise PydanticCustomError("not_keys", "a mapping with keys such as {first}", {"first": first})
        unknown = [key for key in raw if key not in cls.model_fields] if isinstance(raw, dict) else []
        if not unknown or not isinstance(raw, dict):
            return handler(raw)
        problems: list[InitErrorDetails] = []
        for key in unknown:
            kind = PydanticCustomError(
                "unknown_key", "no such key{hint}", {"hint": suggest(key, cls.model_fields, translate_key)}
            )
            problems.append({"type": kind, "loc": (str(key),), "input": raw[key]})
        try:
            handler({key: value for key, value in raw.items() if key in cls.model_fields})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["type"] != "missing" or len(detail["loc"]) > 1:  # a missing key may be the unknown one, misspelt
                    problems.append(_reraisable(detail))
        raise ValidationError.from_exception_data(cls.__name__, problems)

    @classmethod
    def read(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, and apply `section.key=value` overrides. Raises RecipeError for the file or its content."""
        return cls.parse(yaml12.load_file(path), overrides, f"{path}:")

    @classmethod
    def parse(cls, raw: Any, overrides: Iterable[str] = (), where: str = "") -> Self:
        """Validate plain data, and `section.key=value` overrides applied to it, in place.

        Args:
            where: What precedes the problems in an error.

        Raises:
            RecipeError: With the dotted path of each problem.
        """
        for text in overrides:
            _apply_override(raw, text)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = _explain(error, raw)
            separator = "\n" if where and problems.startswith(" ") else " "  # several problems have a line each
            raise RecipeError(f"{where}{separator}{problems}".strip(" ") if where else problems) from None

    def plain(self) -> dict[str, Any]:
        """Every key as plain data, defaults included; `parse` gives an equal config."""
        return self.model_dump(mode="json")


class Choice(Config):
    """A family of configs distinguished by `name` (see `key`), which is the name of the member's file in the family's folder.

    The folder is the registry: `methods/lora.py` is what `method: {name: lora}` means.
    """

    family: ClassVar[str]
    """The package of the family's folder."""
    default: ClassVar[str]
    """The member used when no name is given."""
    key: ClassVar[str] = "name"
    """What a recipe calls the name."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def names(cls) -> list[str]:
        """The members' names, sorted: the folder's files whose names do not start with an underscore."""
        folder = importlib.import_module(cls.family).__path__
        return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))

    @classmethod
    def member(cls, name: str) -> type[Self]:
        """The member called `name`. Raises RecipeError if the folder has no such file."""
        if name not in cls.names():
            raise RecipeError(f"no such choice: {name!r}{suggest(name, cls.names(), translate_choice)}")
        module = importlib.import_module(f"{cls.family}.{name}")
        (member,) = (
            c for c in vars(module).values() if isinstance(c, type) and issubclass(c, cls) and c.__module__ == module.__name__
        )
        return member

    @classmethod
    def pick(cls, raw: Any) -> Any:
        """The member described by `raw`: its name, or its keys including `name`."""
        if isinstance(raw, str):
            raw = {cls.key: raw}
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            context = {"names": ", ".join(cls.names()), "called": f"{'an' if cls.key[0] in 'aeiou' else 'a'} {cls.key}"}
            raise PydanticCustomError("not_keys", "one of {names}, or a mapping with {called}", context)
        raw = {cls.key if key == SHORT else key: value for key, value in raw.items()}
        name = raw.get(cls.key, cls.default)
        if name not in cls.names():
            context = {"key": cls.key, "got": _format(name), "hint": suggest(name, cls.names(), translate_choice)}
            raise PydanticCustomError("unknown_key", "no such choice: {got}{hint}", context)
        return cls.member(name).model_validate({key: value for key, value in raw.items() if key != cls.key})

    @model_serializer(mode="wrap")
    def _with_name(self, handler: Any) -> dict[str, Any]:
        return {self.key: self.name, **handler(self)}


def _reraisable(detail: Any) -> InitErrorDetails:
    """An error that pydantic has reported, in the form in which it can be raised again."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind not in get_args(ErrorType):
        kind = PydanticCustomError(kind, "{message}", {**context, "message": detail["msg"]})
    return {"type": kind, "loc": detail["loc"], "input": detail["input"], "ctx": context}


def override(key: str, value: str) -> str:
    """The override `key=value` that sets a key to a text."""
    plain = yaml12.is_text(value)
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def _apply_override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{text!r}: expected section.key=value, for example train.lr=1e-4.")
    *parents, leaf = key.split(".")
    node: Any = raw
    for parent in parents:
        inner = node.get(parent)
        if isinstance(inner, str):
            inner = {SHORT: inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{text!r}: {parent} is {_format(inner)} in the recipe, so it has no keys.")
        node[parent] = inner
        node = inner
    try:
        node[leaf] = yaml12.load(value, repr(text), lines=False)
    except RecipeError as error:
        quoted = f"{key}='{value}'"
        shown = shlex.quote(quoted) if set(value) & set("\"'$`!") else f'"{quoted}"'
        raise RecipeError(f"{error} If it is meant as a text, quote it twice: {shown}") from None


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "a mapping",
    "literal_error": "{expected}",
}
"""What pydantic's error types expect."""


def _explain(error: ValidationError, raw: Any) -> str:
    """Each problem with `raw` as `dotted.path: expected …, got …`."""
    by_path: dict[tuple[str, ...], tuple[Any, list[Any]]] = {}
    for detail in error.errors(include_url=False):
        path, value = _locate(detail, raw)
        by_path.setdefault(path, (value, []))[1].append(detail)
    problems = []
    for path, (value, details) in by_path.items():
        if any(inner[: len(path)] == path for inner in by_path if len(inner) > len(path)):
            continue  # its cause is a problem inside it
        message = _message(value, details)
        problems.append(f"{'.'.join(path)}: {message}" if path else message)
    return listing(problems, most=40) if len(problems) > 1 else problems[0]


def _locate(detail: Any, raw: Any) -> tuple[tuple[str, ...], Any]:
    """The path of a problem, as far as `raw` has it (pydantic adds the members of a union), and the value there."""
    path: list[str] = []
    value: Any = raw
    for part in detail["loc"]:
        inside = part in value if isinstance(value, dict) else isinstance(value, list | tuple) and isinstance(part, int)
        if not inside and detail["type"] != "missing":
            break
        path.append(str(part))
        value = value[part] if inside else None
    if detail["loc"][-1:] == ("[key]",):
        value = path[-1]
    if key := detail.get("ctx", {}).get("key"):
        path.append(key)
    return tuple(path), value


def _message(value: Any, details: list[Any]) -> str:
    """What is wrong at one path. A union gives one detail per member."""
    for detail in details:
        if detail["type"] == "missing":
            return "missing, and it has no default."
        if detail["type"] in ("unknown_key", "value_error"):
            return detail["msg"].removeprefix("Value error, ")
    expected = dict.fromkeys(map(_expected, details))
    return f"expected {' or '.join(expected)}, got {_format(value)}{_correction(value, expected)}."


def _expected(detail: Any) -> str:
    if detail["type"] in _EXPECTED:
        context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in detail.get("ctx", {}).items()}
        return _EXPECTED[detail["type"]].format(**context)
    return detail["msg"].removeprefix("Input should be ")


def _format(value: Any) -> str:
    """A value as it is written in a recipe, shortened."""
    if isinstance(value, list | tuple | dict):
        return f"{'a' if value else 'an empty'} {'mapping' if isinstance(value, dict) else 'list'}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _correction(value: Any, expected: Iterable[str]) -> str:
    """How to write a number that is quoted, or whole but written as a fraction."""
    if any("number" in kind for kind in expected) and isinstance(value, str) and yaml12.is_number(value):
        return " (a text: leave the quotes out)"
    if "a whole number" in expected and isinstance(value, float) and value.is_integer():
        return f" (write {int(value)})"
    return ""


def as_tuple(raw: Any) -> Any:
    """A list, or a text that stands for a list of one, as the tuple that a frozen config holds."""
    return (raw,) if isinstance(raw, str) else tuple(raw) if isinstance(raw, list) else raw
