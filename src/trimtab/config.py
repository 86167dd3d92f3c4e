"""What every part of a recipe is: frozen, strict, and clear about what is wrong with it.

Knows no key of a recipe. Each floor declares its part beside the code that reads it; `recipe.py` puts them together.
"""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from trimtab.errors import RecipeError, listing

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
            raise RecipeError(explain(error)) from None


class Config(BaseModel, metaclass=_Explaining):
    """A frozen part of a recipe: unknown keys, wrong types and values out of range are errors that name the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, raw: Any) -> Any:
        for key in raw if isinstance(raw, dict) else ():
            if key not in cls.model_fields:
                # {{ }}: the message is a template that pydantic fills from the context.
                raise PydanticCustomError("unknown_key", "no such key.{hint}", {"key": str(key), "hint": near(key, cls.model_fields)})
        return raw

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Build one from plain data, or raise RecipeError with the dotted path of what is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(explain(error)) from None

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
            raise RecipeError(f"no such choice: {name!r}.{near(name, cls.names())}")
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
        if not isinstance(raw, dict):
            return raw
        name = raw.get("name", cls.default)
        if name not in cls.names():
            raise PydanticCustomError(
                "unknown_key", "no such choice: {got}.{hint}", {"key": "name", "got": repr(name), "hint": near(name, cls.names())}
            )
        return cls.member(name).model_validate({key: value for key, value in raw.items() if key != "name"})

    @model_serializer(mode="wrap")
    def _with_name(self, handler: Any) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


C = TypeVar("C", bound=Config)


def read(kind: type[C], path: Path, words: Iterable[str] = ()) -> C:
    """Build a `kind` from a YAML file, with `section.key=value` words laid over it.

    Raises:
        RecipeError: The file can't be read or parsed, or what it says is not a `kind`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe (looked in {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}.") from None
    raw = _load_yaml(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys such as `model:` and `data:`, not a {type(raw).__name__}.")
    for word in words:
        _overlay(raw, word)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{explain(error)}") from None


def _overlay(raw: dict[str, Any], word: str) -> None:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise RecipeError(f"{word!r}: expected section.key=value, for example train.lr=1e-4.")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        inner = node.get(parent)
        if isinstance(inner, str):  # `model: NAME` and `method: NAME` are short for {name: NAME}
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{word!r}: {parent} is {inner!r} in the recipe, so it has no keys.")
        node[parent] = inner
        node = inner
    node[leaf] = _load_yaml(value, f"{word!r}")


def explain(error: ValidationError) -> str:
    """Each problem as `dotted.path: what is expected, what came`, the first five."""
    problems = []
    for one in error.errors(include_url=False):
        path = [str(part) for part in one["loc"]]
        context = one.get("ctx", {})
        if "key" in context:
            path.append(context["key"])
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "missing":
            message = "missing, and it has no default."
        elif one["type"] not in ("unknown_key", "value_error"):
            message = f"{message[0].lower()}{message[1:].replace('Input should be', 'expected').replace('input should be', 'expected')}"
            message = f"{message.replace('input should be', 'expected')}, got {one['input']!r}."
        problems.append(f"{'.'.join(path)}: {message}" if path else message)
    return listing(problems).lstrip() if len(problems) == 1 else listing(problems)


def near(word: Any, known: Iterable[str]) -> str:
    """` Did you mean …?`, or the whole list when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2 (`1e-4` is a number) and without keys given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', error)}.") from None
