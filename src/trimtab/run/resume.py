"""Going on with a run that did not end: whether it is this recipe's, where it stood, and whether everything is as it was."""

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from trimtab.artifacts import State, is_run, newest_state, read_record
from trimtab.artifacts.run_folder import BEFORE_THE_FIRST_STEP, CHECKPOINTS, DATA, LOCK, METRICS, RECIPE, STATES
from trimtab.core import files, locks
from trimtab.core.config import read
from trimtab.core.errors import RecipeError, StorageError, TrimtabError, listing
from trimtab.engine import Memory
from trimtab.run.recipe import Recipe

DECIDED: dict[str, tuple[str, ...]] = {
    "base": ("model.name", "model.dtype", "model.device", "model.quantize"),
    "data_digest": ("data",),
    "start": ("start",),
    "reference": ("objective.reference",),
}
"""Facts of a run, as run.json holds them, that identify something by its content; and the keys of the recipe that name it, which
matter only where the content differs: the same files may lie elsewhere by now."""
SAME = (*DECIDED, "method", "trainable_parameters", "steps", "peak_lr")
"""Facts that must not change on the way."""
SAME_TO_THE_BIT = ("versions", "threads", "device")
"""Facts that change results by rounding."""
FREE = ("resume", "output", "certify")
"""Keys of the recipe that may change on the way."""


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

    @property
    def moment(self) -> datetime:
        """When the run started: what its template writes as today's date."""
        return datetime.fromisoformat(self.facts["moment"])

    def memory(self) -> Memory | None:
        """Rows go into the same packs again, whatever is free now; None if another version made the plan."""
        return Memory.of(self.facts["plan"])

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse another recipe before anything is loaded. Raises RecipeError with the keys that differ."""
        settled = ["method"] if recipe.start is not None and "method" not in recipe.model_fields_set else []
        self._refuse(
            [
                _words(key, before, now)
                for key, before, now in self._other_keys(recipe)
                if not _within(key, settled) and not (key.startswith("objective.") and now == "auto")
            ]
        )

    def check(self, recipe: Recipe, facts: dict[str, Any], digests: dict[str, str], notice: Callable[[str], None]) -> None:
        """Refuse to go on with another run. Raises RecipeError with what differs.

        Args:
            digests: Of the data's files, by their names.
        """
        other = [fact for fact in SAME if list(self._changed(facts, (fact,)))]
        named = list(_differences(self._recipe(), recipe.absolute().plain()))
        moved = [one for one in named if any(_within(one[0], keys) for keys in DECIDED.values())]
        problems = [_words(*one) for one in self._other_keys(recipe)]
        problems += [line for fact in other if fact in DECIDED for line in self._told(fact, facts, digests, moved)]
        self._refuse(problems or [_words(*one) for one in self._changed(facts, SAME)])
        if moved:
            notice(
                f"the content is the same, so the run is resumed with what is named now:\n{listing([_words(*one) for one in moved])}"
            )
        if changed := [_words(*one) for one in self._changed(facts, SAME_TO_THE_BIT)]:
            notice(f"what is computed from here on may differ by rounding from the run's first part:\n{listing(changed)}")

    def _recipe(self) -> dict[str, Any]:
        return read(Recipe, self.folder / RECIPE).plain()

    def _other_keys(self, recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
        """What differs in the recipe and is not identified by its content."""
        for key, before, now in _differences(self._recipe(), recipe.absolute().plain()):
            if not _within(key, FREE) and not any(_within(key, keys) for keys in DECIDED.values()):
                yield key, before, now

    def _told(
        self, fact: str, facts: dict[str, Any], digests: dict[str, str], moved: list[tuple[str, Any, Any]]
    ) -> Iterator[str]:
        """What to say of something whose content differs."""
        if fact == "base":
            parts = [key.rpartition(".")[2] for key, _, _ in self._changed(facts, (fact,))]
            yield f"model: it is another base, with different {', '.join(parts)}"
            yield from (_words(*one) for one in self._changed(facts, ("device",)))
        elif fact == "data_digest":
            before = files.read_json(self.folder / DATA)["files"]
            changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
            why = f": {', '.join(changed)} has changed" if changed else ""
            yield f"data: the rows that are learned, or those held out, are not the same{why}"
        elif fact == "start":
            yield "start: the adapter there is not what it was"
        else:
            yield "objective.reference: the model that is compared with is not what it was"
        yield from (_words(*one) for one in moved if _within(one[0], DECIDED[fact]))

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            step = f"after step {self.step} of {self.facts['steps']}" if self.step else "before its first save"
            raise taken(
                RecipeError,
                self.folder,
                f"output: {self.folder} holds an unfinished run ({step}) of another recipe:\n{listing(problems, 10)}\n"
                "Set these back to resume it",
            )

    def _changed(self, facts: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
        before, now = ({key: _lasting(some).get(key) for key in keys if key in self.facts} for some in (self.facts, facts))
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
def claim_output(recipe: Recipe, notice: Callable[[str], None]) -> Iterator[Unfinished | None]:
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
    with locks.locked(folder / LOCK) as held:
        try:
            if not held:
                notice(f"{folder} is on a file system without locks: make sure that no other process trains into it")
            yield _unfinished(folder, notice) if _is_unfinished(recipe) else None  # it may have ended meanwhile
        finally:
            if not is_run(folder):
                _take_away(folder, missing)


def _take_away(folder: Path, made: list[Path]) -> None:
    with suppress(OSError, StorageError):
        for path in list(folder.iterdir()) if _about_to_begin(folder) else [folder / LOCK]:  # else somebody put something there
            files.remove_folder(path) if path.is_dir() else files.remove_file(path)
        for path in made:
            path.rmdir()


def _about_to_begin(folder: Path) -> bool:
    """Whether this is a folder with nothing in it but what is written before a run begins."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return LOCK in names and all(name in BEFORE_THE_FIRST_STEP or name.startswith(files.TEMPORARY) for name in names)


def _is_unfinished(recipe: Recipe) -> bool:
    """Whether the output holds an unfinished run, rather than nothing or a run that had not begun."""
    folder = recipe.output
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())) or _about_to_begin(folder):
        return False
    facts = read_record(folder) if is_run(folder) else {}
    if not {"plan", "moment"} <= facts.keys():
        raise taken(StorageError, folder, f"{folder}: exists already, is no unfinished run, and is not overwritten. Remove it")
    if facts.get("status") == "done" and not (folder / STATES).exists():
        raise taken(
            StorageError,
            folder,
            f"{folder}: exists already, as a finished run, and is not overwritten. Look at it with `trimtab show {shlex.quote(str(folder))}`",
        )
    if recipe.resume == "never":
        raise taken(
            StorageError, folder, f"{folder}: exists already, as an unfinished run. Leave resume=never out to resume it"
        )
    return True


def taken(kind: type[TrimtabError], folder: Path, words: str) -> TrimtabError:
    """An error that says what a folder holds, and names one that is free."""
    found = re.fullmatch(r"(.+)-(\d+)", folder.name, re.DOTALL)
    stem, number = (found[1], int(found[2])) if found else (folder.name, 1)
    names = (folder.with_name(f"{stem}-{n}") for n in itertools.count(number + 1))
    free = next(path for path in names if not os.path.lexists(path))
    error = kind(f"{words}, or train into another folder, such as output={free}.")
    error.free = free
    return error


def _unfinished(folder: Path, notice: Callable[[str], None]) -> Unfinished:
    facts = read_record(folder)
    state = newest_state(
        folder / STATES, lambda problem: notice(f"a saved state is damaged, and an earlier one is taken: {problem}")
    )
    return Unfinished(folder, facts, state)


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """A run's facts, of what is identified by its content only that: not its name, nor how much of it was in a cache."""
    start, reference = facts.get("start"), facts.get("reference")
    return {
        **facts,
        "base": facts["base"]["fingerprint"],
        "start": start and {key: value for key, value in start.items() if key != "folder"},
        "reference": reference and reference["identity"],
    }


def threads() -> int:
    """Large products are summed in an order that depends on it."""
    return torch.get_num_threads()


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif json.loads(json.dumps(before)) != json.loads(json.dumps(now)):
        yield path, before, now


def _within(key: str, keys: Iterable[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _words(key: str, before: Any, now: Any) -> str:
    return f"{key}: {before} in the run, {now} now"
