"""Resuming a run that did not end: whether it is this recipe's, where it was, and whether everything is as it was."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.artifacts import State
from trimtab.artifacts.run_folder import CHECKPOINTS, DATA, METRICS, RECIPE, STATES
from trimtab.core import files
from trimtab.core.errors import RecipeError, TrimtabError, listing
from trimtab.core.processes import processes
from trimtab.engine import MemoryPlan
from trimtab.run.recipe import Recipe

IDENTIFIED: dict[str, tuple[str, ...]] = {
    "base": ("model.name", "model.dtype", "model.device", "model.quantize"),
    "data_digest": ("data",),
    "start": ("start",),
    "reference": ("objective.reference",),
}
"""Facts of a run, as run.json holds them, that identify something by its content; and the keys of the recipe that name it, which
matter only where the content differs: the same files may lie elsewhere by now."""
FIXED = (*IDENTIFIED, "method", "trainable_parameters", "steps", "peak_lr")
"""Facts that must not change when a run is resumed."""
ROUNDING = ("versions", "threads", "device", "processes", "engine")
"""Facts that change results by rounding."""
FREE = ("resume", "output", "certify", "devices", "distributed", "train.keep", "train.save_every", "eval", "track")
"""Keys of the recipe that may change when a run is resumed."""
NOT_IN_CONTENT = ("data.seed",)
"""Keys that content does not show: of the examples in another order, the digest is the same."""


class Difference(NamedTuple):
    """A key of a recipe or of a run's facts that is another now."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before} in the run, {self.now} now"

    def within(self, keys: Iterable[str]) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)

    @property
    def identified(self) -> bool:
        """Whether what the key names is identified by its content."""
        return any(self.within(keys) for keys in IDENTIFIED.values()) and not self.within(NOT_IN_CONTENT)


@dataclass
class UnfinishedRun:
    """A run that did not end."""

    folder: Path
    facts: dict[str, Any]
    """What run.json holds."""
    state: State | None
    """The newest state, or the one that is gone back to; None if none was saved, or all are damaged."""

    @property
    def step(self) -> int:
        return self.state.step if self.state is not None else 0

    @property
    def moment(self) -> datetime:
        """When the run started: what its template writes as today's date."""
        return datetime.fromisoformat(self.facts["moment"])

    def shared(self) -> "UnfinishedRun":
        """The run as all processes have it, on machines that have no folder of it, too: the first one's tells the others."""
        state = self.state
        told: dict[str, Any] | None = processes.told_by_first(
            lambda: {"step": state.step, "facts": state.facts} if state else None
        )
        tensors = processes.tensors_of_first(state.tensors if state is not None else {})
        return UnfinishedRun(self.folder, self.facts, State(told["step"], tensors, told["facts"]) if told else None)

    def memory(self) -> MemoryPlan | None:
        """The run's plan, so that rows go into the same packs whatever is free now; None if another version made it."""
        return MemoryPlan.from_plain(self.facts["plan"])

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse another recipe before anything is loaded. Raises RecipeError with the keys that differ."""
        decided_later = ["method"] if recipe.start is not None and "method" not in recipe.model_fields_set else []
        self._refuse(
            difference
            for difference in self._recipe_differences(recipe)
            if not difference.within(decided_later)
            and not (difference.key.startswith("objective.") and difference.now == "auto")
        )

    def check(self, recipe: Recipe, facts: dict[str, Any], digests: dict[str, str], on_notice: Callable[[str], None]) -> None:
        """Refuse to resume another run. Raises RecipeError with what differs.

        Args:
            digests: Of the data's files, by their names.
        """
        renamed = [difference for difference in self._all_recipe_differences(recipe) if difference.identified]
        problems = [*map(str, self._recipe_differences(recipe))]
        for fact in IDENTIFIED:
            if self._changed(facts, (fact,)):
                problems += self._content_problems(fact, facts, digests)
                problems += [str(difference) for difference in renamed if difference.within(IDENTIFIED[fact])]
        self._refuse(problems or self._changed(facts, FIXED))
        if renamed:
            names = listing([str(difference) for difference in renamed])
            on_notice(f"the content is the same, so the run is resumed with what is named now:\n{names}")
        if changed := self._changed(facts, ROUNDING):
            on_notice(
                f"results from here on may differ by rounding from the run's first part:\n{listing([*map(str, changed)])}"
            )

    def _all_recipe_differences(self, recipe: Recipe) -> list[Difference]:
        return list(_differences(Recipe.read(self.folder / RECIPE).plain(), recipe.absolute().plain()))

    def _recipe_differences(self, recipe: Recipe) -> list[Difference]:
        """Those that must not be, and are not known by content."""
        return [d for d in self._all_recipe_differences(recipe) if not d.within(FREE) and not d.identified]

    def _content_problems(self, fact: str, facts: dict[str, Any], digests: dict[str, str]) -> Iterator[str]:
        if fact == "base":
            parts = [difference.key.rpartition(".")[2] for difference in self._changed(facts, (fact,))]
            yield f"model: it is another base model, with different {', '.join(parts)}"
            yield from map(str, self._changed(facts, ("device",)))
        elif fact == "data_digest":
            before = files.read_json(self.folder / DATA)["files"]
            changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
            reason = f": {', '.join(changed)} has changed" if changed else ""
            yield f"data: the training or held-out examples are not the same{reason}"
        elif fact == "start":
            yield "start: the adapter there is not what it was"
        else:
            yield "objective.reference: the reference model is not what it was"

    def _refuse(self, problems: Iterable[object]) -> None:
        if texts := [*map(str, problems)]:
            step = f"after step {self.step} of {self.facts['steps']}" if self.step else "before its first checkpoint"
            raise taken(
                RecipeError,
                self.folder,
                f"output: {self.folder} holds an unfinished run ({step}) of another recipe:\n{listing(texts, 10)}\n"
                "Set these back to resume it",
            )

    def _changed(self, facts: dict[str, Any], keys: tuple[str, ...]) -> list[Difference]:
        before, now = ({key: _content(some).get(key) for key in keys if key in self.facts} for some in (self.facts, facts))
        return list(_differences(before, now))

    def clear(self) -> None:
        """Remove what was written after the state, or in part."""
        for path in self.folder.rglob(f"{files.TEMPORARY}*"):
            files.remove_folder(path) if path.is_dir() else files.remove_file(path)
        for folder in (*(self.folder / STATES).glob("step-*"), *(self.folder / CHECKPOINTS).glob("step-*")):
            if int(folder.name.removeprefix("step-")) > self.step:
                files.remove_folder(folder)
        metrics = self.folder / METRICS
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            files.write_text(metrics, "".join(line for line in lines if self._had_logged(line)))

    def _had_logged(self, line: str) -> bool:
        """Whether the run had this line of its metrics when the state was saved."""
        if self.state is None:
            return False
        try:
            values = json.loads(line) if line.endswith("\n") else {}
            step, evaluation = values["step"], values["kind"] != "train"
        except (ValueError, KeyError, TypeError):
            return False
        if evaluation and step == 0:
            return bool(self.state.facts["evaluated_before_training"])
        if evaluation and step == self.step:
            return self.state.facts["last"]["eval_loss"] is not None
        return bool(step <= self.step)


def taken(kind: type[TrimtabError], folder: Path, message: str) -> TrimtabError:
    """An error that says what a folder holds, and names one that is free."""
    numbered = re.fullmatch(r"(.+)-(\d+)", folder.name, re.DOTALL)
    stem, number = (numbered[1], int(numbered[2])) if numbered else (folder.name, 1)
    names = (folder.with_name(f"{stem}-{n}") for n in itertools.count(number + 1))
    free = next(path for path in names if not os.path.lexists(path))
    error = kind(f"{message}, or train into another folder, such as output={free}.")
    error.free_folder = free
    return error


def _content(facts: dict[str, Any]) -> dict[str, Any]:
    """A run's facts, with the content alone of what is identified by it: not its name, nor how much of it was cached."""
    start, reference = facts.get("start"), facts.get("reference")
    return {
        **facts,
        "base": facts["base"]["fingerprint"],
        "start": start and {key: value for key, value in start.items() if key != "folder"},
        "reference": reference and reference["identity"],
    }


def threads() -> int:
    """The number of threads, on which the order of large sums depends."""
    return torch.get_num_threads()


def _differences(before: Any, now: Any, path: str = "") -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif json.loads(json.dumps(before)) != json.loads(json.dumps(now)):
        yield Difference(path, before, now)
