"""A file of another tool as a recipe, with an account of every setting in it."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trimtab.core import files, yaml12
from trimtab.core.errors import RecipeError
from trimtab.migrate import axolotl, llamafactory, swift, trl
from trimtab.migrate._settings import Setting, Settings
from trimtab.migrate._write import nested, write
from trimtab.run.recipe import Recipe

TOOLS: dict[str, ModuleType] = {"axolotl": axolotl, "llamafactory": llamafactory, "swift": swift, "trl": trl}
"""What `--from` takes: the files of this folder."""
OPTIONS = Path(__file__).parent / "options"


class Conversion(NamedTuple):
    """A recipe, and what became of each setting of the file that it was made of."""

    tool: str
    version: str
    """Which version's options are known."""
    recipe: Recipe
    text: str
    """The recipe as a file: the keys that were given or differ here, with comments where a value was changed."""
    settings: list[Setting]


def convert(path: Path, tool: str | None = None, words: tuple[str, ...] = (), *, devices: int = 1) -> Conversion:
    """Convert a file. Raises RecipeError if it describes nothing that a recipe can say.

    Args:
        tool: Which tool it is for; recognized by its settings unless given.
        words: Keys of the recipe that are set, too: `section.key=value`.
        devices: On how many devices the tool trained: a factor of its effective batch size.
    """
    raw = yaml12.load_file(path)
    known = {name: options_of(name) for name in TOOLS}
    tool = tool or _recognize(path, raw, known)
    given, defaults, kind = _flat(path, tool, raw, known[tool])
    settings = Settings(TOOLS[tool].TITLE, str(path), given, {**defaults, **TOOLS[tool].DEFAULTS}, kind)
    TOOLS[tool].convert(settings, devices)
    settings.settle_rest([name for options in known[tool].values() for name in options])
    if "start" in settings.recipe:
        settings.recipe = {key: value for key, value in settings.recipe.items() if not key.startswith("method.")}
        settings.comments["start"] = "its method is used"
    plain = nested(settings.recipe)
    recipe = Recipe.parse(plain, words, f"{path}, as a recipe:")
    version = files.read_json(OPTIONS / f"{tool}.json")["version"]
    head = f"Made of {path.name} by trimtab convert ({TOOLS[tool].TITLE})."
    return Conversion(tool, version, recipe, write(plain, settings.comments, head), settings.settled)


def options_of(tool: str) -> dict[str, dict[str, Any]]:
    """A tool's options and their defaults, by the class that they belong to."""
    options: dict[str, dict[str, Any]] = files.read_json(OPTIONS / f"{tool}.json")["options"]
    return options


def _recognize(path: Path, raw: Mapping[str, Any], known: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The tool that knows more of a file's settings than any other."""
    names = {
        tool: {name for name in raw if name in options or any(name in inner for inner in options.values())}
        for tool, options in known.items()
    }
    best = max(names, key=lambda tool: len(names[tool]))
    if not names[best]:
        raise RecipeError(
            f"{path}: none of its keys is a setting of Axolotl, LLaMA-Factory, ms-swift, Unsloth or TRL ({', '.join(list(raw)[:5])}, …)."
        )
    if any(len(names[tool]) == len(names[best]) for tool in names if tool != best):
        raise RecipeError(f"{path}: its keys are settings of several tools: say --from {'|'.join(TOOLS)}.")
    return best


def _flat(
    path: Path, tool: str, raw: Mapping[str, Any], options: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A file's settings and the tool's defaults. Of TRL and Unsloth, whose classes have defaults of their own, the classes' that are used."""
    if tool != "trl":
        (defaults,) = options.values()
        return dict(raw), defaults, ""
    given = {key: value for key, value in raw.items() if key not in options}
    classes = [name for name in options if name in raw]
    for name in classes:
        if not isinstance(raw[name], dict):
            raise RecipeError(f"{path}: {name}: expected a mapping of its arguments, got {raw[name]!r}.")
        given.update(raw[name])
    trainer = next((name for name in classes if name in trl.TRAINERS), None) or _trainer(given, options)
    adapts = [name for name in trl.UNSLOTH if name in raw] or ["LoraConfig"]
    used = [*([] if classes and "script" not in classes else ["script"]), *adapts, trainer]
    return given, {key: value for name in used for key, value in options[name].items()}, trainer


def _trainer(given: Mapping[str, Any], options: dict[str, dict[str, Any]]) -> str:
    """Which trainer flat arguments are for, by the ones that only it has."""
    return max(trl.TRAINERS, key=lambda name: sum(key in options[name] for key in given))
