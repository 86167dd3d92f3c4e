"""A run as it is compared with others: what its folder says, checked against its certificate."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.artifacts import is_run, read_certificate, read_record, run_status
from trimtab.artifacts.run_folder import CERTIFICATE, DATA, LOSSES, METRICS, RECIPE, RUN
from trimtab.core import files, yaml12
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.evaluate.example_losses import ExampleLosses, read_losses
from trimtab.report import comparison_words as words
from trimtab.report.page import Words

NEEDED = {"status", "base", "method", "objective", "steps", "peak_lr", "data_digest", "versions"}
"""Of run.json."""


@dataclass(frozen=True)
class ComparedRun:
    """What is compared of a run."""

    name: str
    """As the user gave it."""
    label: str
    """The end of its path by which it is known among the others."""
    status: str
    record: dict[str, Any]
    recipe: dict[str, Any]
    """By dotted path."""
    recipe_error: str | None
    data: dict[str, Any]
    losses: ExampleLosses | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of its metrics, by step."""
    training: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    certificate: dict[str, Any] | None = None

    @property
    def objective(self) -> str:
        return str(self.record["objective"]["name"])

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.record["base"].get("fingerprint") or {}

    @property
    def before(self) -> float | None:
        """The validation loss before training."""
        return next((line["loss"] for line in self.evaluations if line["step"] == 0), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the best adapter: of the one whose losses are compared, if a later one was not saved any more."""
        later = [line for line in self.evaluations if line["step"]]
        compared = [line for line in later if self.losses is not None and line["step"] == self.losses.step]
        return min(compared or later, key=lambda line: (line["loss"], line["step"]), default=None)

    @property
    def sampled(self) -> dict[str, Any] | None:
        """The answers that the best adapter gave while the run trained; None if none were asked for."""
        best = self.best
        return next((line for line in self.samples if best is not None and line["step"] == best["step"]), None)

    def why_no_losses(self) -> Words:
        """Why there are no losses of examples to compare, and what to do."""
        if self.best is not None and self.record["status"] == "done":
            return words.filled(words.OLD, run=self.name)
        if not self.data.get("held_out"):
            return words.filled(words.NOTHING_HELD_OUT, run=self.name)
        return words.filled(words.NO_LOSSES_YET, run=self.name, status=self.status)


def open_runs(folders: list[Path]) -> list[ComparedRun]:
    """The runs in these folders.

    Raises:
        RecipeError: There are fewer than two, one is given twice, or is no run.
        ArtifactError: A run's record is damaged, or what is compared of it was changed since it was certified.
    """
    if len(folders) < 2:
        raise RecipeError(
            f"compare: give two runs or more; `trimtab runs` lists them{f'. There is only {folders[0]}' if folders else ''}."
        )
    known: dict[Path, Path] = {}
    for folder in folders:
        if not is_run(folder):
            raise RecipeError(f"{folder} is no run folder." if folder.exists() else f"{folder}: no such folder.")
        if (other := known.setdefault(folder.resolve(), folder)) is not folder:
            raise RecipeError(f"compare: {folder} is the same run as {other}. Give each once.")
    return [_open(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _open(folder: Path, label: str) -> ComparedRun:
    record = read_record(folder)
    if not record.keys() >= NEEDED or not isinstance(record["objective"], dict) or not isinstance(record["base"], dict):
        raise ArtifactError(f"{folder / RUN}: is not the record of a run. Restore it from a copy.")
    certificate = read_certificate(folder) if (folder / CERTIFICATE).is_file() else None
    _refuse_changed(folder, certificate)
    recipe, problem = _recipe(folder / RECIPE)
    data: Any = {}
    with suppress(ArtifactError):
        data = files.read_json(folder / DATA)
    lines: dict[str, list[dict[str, Any]]] = {"eval": [], "train": [], "samples": []}
    for line in metrics_of(folder):
        lines.setdefault(line["kind"], []).append(line)
    return ComparedRun(
        str(folder), label, run_status(folder).words, record, recipe, problem, data if isinstance(data, dict) else {},
        read_losses(folder), lines["eval"], lines["train"], lines["samples"], certificate,
    )  # fmt: skip


def _refuse_changed(folder: Path, certificate: dict[str, Any] | None) -> None:
    """Raise ArtifactError if a file that is read here is not what was certified."""
    for name in (RUN, RECIPE, DATA, METRICS, LOSSES):
        certified = certificate["files"].get(name) if certificate is not None else None
        if certified is not None and not ((folder / name).is_file() and files.sha256_file(folder / name) == certified):
            raise ArtifactError(f"{folder / name}: is missing, or changed since it was certified. Restore it from a copy.")


def metrics_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics that are whole: one that a crash left unfinished is passed over, as is a loss that is no number."""
    with suppress(OSError), open(folder / METRICS, encoding="utf-8", errors="replace") as log:
        for text in log:
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int) and _is_logged(line):
                    yield line


def _is_logged(line: dict[str, Any]) -> bool:
    return line.get("kind") == "samples" or (isinstance(line.get("kind"), str) and isinstance(line.get("loss"), float | int))


def _recipe(path: Path) -> tuple[dict[str, Any], str | None]:
    """A recipe's keys by dotted path; or none, and what is wrong with the file."""
    try:
        return dict(flattened(yaml12.load_file(path))), None
    except RecipeError as error:
        return {}, str(error)


def flattened(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted path. Lists are leaves, and so are empty mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{path}.{key}".lstrip("."))
    elif path:
        yield path, value


def _labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(path[-length:]) for path in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(folder) for folder in folders]
