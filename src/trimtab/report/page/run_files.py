"""What a run's files say, for its report. A file that is missing or damaged is left out, and the report says so."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.artifacts.run_folder import CERTIFICATE, DATA, LOSSES, METRICS, RECIPE, read_certificate, read_record
from trimtab.core import files
from trimtab.core.errors import TrimtabError
from trimtab.evaluate import paired_difference
from trimtab.report.page.scale import Band, Point

_NOT_MEASURES = {
    "kind",
    "step",
    "epoch",
    "loss",
    "low",
    "high",
    "lr",
    "grad_norm",
    "items",
    "tokens",
    "computed",
    "seconds",
    "took",
    "waited",
    "rows",
    "answers",
}


class Difference(NamedTuple):
    """How a loss has changed, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass
class RunFiles:
    """The contents of a run's files; empty or None where there are none."""

    folder: Path
    record: dict[str, Any]
    recipe: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    """The lines of training steps in metrics.jsonl, of evaluations, and of sampled answers, in their order."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    losses: dict[str, Any] | None = None
    unreadable: list[str] = field(default_factory=list)
    """Messages about files that are damaged."""

    @property
    def status(self) -> str:
        return str(self.record.get("status"))

    @property
    def step(self) -> int:
        """The last one that is known."""
        logged = self.train[-1]["step"] if self.train else 0
        return max(logged, (self.record.get("last") or {}).get("step", 0))

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest loss of those after training began."""
        later = [line for line in self.evaluations if line["step"] and math.isfinite(value_of(line))]
        return min(later, key=value_of, default=None)

    @property
    def answers(self) -> dict[str, Any] | None:
        """The sampled answers of the best adapter; if there are none, the last ones."""
        best = self.best
        of_best = (line for line in self.samples if best is not None and line["step"] == best["step"])
        return next(of_best, self.samples[-1] if self.samples else None)

    def test(self, name: str) -> dict[str, Any] | None:
        """A test of the certificate."""
        tests = self.certificate["tests"] if self.certificate else []
        return next((test for test in tests if test["name"] == name), None)

    def difference(self, name: str) -> Difference | None:
        """That of the test `gain` or `forgetting`; certificates of earlier versions have it in words alone."""
        found = (self.test(name) or {}).get("difference")
        return Difference(*found) if found else None

    def change_of_losses(self) -> Difference | None:
        """From before training to the best adapter, by the losses of examples."""
        with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            assert self.losses is not None
            before, best, examples = (self.losses[key] for key in ("before", "best", "examples"))
            value, interval = paired_difference(best, before, [example["items"] for example in examples])
            return Difference(value, *interval)
        return None


def read_run_files(folder: Path) -> RunFiles:
    """Everything that a run's files say. Raises ArtifactError if `run.json` does not say what run it is."""
    run = RunFiles(folder, read_record(folder))

    def attempt(name: str, read: Any) -> Any:
        """What it reads; None if there is no such file, or a damaged one."""
        if not (folder / name).is_file():
            return None
        try:
            return read()
        except (TrimtabError, OSError, ValueError) as error:
            run.unreadable.append(f"{name}: {error}")
            return None

    run.recipe = attempt(RECIPE, lambda: (folder / RECIPE).read_text(encoding="utf-8")) or ""
    run.data = _dictionary(attempt(DATA, lambda: files.read_json(folder / DATA)))
    run.certificate = attempt(CERTIFICATE, lambda: read_certificate(folder))
    run.losses = _dictionary(attempt(LOSSES, lambda: files.read_json(folder / LOSSES))) or None
    lines = attempt(METRICS, lambda: _lines(folder / METRICS)) or []
    for kind, into in (("train", run.train), ("eval", run.evaluations), ("samples", run.samples)):
        into += {line["step"]: line for line in lines if line.get("kind") == kind}.values()
    return run


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of the metrics: a crash can leave the last one incomplete."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    return found


def value_of(line: dict[str, Any], name: str = "loss") -> float:
    """A number of a line; NaN where it has none. NaN and Inf, which JSON does not have, are texts there."""
    value = line.get(name)
    with suppress(TypeError, ValueError):
        return float(value)  # type: ignore[arg-type]
    return math.nan


def points(lines: list[dict[str, Any]], name: str = "loss") -> list[Point]:
    return [(line["step"], value_of(line, name)) for line in lines if name in line]


def band(lines: list[dict[str, Any]]) -> list[Band]:
    """The 95 % intervals of the loss."""
    return [(line["step"], value_of(line, "low"), value_of(line, "high")) for line in lines if line.get("low") is not None]


def measures(lines: list[dict[str, Any]]) -> list[str]:
    """The names of what else was measured, in the order of their first line."""
    found: dict[str, None] = {}
    for line in lines[:1] + lines[-1:]:
        found |= {name: None for name, value in line.items() if name not in _NOT_MEASURES and isinstance(value, int | float)}
    return list(found)
