"""The claim of a run on its output folder: nobody else trains there, and what is there already is resumed or left alone."""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.artifacts import State, is_run, newest_state, read_record, read_state, saved_states
from trimtab.artifacts.run_folder import BEFORE_THE_FIRST_STEP, LOCK, STATES
from trimtab.core import files, locks
from trimtab.core.config import override
from trimtab.core.errors import RecipeError, StorageError
from trimtab.core.processes import processes
from trimtab.run.recipe import Recipe
from trimtab.run.resume import UnfinishedRun, taken


@contextmanager
def claim_together(recipe: Recipe, on_notice: Callable[[str], None]) -> Iterator[UnfinishedRun | None]:
    """As `claim_output`, which the first process does for all: the others have no folder. Raises what it raises."""
    if processes.first:
        with claim_output(recipe, on_notice) as unfinished:
            if unfinished is not None:
                unfinished.check_recipe(recipe)
            processes.tell(unfinished and unfinished.facts)
            yield unfinished and unfinished.shared()
    else:
        told: Any = processes.tell(None)[0]
        yield UnfinishedRun(recipe.output, told, None).shared() if told is not None else None


@contextmanager
def claim_output(recipe: Recipe, on_notice: Callable[[str], None]) -> Iterator[UnfinishedRun | None]:
    """Lock the recipe's output folder for the block; the unfinished run that it holds, or None.

    If the run has not begun when the block ends, what was made for it is removed.

    Raises:
        StorageError: There is something else, or a run that is to be left alone, or another process is training there.
        RecipeError: It is to be resumed from a checkpoint that it does not have.
        ArtifactError: The run's own record, or that checkpoint, is damaged.
    """
    folder = recipe.output
    _is_unfinished(recipe)  # before anything is made
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with locks.file_lock(folder / LOCK) as held:
        try:
            if not held:
                on_notice(f"{folder} is on a file system without locks: make sure that no other process trains into it")
            yield _read_unfinished(recipe, on_notice) if _is_unfinished(recipe) else None  # it may have ended meanwhile
        finally:
            if not is_run(folder):
                _remove_unbegun(folder, missing)


def _remove_unbegun(folder: Path, made: list[Path]) -> None:
    with suppress(OSError, StorageError):
        for path in list(folder.iterdir()) if _is_unbegun(folder) else [folder / LOCK]:  # else somebody put something there
            files.remove_folder(path) if path.is_dir() else files.remove_file(path)
        for path in made:
            path.rmdir()


def _is_unbegun(folder: Path) -> bool:
    """Whether the folder holds nothing but what is written before a run begins."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return LOCK in names and all(name in BEFORE_THE_FIRST_STEP or name.startswith(files.TEMPORARY) for name in names)


def _is_unfinished(recipe: Recipe) -> bool:
    """Whether the output holds an unfinished run, rather than nothing or a run that had not begun."""
    folder = recipe.output
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())) or _is_unbegun(folder):
        if isinstance(recipe.resume, int):
            raise RecipeError(
                f"resume: {folder} holds no run to resume from step {recipe.resume}. Leave resume out to begin one."
            )
        return False
    facts = read_record(folder) if is_run(folder) else {}
    if not {"plan", "moment"} <= facts.keys():
        raise taken(StorageError, folder, f"{folder}: exists already, is no unfinished run, and is not overwritten. Remove it")
    if facts.get("status") == "done" and not (folder / STATES).exists():
        show, start = f"trimtab show {shlex.quote(str(folder))}", override("start", str(folder))
        message = (
            f"{folder}: exists already, as a finished run, and is not overwritten. Look at it with `{show}`; to train its adapter further, "
            f"begin a run from it ({start})"
        )
        raise taken(StorageError, folder, message)
    if recipe.resume == "never":
        message = f"{folder}: exists already, as an unfinished run. Leave resume=never out to resume it"
        raise taken(StorageError, folder, message)
    return True


def _read_unfinished(recipe: Recipe, on_notice: Callable[[str], None]) -> UnfinishedRun:
    folder = recipe.output
    facts = read_record(folder)
    if isinstance(recipe.resume, int):
        return UnfinishedRun(folder, facts, _earlier_state(folder, recipe.resume, on_notice))
    state = newest_state(
        folder / STATES, lambda problem: on_notice(f"a checkpoint is damaged, and an earlier one is used: {problem}")
    )
    return UnfinishedRun(folder, facts, state)


def _earlier_state(folder: Path, step: int, on_notice: Callable[[str], None]) -> State:
    """The state after this step, which a run goes back to. Raises RecipeError with those that it has, or ArtifactError."""
    states = {int(path.name.removeprefix("step-")): path for path in reversed(saved_states(folder / STATES))}
    if step not in states:
        kept = f"are those after steps {', '.join(map(str, states))}" if states else "is none yet"
        raise RecipeError(f"resume: {folder} has no checkpoint after step {step}: there {kept}. Give one of these, or auto.")
    if any(number > step for number in states):
        on_notice(f"going back to step {step}: what was logged and saved after it is removed")
    return read_state(states[step])
