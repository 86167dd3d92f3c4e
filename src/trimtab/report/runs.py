"""The runs below a folder: what each is, how far it is, and how well it did."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.artifacts import is_run, read_record, run_status
from trimtab.artifacts.run_folder import CERTIFICATE, DATA, LOCK, METRICS, RUN
from trimtab.core import files, locks
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.report.comparison_text import duration

State = Literal["certified", "not certified", "done", "running", "interrupted", "failed", "unfinished", "damaged"]
COLORS: dict[State, str] = {
    "certified": "green", "not certified": "red", "done": "", "running": "cyan", "interrupted": "yellow", "failed": "red",
    "unfinished": "yellow", "damaged": "red",
}  # fmt: skip
TAIL = 2**16
"""Bytes at the end of the metrics in which the last step is looked for first."""


@dataclass(frozen=True)
class ListedRun:
    """A line of the list."""

    run: str
    state: State
    words: str
    """How far it is, and why no farther."""
    base: str | None = None
    method: str | None = None
    objective: str | None = None
    train_examples: int | None = None
    eval_examples: int | None = None
    before: float | None = None
    """The validation loss before training, …"""
    best: float | None = None
    """… and the lowest."""
    seconds: float | None = None
    started: str | None = None
    """When, in ISO 8601; of a damaged run, when its record was written."""


def list_runs(folder: Path, sort: str = "newest") -> list[ListedRun]:
    """The runs below a folder, or the one that it is. Raises RecipeError if there is no such folder.

    Args:
        sort: `newest` first, or by the best `loss` of each objective.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{folder}: {'is no folder' if folder.exists() else 'no such folder'}. Name the folder that holds the runs."
        )
    found = sorted((_listed(path) for path in _find(folder)), key=lambda run: (_moment(run), run.run), reverse=True)
    if sort == "loss":
        found.sort(key=lambda run: (run.objective or "~", run.best is None, run.best or 0.0))
    return found


def _find(folder: Path) -> Iterator[Path]:
    """The run folders at or below a folder, each once. What is in a run is not looked at; a link is followed to a run, not to a folder
    of others, so that the search ends and stays below the folder."""
    if is_run(folder):
        yield folder
        return
    waiting, linked, seen = [folder], list[Path](), set[Path]()
    while waiting:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:  # a folder of somebody else's
            continue
        for entry in entries:
            with suppress(OSError):
                if entry.name.startswith(".") or not entry.is_dir():
                    continue
                if not (os.path.isfile(os.path.join(entry.path, RUN))):
                    waiting += [] if entry.is_symlink() else [Path(entry.path)]
                elif entry.is_symlink():
                    linked.append(Path(entry.path))
                else:
                    seen.add(Path(entry.path).resolve())
                    yield Path(entry.path)
    for path in linked:
        if (real := path.resolve()) not in seen:
            seen.add(real)
            yield path


def _listed(folder: Path) -> ListedRun:
    try:
        record = read_record(folder)
        state, words = _state(folder, record)
        return _described(folder, record, state, words)
    except (ArtifactError, OSError) as error:
        problem = str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        problem = f"{folder / RUN}: is not the record of a run. Restore it from a copy."
    written = ""
    with suppress(OSError):
        written = datetime.fromtimestamp((folder / RUN).stat().st_mtime, UTC).isoformat(timespec="seconds")
    return ListedRun(str(folder), "damaged", problem, started=written or None)


def _described(folder: Path, record: dict[str, Any], state: State, words: str) -> ListedRun:
    train, held_out = _examples(folder)
    best = record.get("best") or {}
    moment = record.get("moment")
    if moment is not None:
        datetime.fromisoformat(moment)
    return ListedRun(
        str(folder), state, words, str(record["base"]["source"]), str(record["method"]["name"]), str(record["objective"]["name"]),
        train, held_out, _before(folder), best.get("eval_loss"), record.get("seconds"), moment,
    )  # fmt: skip


def _state(folder: Path, record: dict[str, Any]) -> tuple[State, str]:
    """How far a run is. One whose record says that it is running is, if a process holds its lock; else that process has died."""
    steps, saved, status = record["steps"], (record.get("last") or {}).get("step", 0), record["status"]
    held = locks.is_locked(folder / LOCK) if status == "running" or not (folder / CERTIFICATE).is_file() else False
    if status == "done":
        if held:
            return "running", "training is done; being certified"
        certified = run_status(folder)
        state: State = "certified" if certified.certified else "not certified" if certified.tests else "done"
        return state, certified.words
    if held:
        return "running", f"running: step {_last_step(folder)} of {steps}"
    if status == "running" and held is None:
        return "unfinished", f"unfinished: step {_last_step(folder)} of {steps} (whether it is running is not known here)"
    if status == "failed":
        return "failed", f"failed at step {_last_step(folder)} of {steps}: {record.get('error', 'no reason is recorded')}"
    if status == "interrupted":
        return "interrupted", f"interrupted at step {saved} of {steps}"
    return "unfinished", f"unfinished: its process ended; saved at step {saved} of {steps}"


def _last_step(folder: Path) -> int:
    """The number of the last step that was logged."""
    try:
        with open(folder / METRICS, "rb") as log:
            size, tail = log.seek(0, os.SEEK_END), TAIL
            while (found := _step_in(log, max(0, size - tail))) is None and tail < size:  # a line of answers can be long
                tail *= 8
    except OSError:
        return 0
    return found or 0


def _step_in(log: BinaryIO, start: int) -> int | None:
    """The number of the last step in a log from this byte on; None if none is there."""
    log.seek(start)
    for text in reversed(log.read().splitlines()):
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if line["kind"] == "train":
                return int(line["step"])
    return None


def _before(folder: Path) -> float | None:
    """The validation loss before training."""
    with suppress(OSError, ValueError), open(folder / METRICS, encoding="utf-8") as log:
        for text in log:
            if '"eval"' in text:
                line = json.loads(text)
                if line.get("kind") == "eval" and line.get("step") == 0 and isinstance(line.get("loss"), float | int):
                    return float(line["loss"])
    return None


def _examples(folder: Path) -> tuple[int | None, int | None]:
    """How many examples a run trains on, and how many it holds out."""
    try:
        data = files.read_json(folder / DATA)
        held_out = len(data["held_out"])
        return sum(source["used"] for source in data["sources"]) - held_out, held_out
    except (ArtifactError, KeyError, TypeError):
        return None, None


def _moment(run: ListedRun) -> float:
    with suppress(ValueError):
        return datetime.fromisoformat(run.started).timestamp() if run.started else 0.0
    return 0.0


def runs_facts(runs: list[ListedRun]) -> list[dict[str, Any]]:
    """The list as JSON data."""
    return [asdict(run) for run in runs]


def runs_table(runs: list[ListedRun], folder: Path) -> RenderableType:
    """The list, two lines a run."""
    if not runs:
        return Text(
            f"no runs below {folder}. A recipe's `output` says where a run is kept; `trimtab train RECIPE.yaml` makes one."
        )
    table = Table(box=None, pad_edge=False)
    for name in ("run", "status", "loss", "started"):
        table.add_column(name, overflow="fold", justify="right" if name == "loss" else "left")
    for run in runs:
        color = COLORS[run.state]
        what = ", ".join(part for part in (run.base, run.method, run.objective, _counted(run)) if part)
        status = f"[{color}]{escape(run.words)}[/]" if color else escape(run.words)
        table.add_row(
            f"[bold]{escape(run.run)}[/]",
            f"{status}\n[dim]{escape(what)}[/]" if what else status,
            f"[dim]from {_number(run.before)}[/]\nto {_number(run.best)}" if run.state != "damaged" else "",
            f"{_when(run)}\n[dim]{duration(run.seconds) if run.seconds else ''}[/]",
        )
    return table


def _counted(run: ListedRun) -> str:
    return f"{run.train_examples:,} + {run.eval_examples:,} validation examples" if run.train_examples is not None else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _when(run: ListedRun) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M") if (moment := _moment(run)) else "–"
