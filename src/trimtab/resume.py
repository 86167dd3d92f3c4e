"""Going on with a run that did not end: whether it is this recipe's, where it stood, and whether everything is as it was."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab import files
from trimtab.artifacts import State, newest_state
from trimtab.config import read
from trimtab.engine import Memory
from trimtab.errors import RecipeError, StorageError, listing
from trimtab.recipe import Recipe
from trimtab.saving import BEGINNING, CHECKPOINTS, LOCK, METRICS, STATES

SAME = ("base", "method", "trainable_parameters", "steps", "peak_lr", "start", "reference", "data_digest")
"""Facts of a run, as run.json holds them, that must not change on the way."""
SAME_TO_THE_BIT = ("versions", "threads")
"""Facts that change results by rounding."""


@dataclass
class Unfinished:
    """A run that did not end."""

    folder: Path
    facts: dict[str, Any]
    """What run.json holds."""
    state: State | None
    """Where it stood when it was last saved; None if that was never, or is damaged."""

    @property
    def step(self) -> int:
        return self.state.step if self.state is not None else 0

    def memory(self) -> Memory:
        """Rows go into the same packs again, whatever is free now."""
        plan = dict(self.facts["plan"])
        return Memory(**{**plan, "most_kept": float("inf") if plan["most_kept"] is None else plan["most_kept"]})

    def check(self, recipe: Recipe, facts: dict[str, Any], notice: Callable[[str], None]) -> None:
        """Refuse to go on with another run. Raises RecipeError with what differs."""
        before, now = read(Recipe, self.folder / "recipe.yaml").plain(), recipe.absolute().plain()
        different = [f"{key}: {a} there, {b} now" for key, a, b in _differences(before, now) if key not in ("resume", "output")]
        different += [f"{key} of the run: {a} there, {b} now" for key, a, b in self._changed(facts, SAME)]
        if different:
            raise RecipeError(
                f"output: {self.folder} holds an unfinished run of another kind:\n{listing(different)}\n"
                "Set these back to go on with it, give another output, or remove the folder to start afresh."
            )
        if changed := [f"{key}: {a} then, {b} now" for key, a, b in self._changed(facts, SAME_TO_THE_BIT)]:
            notice(f"what is computed from here on may differ by rounding from the run's first part:\n{listing(changed)}")

    def _changed(self, facts: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
        before, now = ({key: _lasting(some).get(key) for key in keys} for some in (self.facts, facts))
        yield from _differences(before, now)

    def clear(self) -> None:
        """Take away what was written after the state, or half."""
        for path in self.folder.rglob(f"{files.TEMPORARY}*"):
            files.remove_folder(path) if path.is_dir() else files.remove_file(path)
        for folder in (*(self.folder / STATES).glob("step-*"), *(self.folder / CHECKPOINTS).glob("step-*")):
            if int(folder.name.removeprefix("step-")) > self.step:
                files.remove_folder(folder)
        log = self.folder / METRICS
        if log.exists():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if self._is_before(line)]
            files.write_text(log, "".join(lines))

    def _is_before(self, line: str) -> bool:
        """Whether the run, as it was when it was saved, had this line in its log."""
        if self.state is None:
            return False
        try:
            said = json.loads(line) if line.endswith("\n") else {}
            step, measured = said["step"], said["kind"] == "eval"
        except (ValueError, KeyError, TypeError):
            return False
        if measured and step == 0:
            return bool(self.state.facts["compared"])
        if measured and step == self.step:
            return self.state.facts["last"]["eval_loss"] is not None
        return bool(step <= self.step)


@contextmanager
def claimed(recipe: Recipe, notice: Callable[[str], None]) -> Iterator[Unfinished | None]:
    """The recipe's output, in which nobody else trains within the block: the unfinished run that it holds, or None.

    What was made for a run that has not begun when the block ends is taken away again.

    Args:
        notice: Is told of damage.

    Raises:
        StorageError: There is something else, or a run that is to be left alone, or another process is training there.
        ArtifactError: The run's own record is damaged.
    """
    folder = recipe.output
    _is_unfinished(recipe)  # before anything is made
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with files.locked(folder / LOCK) as held:
        try:
            if not held:
                notice(f"{folder} is on a file system without locks: make sure that no other process trains into it")
            yield _unfinished(folder, notice) if _is_unfinished(recipe) else None  # it may have ended meanwhile
        finally:
            if not (folder / "run.json").exists():
                _take_away(folder, missing)


def _take_away(folder: Path, made: list[Path]) -> None:
    with suppress(OSError, StorageError):
        for path in list(folder.iterdir()) if _about_to_begin(folder) else [folder / LOCK]:  # else somebody put something there
            files.remove_file(path)
        for path in made:
            path.rmdir()


def _about_to_begin(folder: Path) -> bool:
    """Whether this is a folder with nothing in it but what is written before a run begins."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return LOCK in names and all(name in BEGINNING or name.startswith(files.TEMPORARY) for name in names)


def _is_unfinished(recipe: Recipe) -> bool:
    """Whether the output holds an unfinished run, rather than nothing or a run that had not begun."""
    folder = recipe.output
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())) or _about_to_begin(folder):
        return False
    facts = files.read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    ended = isinstance(facts, dict) and facts.get("status") == "done" and not (folder / STATES).exists()
    if not isinstance(facts, dict) or ended or "plan" not in facts or recipe.resume == "never":
        files.refuse_existing(folder)
    return True


def _unfinished(folder: Path, notice: Callable[[str], None]) -> Unfinished:
    facts = files.read_json(folder / "run.json")
    state = newest_state(
        folder / STATES, lambda problem: notice(f"a saved state is damaged, and an earlier one is taken: {problem}")
    )
    return Unfinished(folder, facts, state)


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """Of a run's facts, those that a cache does not change: which reference it is, not how much of it was known."""
    reference = facts.get("reference")
    return facts if reference is None else {**facts, "reference": {key: reference[key] for key in ("kind", "identity")}}


def plan_facts(memory: Memory) -> dict[str, Any]:
    """How rows are cut into packs, as JSON data."""
    plan = memory._asdict()
    return {**plan, "most_kept": None if plan["most_kept"] == float("inf") else plan["most_kept"]}


def threads() -> int:
    """Large products are summed in an order that depends on it."""
    return torch.get_num_threads()


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif json.loads(json.dumps(before)) != json.loads(json.dumps(now)):
        yield path, before, now
