"""What is looked at before the first step: the data's proof, and whether adapter, disk and memory are enough."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

from trimtab.base import Base
from trimtab.core.errors import RecipeError, StorageError
from trimtab.data import EXAMPLES_CHECKED, Finding, LoadedData, check_data, first_examples
from trimtab.methods import Attached
from trimtab.run.checkpoints import KEPT
from trimtab.run.recipe import Recipe
from trimtab.train import planned_memory


@dataclass
class OpenedRecipe:
    """What a recipe names, opened."""

    recipe: Recipe
    """With the method of what it starts from."""
    origin: dict[str, Any] | None
    """What that is, as JSON data."""
    base: Base
    adapter: Attached
    data: LoadedData
    limit: int | None
    """The most tokens that a row may have."""


def preflight(given: OpenedRecipe) -> list[Finding]:
    """Everything that is looked at. Nothing is refused here: see `data.refuse_problems`, and `check_disk`."""
    recipe, data = given.recipe, given.data
    examples = first_examples(recipe.absolute().data, EXAMPLES_CHECKED, recipe.objective.data_kind)
    return [*check_data(data, examples, given.base), _capacity(given.adapter, data), _disk(recipe, given.adapter)]


def memory_needed(given: OpenedRecipe) -> Finding:
    """What training will hold at a time; it is planned again when it starts, by what is free then."""
    try:
        planned = planned_memory(given.base, given.recipe.train, given.data.train, given.data.eval)
    except RecipeError as error:
        return Finding("memory", "problem", str(error))
    return Finding("memory", "good", planned.words, {"pack_tokens": planned.pack_tokens, "most": planned.most})


def check_disk(findings: list[Finding]) -> None:
    """Raise StorageError if the disk has no room for the run."""
    for one in findings:
        if one.name == "disk" and one.status == "problem":
            raise StorageError(f"output: {one.message}")


def _capacity(adapter: Attached, data: LoadedData) -> Finding:
    """Whether there is more to learn from than what learns."""
    trained = sum(p.numel() for p in adapter.parameters().values())
    tokens = sum(len(row.target_indices) for row in data.train if row.side != "mismatched")
    words = f"{trained:,} parameters are trained on {tokens:,} tokens of answers"
    facts = {"parameters": trained, "tokens": tokens}
    if trained > 1000 * tokens:
        return Finding(
            "capacity", "note", f"{words}: the rows can be learned by heart. Watch the loss on held-out rows.", facts
        )
    return Finding("capacity", "good", words, facts)


def _disk(recipe: Recipe, adapter: Attached) -> Finding:
    """The run's folder at its fullest: adapters of two states, the best, and the final one; and the states, of three numbers each."""
    size = sum(p.nbytes for p in adapter.parameters().values())
    needed = (KEPT + 3) * size + (KEPT + 1) * 3 * size + 1_000_000
    place = next(p for p in (recipe.output.absolute(), *recipe.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    words, facts = (
        f"the run needs {needed / 1e6:,.0f} MB at most, and {free / 1e6:,.0f} MB are free in {place}",
        {"needed": needed, "free": free},
    )
    if not os.access(place, os.W_OK):
        return Finding("disk", "problem", f"{place} can't be written to: choose a folder that can", facts)
    if needed > free:
        return Finding("disk", "problem", f"{words}: free some, or choose another folder", facts)
    return Finding("disk", "good", words, facts)


def shown(base: Base, data: LoadedData, count: int) -> list[dict[str, Any]]:
    """Rows as they are learned: the first ones, and the shortest and longest of all; each in parts that are learned or not."""
    rows = [row for row in data.train if row.side != "mismatched"]
    by_length = sorted(rows, key=lambda row: len(row.ids))
    chosen = {id(row): row for row in (*rows[:count], *by_length[:1], *by_length[-1:])} if count else {}
    return [
        {"where": row.where, "side": row.side, "parts": _parts(base, row.ids, row.target_indices)} for row in chosen.values()
    ]


def _parts(base: Base, ids: list[int], learned: list[int]) -> list[dict[str, Any]]:
    marks = set(learned)
    parts: list[dict[str, Any]] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or (at in marks) != (start in marks):
            text = base.tokenizer.decode(ids[start:at], clean_up_tokenization_spaces=False)
            parts.append({"text": text, "learned": start in marks, "tokens": at - start})
            start = at
    return parts
