"""What a finished run is evaluated on, read as its own examples were; and the model that it was compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.artifacts import is_run, read_record
from trimtab.artifacts.run_folder import DATA, RECIPE, START
from trimtab.core import files
from trimtab.core.config import override
from trimtab.core.errors import ArtifactError, DataError, RecipeError, listing
from trimtab.data import READING as READING_KEYS
from trimtab.data import DataConfig, Example, Kind, held_out_examples, load_examples
from trimtab.evaluate import EvalConfig
from trimtab.evaluate.preferences import Reference
from trimtab.objectives import Objective, ReferenceObjective
from trimtab.run.recipe import Recipe

READING = tuple(f"data.{key}" for key in READING_KEYS)
"""Keys of a recipe that say how a file is read."""
ANSWERING = tuple(f"eval.{key}" for key in EvalConfig.model_fields if key != "samples")
"""Keys of a recipe that say how examples are answered and measured; `samples` says how many are while a run trains."""


def split_words(
    words: Sequence[str], reading: Sequence[str] = READING, answering: Sequence[str] = ANSWERING, command: str = "eval"
) -> tuple[list[str], list[str]]:
    """Overrides of a recipe's keys: those that say how a file is read, and how examples are answered. Raises RecipeError for others."""
    split: tuple[list[str], list[str]] = [], []
    for word in words:
        for keys, found in zip((reading, answering), split, strict=True):
            if word.startswith(tuple(f"{key}{mark}" for key in keys for mark in "=.")):
                found.append(word)
                break
        else:
            of_eval = ", ".join(key.removeprefix("eval.") for key in answering)
            raise RecipeError(f"{word}: of a recipe's keys, {command} takes only {', '.join(reading)}, and of eval: {of_eval}.")
    return split


def answering_of(target: Path, words: Sequence[str], on_notice: Callable[[str], None]) -> EvalConfig:
    """How a model's answers are generated and measured: as a run's recipe says, unless words say otherwise.

    A run's folder may be somebody else's, so a function that its recipe names is not executed: only one that the user names now is.
    """
    if not is_run(target):
        return EvalConfig.parse({}, [word.removeprefix("eval.") for word in words], "eval:")
    config = Recipe.read(target / RECIPE, [*words, "eval.samples=0"]).eval
    if config.function is None or any(word.startswith("eval.function=") for word in words):
        return config
    on_notice(
        f"{target / RECIPE} names the function {config.function}, which is not executed, because it comes with the run. To measure by it, "
        f"give it: {override('eval.function', config.function)}"
    )
    return config.model_copy(update={"function": None})


def held_out_examples_of(run: Path) -> tuple[list[Example], str]:
    """The examples that a run held out, and a name for them.

    Raises:
        RecipeError: It is no run folder.
        ArtifactError: It does not say which they were.
        DataError: There were none, or they are no longer what they were.
    """
    if not is_run(run):
        raise RecipeError(f"{run} is not a run folder, so it has no held-out examples of its own: name a file with --data.")
    recipe, record = Recipe.read(run / RECIPE), files.read_json(run / DATA)
    if not isinstance(record, dict) or not {"files", "held_out"} <= record.keys():
        raise ArtifactError(
            f"{run / DATA}: does not say which examples were held out. Restore it from a copy, or name a file with --data."
        )
    examples = held_out_examples(recipe.data, record, recipe.objective.data_kind)
    if not examples:
        raise DataError(f"{run} held out no examples: name a file with --data.")
    return examples, f"held-out examples of {run}"


def block_of_text(target: Path) -> int | None:
    """The most tokens of the blocks into which a run split plain texts; None for a run that did not, and for anything else."""
    data = Recipe.read(target / RECIPE).data if is_run(target) else None
    return data.max_length if data is not None and (data.corpus or data.overlong == "split") else None


def kind_of_data(target: Path) -> Kind:
    """What a run was trained on; answers, for anything that is no run."""
    return Recipe.read(target / RECIPE).objective.data_kind if is_run(target) else "answers"


def system_of(target: Path) -> str | None:
    """The system message that a run gave to examples without one; None for anything that is no run."""
    return Recipe.read(target / RECIPE).data.system if is_run(target) else None


def examples_of_file(target: Path, source: str, words: Sequence[str] = ()) -> tuple[list[Example], Kind]:
    """The examples of a file to evaluate a model on, and what they are.

    They are read as a run's own were: with the keys of its `data` that say how, or, if no example fits those, by the columns' own
    names; as what its objective was trained on, or as answers, which any model can be asked for.

    Args:
        words: Those keys of a recipe, given anew.

    Raises:
        DataError: Some of the examples can't be read.
    """
    if is_run(target):
        data = Recipe.read(target / RECIPE, words).data
    else:
        data = DataConfig.parse({"train": source}, [word.removeprefix("data.") for word in words], "data:")
    kinds: list[Kind] = list(dict.fromkeys((kind_of_data(target), "answers")))
    own_names = {key: value for key, value in data.reading.items() if key in ("system", "drop_system")}
    readings = [data.reading, *([own_names] if not words else [])]
    first = None
    for reading in readings:
        for kind in kinds:
            examples, report = load_examples(source, kind=kind, **reading)
            first = first or report
            if examples and not report.rejected:
                return examples, kind
    assert first is not None
    problems = [f"{place}: {reason}" for place, reason in first.rejected]
    raise DataError(
        f"data: examples that can't be evaluated:\n{listing(problems)}" if problems else f"data: {source} holds no examples."
    )


def objective_of(run: Path) -> tuple[Objective, Reference | None, int]:
    """A run's objective, the model that it was compared with, and the seed by which it mismatched answers."""
    recipe, record = Recipe.read(run / RECIPE), read_record(run)
    objective, known = Objective.pick(record["objective"]), record["reference"]
    if known is None:
        return objective, None, recipe.data_seed
    source = _reference(run, recipe, record)
    # The adapter that was saved as the start lacks what made its values, so its identity is another.
    return objective, Reference(source, None if source == str(run / START) else known["identity"]), recipe.data_seed


def _reference(run: Path, recipe: Recipe, record: dict[str, Any]) -> str:
    """What a run was compared with: `base`, an adapter or run folder, or a model."""
    kind = record["reference"]["kind"]
    if kind == "start":
        return str(record["start"]["folder"] if record["start"] is not None else run / START)
    whole = recipe.objective.reference if isinstance(recipe.objective, ReferenceObjective) else "auto"
    return kind if kind == "base" or whole in ("auto", "start") else whole
