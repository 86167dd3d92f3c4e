"""lm-evaluation-harness (EleutherAI; Biderman et al. 2024, arXiv:2405.14782): its tasks, asked of a base model with its active adapters.

The harness makes the prompts and computes the metrics; log-probabilities and answers come from packs (`packed_model`).
"""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from trimtab.base import Base
from trimtab.core.errors import RecipeError, StorageError
from trimtab.core.processes import processes
from trimtab.evaluate.intervals import paired_difference
from trimtab.evaluate.packed_model import PackedModel

BOOTSTRAP = 1000
"""Draws of the harness's own bootstrap, by which it finds the errors of metrics that are no means."""


def run_tasks(
    base: Base,
    models: Sequence[tuple[str, contextlib.AbstractContextManager[Any]]],
    names: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    on_done: Callable[[str], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """The harness's results, as JSON data.

    Args:
        models: Names of models, and the context in which the base is each of them.
        names: Tasks or groups that the harness has, or YAML files of tasks.
        fewshot: Examples in each prompt; as the task says unless given.
        limit: So many documents of each task alone.
        chat: Whether prompts are written with the chat template.
        on_done: Is called with a model's name, and gives what to call with the number of answered requests.

    Raises:
        RecipeError: There is no such task.
        StorageError: A task's data could not be loaded.
    """
    with quiet():
        tasks = load_tasks(names)
        scores, truncated = {}, {}
        for name, as_model in models:
            model = PackedModel(base, on_done(name) if on_done else None)
            with as_model:
                scores[name] = simple_evaluate(
                    model, **tasks, num_fewshot=fewshot, limit=limit, apply_chat_template=chat,
                    bootstrap_iters=BOOTSTRAP if processes.first else 0,
                )  # fmt: skip
            truncated[name] = model.truncated
        return processes.told_by_first(lambda: _results(scores, max(truncated.values()), limit, chat))


def _results(scores: dict[str, Any], truncated: int, limit: int | None, chat: bool) -> dict[str, Any]:
    """What the harness found of each model, in one. It gives its results to the first process of a machine alone."""
    first = next(iter(scores.values()))
    return {
        "harness": first["lm_eval_version"],
        "tasks": [_task(name, scores) for name in first["results"]],
        "limit": limit,
        "chat_template": chat,
        "truncated": truncated,
    }


@cache
def _manager(folders: tuple[str, ...]) -> TaskManager:
    """Knows the harness's tasks, and those of YAML files in these folders. It takes seconds: it reads thousands of files."""
    return TaskManager(include_path=list(folders) or None)


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """The tasks and groups of these names, and what knows them, as arguments of the harness's `simple_evaluate`.

    Raises:
        RecipeError: There is no such task, or it executes code that the model writes.
        StorageError: A task's data could not be loaded.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise RecipeError(f"--harness: {missing[0]}: no such file.")
    manager = _manager(tuple(sorted({str(Path(file).parent) for file in files})))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known and name not in files:
            near = " or ".join(difflib.get_close_matches(name, known, n=3))
            meant = f"; did you mean {near}?" if near else "."
            raise RecipeError(f"--harness: the harness has no task or group {name!r}{meant} `lm_eval ls tasks` lists them all.")
    try:
        with processes.first_here_first():  # which downloads what the others find
            loaded = manager.load(list(names))
    except Exception as error:  # whatever loads the data of one of hundreds of tasks
        raise StorageError(f"--harness {','.join(names)}: could not be loaded: {type(error).__name__}: {error}") from error
    groups = [group for name, group in loaded["groups"].items() if name in names]
    in_groups = {task.task_name for group in groups for task in group.get_all_tasks()}
    tasks = {name: task for name, task in loaded["tasks"].items() if name not in in_groups}
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise RecipeError(f"--harness: {unsafe[0]} executes code that the model writes, which Trimtab does not do.")
    return {"tasks": [*groups, *tasks.values()], "task_manager": manager}


def _task(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """A task's or a group's metrics: of each model the value and its standard error; of two, their difference on the same documents."""
    first = next(iter(scores.values()))
    metrics = []
    for key in first["results"][name]:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = {model: score["results"][name][key] for model, score in scores.items()}
        errors = {model: score["results"][name].get(f"{metric}_stderr,{filtered}") for model, score in scores.items()}
        entry = {
            "metric": metric,
            "filter": filtered,
            "higher_is_better": first["higher_is_better"].get(name, {}).get(metric),
            "values": values,
            "errors": {model: error if isinstance(error, float) else None for model, error in errors.items()},
        }
        if len(scores) > 1 and (difference := _difference(name, metric, filtered, scores)) is not None:
            entry |= {"difference": difference[0], "interval": list(difference[1])}
        metrics.append(entry)
    return {
        "task": name,
        "documents": first["n-samples"].get(name, {}).get("effective"),
        "fewshot": first["n-shot"].get(name),
        "version": first["versions"].get(name),
        "metrics": metrics,
    }


def _difference(name: str, metric: str, filtered: str, scores: dict[str, Any]) -> tuple[float, tuple[float, float]] | None:
    """How much more the last model has than the first on average over the same documents; None for what is no mean over these."""
    lists = []
    for score in scores.values():
        samples = {s["doc_id"]: s.get(metric) for s in score["samples"].get(name, ()) if s["filter"] == filtered}
        lists.append([samples[number] for number in sorted(samples)])
        numbers = lists[-1] and all(isinstance(value, int | float) for value in lists[-1])
        if not numbers or abs(np.mean(lists[-1]) - score["results"][name][f"{metric},{filtered}"]) > 1e-9:
            return None
    return paired_difference(lists[-1], lists[0], [1] * len(lists[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's messages and bars, and those of the git that it starts: what matters of them is in the results."""
    level, stderr, nowhere = logging.root.manager.disable, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        logging.disable(level)
