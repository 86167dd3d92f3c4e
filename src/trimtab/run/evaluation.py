"""What a finished run is evaluated on, read as its own examples were; and the model that it was compared with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.artifacts import is_run, read_record
from trimtab.artifacts.run_folder import DATA, RECIPE, START
from trimtab.core import files
from trimtab.core.config import made, read
from trimtab.core.errors import ArtifactError, DataError, RecipeError, listing
from trimtab.data import DataConfig, Example, Kind, held_out_examples, load_examples
from trimtab.evaluate.preferences import Reference
from trimtab.objectives import Comparing, Objective
from trimtab.run.recipe import Recipe

READING = ("data.columns", "data.ignore")
"""Keys of a recipe that say how rows are read."""


def held_out(folder: Path) -> tuple[list[Example], str]:
    """The rows that a run held out, and a name for them."""
    if not is_run(folder):
        raise RecipeError(f"{folder} is not a run folder, so it has no held-out rows of its own: give rows with --data.")
    recipe, remembered = read(Recipe, folder / RECIPE), files.read_json(folder / DATA)
    if not isinstance(remembered, dict) or not {"files", "held_out"} <= remembered.keys():
        raise ArtifactError(
            f"{folder / 'data.json'}: does not say which rows were held out. Restore it from a copy, or give rows with --data."
        )
    examples = held_out_examples(recipe.data, remembered, recipe.objective.data_kind)
    if not examples:
        raise DataError(f"{folder} held out no rows: give rows with --data.")
    return examples, f"held-out rows of {folder}"


def learned_from(target: Path) -> Kind:
    """What a run's objective learned from; answers, for anything that is no run."""
    return read(Recipe, target / RECIPE).objective.data_kind if is_run(target) else "answers"


def rows_to_measure(target: Path, source: str, words: Sequence[str] = ()) -> tuple[list[Example], Kind]:
    """The rows of a file to measure a model on, and what they are.

    They are read as a run's own were: with its `data.columns` and `data.ignore`, or, if that fits none of them, by the names that
    columns have; as what its objective learned from, or as answers, which any model can be asked for.

    Args:
        words: Those two keys of a recipe, given anew.

    Raises:
        RecipeError: Other keys.
        DataError: Some of the rows can't be read.
    """
    for word in words:
        if not word.startswith(tuple(f"{key}{mark}" for key in READING for mark in "=.")):
            raise RecipeError(f"{word}: of a recipe's keys, eval takes {' and '.join(READING)} alone.")
    if is_run(target):
        data = read(Recipe, target / RECIPE, words).data
    else:
        data = made(DataConfig, {"train": source}, [word.removeprefix("data.") for word in words], "data:")
    kinds: list[Kind] = list(dict.fromkeys((learned_from(target), "answers")))
    ways = [(data.columns, data.ignore), *([({}, ())] if not words else [])]
    first = None
    for columns, ignore in ways:
        for kind in kinds:
            examples, account = load_examples(source, columns, kind, ignore)
            first = first or account
            if examples and not account.rejected:
                return examples, kind
    assert first is not None
    problems = [f"{where}: {why}" for where, why in first.rejected]
    raise DataError(
        f"data: rows that can't be measured:\n{listing(problems)}" if problems else f"data: {source} holds no rows."
    )


def objective_of(run: Path) -> tuple[Objective, Reference | None, int]:
    """A run's objective, the model that it was compared with, and the seed by which it mismatched answers."""
    recipe, record = read(Recipe, run / RECIPE), read_record(run)
    objective, known = Objective.pick(record["objective"]), record["reference"]
    if known is None:
        return objective, None, recipe.train.seed
    source = _reference(run, recipe, record)
    # The adapter that was saved as the start lacks what made its values, so its identity is another.
    return objective, Reference(source, None if source == str(run / START) else known["identity"]), recipe.train.seed


def _reference(run: Path, recipe: Recipe, record: dict[str, Any]) -> str:
    """What a run was compared with: `base`, an adapter or run folder, or a model."""
    kind = record["reference"]["kind"]
    if kind == "start":
        return str(record["start"]["folder"] if record["start"] is not None else run / START)
    whole = recipe.objective.reference if isinstance(recipe.objective, Comparing) else "auto"
    return kind if kind == "base" or whole in ("auto", "start") else whole
