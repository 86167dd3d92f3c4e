"""Where examples come from: several sources by name, or plain paths where they say no more."""

import re
from typing import Any

from trimtab.migrate._settings import Settings

Source = dict[str, Any]
"""The keys of a source of `data.train`, its `path` among them."""


def write_sources(settings: Settings, name: str, sources: list[Source], key: str = "data.train") -> None:
    """Write sources at a key of the recipe: as paths, if they have nothing else, or each under a name."""
    if all(set(source) == {"path"} for source in sources):
        paths = [source["path"] for source in sources]
        settings.write(name, key, paths[0] if len(paths) == 1 or key == "data.eval" else paths)
        return
    named: dict[str, Source] = {}
    for source in sources:
        named[_name(source["path"], source.get("subset"), named)] = source
    settings.write(name, key, named)


def _name(path: str, subset: Any, taken: dict[str, Source]) -> str:
    """A name for a source, made of its path."""
    last = path.rstrip("/").rsplit("/", 1)[-1].partition(".")[0]
    name = re.sub(r"\W+", "_", last).strip("_") or "examples"
    name = f"s_{name}" if not name[0].isalpha() else name
    if name in taken and subset:
        name = re.sub(r"\W+", "_", f"{name}_{subset}")
    number = 2
    while name in taken or name in (
        "path",
        "subset",
        "split",
        "revision",
        "weight",
        "limit",
        "columns",
        "prompt",
        "completion",
    ):
        name, number = f"{name.rstrip('0123456789')}{number}", number + 1
    return name


def no_sources(settings: Settings, name: str) -> None:
    """Write where the examples have to be named: the file does not say."""
    settings.write(name, "data.train", "TRAIN.jsonl", "the file names no examples: give yours")


def held_out(settings: Settings, name: str) -> None:
    """Validation examples: a fraction or a count, or none."""
    value = settings.get(name) or 0
    if settings.recipe.get("data.eval") is None:
        settings.put(name, int(value) if float(value) >= 1 or not value else float(value))
