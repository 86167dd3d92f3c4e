"""What every part of a recipe is: frozen, strict, and clear about what is wrong with it.

Knows no key of a recipe. Each floor declares its part beside the code that reads it; `recipe.py` puts them together.
"""

import importlib
import json
import pkgutil
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from trimtab.core import yaml12
from trimtab.core.errors import RecipeError, listing
from trimtab.core.synonyms import choice_elsewhere, elsewhere, hint

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ModelMetaclass
else:
    _ModelMetaclass = type(BaseModel)


class _Explaining(_ModelMetaclass):
    """Makes `LoRA(rank=0)` in Python raise the same RecipeError as the recipe does."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise RecipeError(explain(error, values)) from None


class Config(BaseModel, metaclass=_Explaining):
    """A frozen part of a recipe: unknown keys, wrong types and values out of range are errors that name the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, raw: Any, handler: Any) -> Any:
        """Every key that is not known, and every other problem, at once."""
        if not isinstance(raw, dict | cls):
            first = next(iter(cls.model_fields), "name")
            raise PydanticCustomError("not_keys", "a mapping with keys such as {first}", {"first": first})
        unknown = [key for key in raw if key not in cls.model_fields] if isinstance(raw, dict) else []
        if not unknown or not isinstance(raw, dict):
            return handler(raw)
        problems: list[InitErrorDetails] = []
        for key in unknown:
            said = PydanticCustomError("unknown_key", "no such key{hint}", {"hint": hint(key, cls.model_fields, elsewhere)})
            problems.append({"type": said, "loc": (str(key),), "input": raw[key]})
        try:
            handler({key: value for key, value in raw.items() if key in cls.model_fields})
        except ValidationError as error:
            others = error.errors(include_url=False)  # what is missing may be what is called otherwise
            problems += [_again(one) for one in others if not (one["type"] == "missing" and len(one["loc"]) == 1)]
        raise ValidationError.from_exception_data(cls.__name__, problems)

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Build one from plain data, or raise RecipeError with the dotted path of what is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(explain(error, raw)) from None

    def plain(self) -> dict[str, Any]:
        """The plain data that `parse` makes an equal one from: every key, defaults included."""
        return self.model_dump(mode="json")


class Choice(Config):
    """A family of configs told apart by `name`: the name of the file, in the family's folder, that holds the member.

    The folder is the registry: `methods/lora.py` is what `method: {name: lora}` means.
    """

    family: ClassVar[str]
    """The package that is the family's folder."""
    default: ClassVar[str]
    """The member that is meant when no name is given."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @classmethod
    def names(cls) -> list[str]:
        """The members' names, sorted: the folder's files, but for those whose names start with an underscore."""
        folder = importlib.import_module(cls.family).__path__
        return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))

    @classmethod
    def member(cls, name: str) -> type[Self]:
        """The member called `name`. Raises RecipeError if the folder has no such file."""
        if name not in cls.names():
            raise RecipeError(f"no such choice: {name!r}{hint(name, cls.names(), choice_elsewhere)}")
        module = importlib.import_module(f"{cls.family}.{name}")
        (found,) = (
            c for c in vars(module).values() if isinstance(c, type) and issubclass(c, cls) and c.__module__ == module.__name__
        )
        return found

    @classmethod
    def pick(cls, raw: Any) -> Any:
        """The member that `raw` (its name, or its keys with `name` among them) describes."""
        if isinstance(raw, str):
            raw = {"name": raw}
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            raise PydanticCustomError("not_keys", "one of {names}, or a mapping with a name", {"names": ", ".join(cls.names())})
        name = raw.get("name", cls.default)
        if name not in cls.names():
            context = {"key": "name", "got": _shown(name), "hint": hint(name, cls.names(), choice_elsewhere)}
            raise PydanticCustomError("unknown_key", "no such choice: {got}{hint}", context)
        return cls.member(name).model_validate({key: value for key, value in raw.items() if key != "name"})

    @model_serializer(mode="wrap")
    def _with_name(self, handler: Any) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


def _again(one: Any) -> InitErrorDetails:
    """A problem that was found, to be raised among others."""
    context = one.get("ctx", {})
    kind = (
        one["type"]
        if one["type"] in get_args(ErrorType)
        else PydanticCustomError(one["type"], "{said}", {**context, "said": one["msg"]})
    )
    return {"type": kind, "loc": one["loc"], "input": one["input"], "ctx": context}


C = TypeVar("C", bound=Config)


def read(kind: type[C], path: Path, words: Iterable[str] = ()) -> C:
    """Build a `kind` from a YAML file, with `section.key=value` words laid over it.

    Raises:
        RecipeError: The file can't be read or parsed, or what it says is not a `kind`.
    """
    return made(kind, yaml12.load_file(path), words, f"{path}:")


def made(kind: type[C], raw: dict[str, Any], words: Iterable[str] = (), where: str = "") -> C:
    """A `kind` of plain data, with `section.key=value` words laid over it. Raises RecipeError, as `read` does."""
    for word in words:
        _overlay(raw, word)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = explain(error, raw)
        separator = "\n" if where and problems.startswith(" ") else " "  # of several, each has its line
        raise RecipeError(f"{where}{separator}{problems}".strip(" ") if where else problems) from None


def word(key: str, value: str) -> str:
    """What `read` takes as a word that sets a key to a text."""
    plain = yaml12.is_text(value)
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def _overlay(raw: dict[str, Any], word: str) -> None:
    key, equals, value = word.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{word!r}: expected section.key=value, for example train.lr=1e-4.")
    *parents, leaf = key.split(".")
    node: Any = raw
    for parent in parents:
        inner = node.get(parent)
        if isinstance(inner, str):  # `model: NAME` and `method: NAME` are short for {name: NAME}
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{word!r}: {parent} is {_shown(inner)} in the recipe, so it has no keys.")
        node[parent] = inner
        node = inner
    try:
        node[leaf] = yaml12.load(value, repr(word), lines=False)
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
"""What pydantic's types of error say that they want."""


def explain(error: ValidationError, raw: Any) -> str:
    """Each problem with `raw` as `dotted.path: what is expected, what came`."""
    found: dict[tuple[str, ...], tuple[Any, list[Any]]] = {}
    for one in error.errors(include_url=False):
        path, value = _place(one, raw)
        found.setdefault(path, (value, []))[1].append(one)
    problems = []
    for path, (value, several) in found.items():
        if any(other[: len(path)] == path for other in found if len(other) > len(path)):
            continue  # complains of what is wrong inside it
        said = _problem(value, several)
        problems.append(f"{'.'.join(path)}: {said}" if path else said)
    return listing(problems, most=40) if len(problems) > 1 else problems[0]


def _place(one: Any, raw: Any) -> tuple[tuple[str, ...], Any]:
    """The path of a problem, as far as what was given has it (pydantic adds the members of a union), and what is there."""
    path: list[str] = []
    value: Any = raw
    for part in one["loc"]:
        inside = part in value if isinstance(value, dict) else isinstance(value, list | tuple) and isinstance(part, int)
        if not inside and one["type"] != "missing":
            break
        path.append(str(part))
        value = value[part] if inside else None
    if one["loc"][-1:] == ("[key]",):
        value = path[-1]
    if key := one.get("ctx", {}).get("key"):
        path.append(key)
    return tuple(path), value


def _problem(value: Any, several: list[Any]) -> str:
    """What is wrong at one place; for a union, each of its members has said what it wants."""
    for one in several:
        if one["type"] == "missing":
            return "missing, and it has no default."
        if one["type"] in ("unknown_key", "value_error"):
            return one["msg"].removeprefix("Value error, ")
    wanted = dict.fromkeys(map(_wanted, several))
    return f"expected {' or '.join(wanted)}, got {_shown(value)}{_advice(value, wanted)}."


def _wanted(one: Any) -> str:
    if one["type"] in _EXPECTED:
        context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in one.get("ctx", {}).items()}
        return _EXPECTED[one["type"]].format(**context)
    return one["msg"].removeprefix("Input should be ")


def _shown(value: Any) -> str:
    """A value as the recipe has it, in short."""
    if isinstance(value, list | tuple | dict):
        return f"{'a' if value else 'an empty'} {'mapping' if isinstance(value, dict) else 'list'}"
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def _advice(value: Any, wanted: Iterable[str]) -> str:
    number = any("number" in one for one in wanted)
    if number and isinstance(value, str) and yaml12.is_number(value):
        return " (a text: leave the quotes out)"
    if "a whole number" in wanted and isinstance(value, float) and value.is_integer():
        return f" (write {int(value)})"
    return ""


def as_tuple(raw: Any) -> Any:
    """A list, or one text that stands for a list of one, as the tuple that a frozen config holds."""
    return (raw,) if isinstance(raw, str) else tuple(raw) if isinstance(raw, list) else raw
