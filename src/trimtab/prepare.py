"""What comes before training, and after it, where answers are compared or an earlier adapter is trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab import files
from trimtab.artifacts import read_adapter
from trimtab.base import Base
from trimtab.config import made, read
from trimtab.data import Account, DataConfig, Example, Kind, load_examples, make_sequences, units
from trimtab.data.example import Sequence as Row
from trimtab.data.mismatched import with_mismatched
from trimtab.deploy import adapter_folder, read_method
from trimtab.errors import ArtifactError, DataError, RecipeError, listing
from trimtab.evaluate import score_loss
from trimtab.methods import Attached, room
from trimtab.objectives import Comparing, Objective
from trimtab.recipe import Recipe
from trimtab.reference import check_start, divergence, refer
from trimtab.saving import START

Rows = list[Row]

PACK_TOKENS = 4096
"""Computed at a time where nothing is kept for a backward pass, so that long prompts are shared, too."""


def continued(recipe: Recipe) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the method of the adapter that it starts from, and what that adapter is; or as it is, and None.

    Raises:
        RecipeError: There is no such adapter, or the recipe asks for another method.
        ArtifactError: It is damaged.
    """
    if recipe.start is None:
        return recipe, None
    folder = adapter_folder(recipe.start)
    if folder is None:
        raise RecipeError(
            f"start: {recipe.start} is no run or adapter folder (looked in {files.expanded(recipe.start).absolute()})."
        )
    stored = read_adapter(folder)
    method, _ = read_method(stored)
    if "method" in recipe.model_fields_set and recipe.method != method:
        raise RecipeError(
            f"method: {recipe.start} holds another ({method.plain()}), and start trains that on. Leave method out, or start."
        )
    origin = {
        "folder": str(folder.absolute()),
        "weights": files.sha256_file(folder / stored.weights),
        "trained": stored.trained,
    }
    return recipe.model_copy(update={"method": method}), origin


def prepared(
    objective: Objective, base: Base, adapter: Attached, rows: tuple[Rows, Rows], seed: int, max_length: int | None
) -> tuple[Objective, tuple[Rows, Rows], dict[str, Any] | None]:
    """The objective with what the rows decide; the rows with what it needs of them; and what its reference is, as JSON data.

    Args:
        adapter: As it is when training starts.
        rows: To learn, and held out.
        max_length: The most tokens that a mismatched answer and its prompt may have.

    Raises:
        DataError: It can't learn from these rows.
        RecipeError: There is no such reference, or the adapter has dropout.
        WrongReference: What training starts from is not the reference, where it should be.
    """
    objective = objective.settled(rows[0])
    if isinstance(objective, Comparing) and getattr(adapter.method, "dropout", False):
        raise RecipeError(
            f"method.dropout: {objective.name} compares with a reference, and dropout would make noise of the difference. Set it to 0."
        )
    train, held_out = ((with_mismatched(some, seed, max_length) if some and objective.pools else some) for some in rows)
    if not isinstance(objective, Comparing):
        return objective, (train, held_out), None
    referred = refer(base, adapter, objective.reference, [*train, *held_out], PACK_TOKENS)
    train, held_out = referred.rows[: len(train)], referred.rows[len(train) :]
    facts = referred.facts
    if facts["kind"] == "start" or (facts["kind"] == "base" and not adapter.trained and adapter.method.starts_as_base):
        first = [train[n] for unit in units(train)[:4] for n in unit]
        facts["start_differs"] = check_start(base, first, PACK_TOKENS)
    return objective, (train, held_out), facts


def learned_from(target: Path) -> Kind:
    """What a run's objective learned from; answers, for anything that is no run."""
    return read(Recipe, target / "recipe.yaml").objective.learns_from if (target / "run.json").is_file() else "answers"


READING = ("data.columns", "data.ignore")
"""Keys of a recipe that say how rows are read."""


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
    if (target / "run.json").is_file():
        data = read(Recipe, target / "recipe.yaml", words).data
    else:
        data = made(DataConfig, {"train": source}, [word.removeprefix("data.") for word in words], "data:")
    kinds: list[Kind] = list(dict.fromkeys((learned_from(target), "answers")))
    ways = [(data.columns, data.ignore), *([({}, ())] if not words else [])]
    first = None
    for columns, ignore in ways:
        for kind in kinds:
            examples, account = load_examples(source, columns, kind, ignore)
            first = first or account
            if examples and not account.refused:
                return examples, kind
    assert first is not None
    problems = [f"{where}: {why}" for where, why in first.refused]
    raise DataError(
        f"data: rows that can't be measured:\n{listing(problems)}" if problems else f"data: {source} holds no rows."
    )


def score_preferences(
    folder: Path, base: Base, adapter: Attached, examples: Sequence[Example], *, with_base: bool = False
) -> dict[str, dict[str, Any]]:
    """What a run's objective makes of pairs or judged answers: its loss and measures for the adapter, and for the base too.

    With them the exact divergence from the reference (from the base, for an objective that has none), in nats a token.

    Raises:
        DataError: Some of the rows can't be measured.
        ArtifactError: The reference that the run was compared with is not what it was.
    """
    recipe, state = read(Recipe, folder / "recipe.yaml"), files.read_json(folder / "run.json")
    objective = Objective.pick(state["objective"])
    most, account = room(base.model, base.context_length), Account(("evaluation",))
    rows = make_sequences(examples, base, account, max_length=most, limit=f"the context length {most}")
    if account.refused or not rows:
        raise DataError(f"data: rows that can't be measured:\n{listing([f'{where}: {why}' for where, why in account.refused])}")
    answers = rows
    rows = with_mismatched(rows, recipe.train.seed, most) if objective.pools else rows
    kind = _reference(folder, recipe, state)
    if (reference := state["reference"]) is not None:
        referred = refer(base, adapter, kind, rows, PACK_TOKENS)
        same = referred.facts["identity"] == reference["identity"]
        if not same and kind != str(folder / START):  # which was saved without what made its values
            raise ArtifactError(
                f"{kind}: is not what it was when {folder} was compared with it, so its rewards would be others."
            )
        rows = referred.rows
    scores, moved = {}, {}
    if with_base:
        with adapter.disabled():
            scores["base"] = score_loss(base, rows, PACK_TOKENS, objective)
            moved["base"] = divergence(base, adapter, kind, answers, PACK_TOKENS)
    scores["adapter"] = score_loss(base, rows, PACK_TOKENS, objective)
    moved["adapter"] = divergence(base, adapter, kind, answers, PACK_TOKENS)
    return {
        name: {
            "objective": objective.name,
            "rows": one.rows,
            "loss": one.loss,
            "loss_interval": list(one.interval),
            **one.measures,
            "divergence": moved[name],
        }
        for name, one in scores.items()
    }


def _reference(folder: Path, recipe: Recipe, state: dict[str, Any]) -> str:
    """What a run was compared with: `base`, an adapter or run folder, or a model."""
    kind = state["reference"]["kind"] if state["reference"] is not None else "base"
    if kind == "start":
        return str(state["start"]["folder"] if state["start"] is not None else folder / START)
    whole = recipe.objective.reference if isinstance(recipe.objective, Comparing) else "auto"
    return kind if kind == "base" or whole in ("auto", "start") else whole
