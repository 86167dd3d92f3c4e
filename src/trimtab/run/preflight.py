"""What is checked before the first step: the data, the adapter's size, memory and disk; and a preview of the tokenized examples."""

import os
import shutil
from dataclasses import dataclass
from typing import Any

from trimtab.base import Base
from trimtab.core.errors import RecipeError, StorageError
from trimtab.data import EXAMPLES_CHECKED, Finding, LoadedData, check_corpus, check_data, first_examples
from trimtab.data.example import TokenRow
from trimtab.distributed import Engine
from trimtab.engine import describe_layers
from trimtab.methods import Attached
from trimtab.run.recipe import Recipe
from trimtab.train import memory_of, optimizer_bytes, steps_of


@dataclass
class OpenedRecipe:
    """What a recipe names, loaded."""

    recipe: Recipe
    """With the method of the adapter that it starts from."""
    start: dict[str, Any] | None
    """What that adapter is, as JSON data."""
    engine: Engine
    """By which several processes train together, chosen."""
    base: Base
    adapter: Attached
    data: LoadedData
    max_length: int | None
    """The most tokens that an example may have."""


def preflight(opened: OpenedRecipe) -> list[Finding]:
    """Every check. Nothing is refused here: see `data.refuse_problems` and `check_disk`."""
    recipe, data = opened.recipe, opened.data
    examples = first_examples(recipe.absolute().data, EXAMPLES_CHECKED, data.seed, recipe.objective.data_kind)
    check = check_data if data.corpus is None else check_corpus
    findings = [*check(data, examples, opened.base), _capacity(opened.adapter, data), _layers(opened.base.model)]
    return [*findings, _disk(recipe, opened.base, opened.adapter)]


def _layers(model: Any) -> Finding:
    """How decoder layers are computed: a model is exact either way, and by fused operations it is faster."""
    kinds = describe_layers(model)
    message = "; ".join(f"{count} × {text}" for text, count in kinds.items()) or "the model's own code, attention apart"
    return Finding("layers", "good", message, kinds)


def memory_needed(opened: OpenedRecipe) -> Finding:
    """The memory that training would take now; it is planned again when training starts."""
    try:
        recipe, data = opened.recipe, opened.data
        plan = memory_of(opened.base, recipe.train, data)
        steps_of(data, recipe.train, plan)
    except RecipeError as error:
        return Finding("memory", "problem", str(error))
    return Finding("memory", "good", plan.summary, {"pack_tokens": plan.pack_tokens, "most": plan.peak_bytes})


def check_disk(findings: list[Finding]) -> None:
    """Raise StorageError if the disk has no space for the run."""
    for finding in findings:
        if finding.name == "disk" and finding.status == "problem":
            raise StorageError(f"output: {finding.message}")


def _capacity(adapter: Attached, data: LoadedData) -> Finding:
    """Whether there are enough target tokens for the trained parameters."""
    parameters = sum(p.numel() for p in adapter.parameters().values())
    tokens = data.target_tokens
    message = f"{parameters:,} parameters are trained on {tokens:,} target tokens"
    facts: dict[str, Any] = {"parameters": parameters, "tokens": tokens}
    if frozen := adapter.method.left_frozen(adapter.model):
        message += f" (not adapted, frozen: {frozen})"
        facts["left_frozen"] = frozen
    if parameters > 1000 * tokens:
        message += ": overfitting is likely. Watch the loss on held-out examples."
        return Finding("capacity", "note", message, facts)
    return Finding("capacity", "good", message, facts)


def _disk(recipe: Recipe, base: Base, adapter: Attached) -> Finding:
    """The run's folder at its fullest: adapters of the states that are kept, the best, a new one, and the final one; and the states,
    with the optimizer's."""
    size, keep = sum(p.nbytes for p in adapter.parameters().values()), recipe.train.keep
    needed = (keep + 3) * size + (keep + 1) * (size + optimizer_bytes(base, recipe.train, of_all=True)) + 1_000_000
    folder = next(p for p in (recipe.output.absolute(), *recipe.output.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    message = f"the run needs {needed / 1e6:,.0f} MB at most, and {free / 1e6:,.0f} MB are free in {folder}"
    facts = {"needed": needed, "free": free}
    if not os.access(folder, os.W_OK):
        return Finding("disk", "problem", f"{folder} is not writable: choose another folder", facts)
    if needed > free:
        return Finding("disk", "problem", f"{message}: free some, or choose another folder", facts)
    return Finding("disk", "good", message, facts)


def preview(base: Base, data: LoadedData, count: int) -> list[dict[str, Any]]:
    """Examples as token rows: the first ones, the shortest and the longest; each as runs of text that are target tokens or not."""
    by_length = sorted(data.train, key=lambda row: len(row.ids))
    chosen = {id(row): row for row in (*data.train[:count], *by_length[:1], *by_length[-1:])} if count else {}
    return [{"where": row.where, "side": row.side, "parts": _parts(base, row)} for row in chosen.values()]


def _parts(base: Base, row: TokenRow) -> list[dict[str, Any]]:
    weights = dict(zip(row.target_indices, row.weights or [1.0] * len(row.target_indices), strict=True))
    parts: list[dict[str, Any]] = []
    start = 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or weights.get(end) != weights.get(start):
            text = base.tokenizer.decode(row.ids[start:end], clean_up_tokenization_spaces=False)
            parts.append({"text": text, "learned": start in weights, "tokens": end - start, "weight": weights.get(start, 0.0)})
            start = end
    return parts
