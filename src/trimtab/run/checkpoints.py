"""A run's folder while it trains: its record, its metrics, and the checkpoints from which it can resume."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.artifacts import State, saved_states, write_state
from trimtab.artifacts.run_folder import CHECKPOINTS, LOCK, METRICS, RUN, STATES
from trimtab.artifacts.state import MANIFEST
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.errors import NonFinite, StorageError
from trimtab.core.interrupts import interrupts_deferred
from trimtab.deploy import save_adapter
from trimtab.evaluate import Loss
from trimtab.report import RunObserver
from trimtab.train import Optimizer, Step

KEPT = 2
"""How many states are kept, in case the newest is damaged."""


@dataclass
class Run(RunObserver):
    """A run's folder, and its record: what `run.json` holds."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def write(self, **facts: Any) -> None:
        """Add to run.json."""
        self.record |= facts
        files.write_json(self.folder / RUN, self.record)

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        line = files.to_json({"kind": kind, "step": step, **values})
        files.append_line(self.folder / METRICS, json.dumps(line, allow_nan=False))


@dataclass
class Progress:
    """How far training is, as of the last checkpoint."""

    best: dict[str, Any] | None = None
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0
    skipped: int = 0
    """Steps that were not taken, because the loss or gradient was NaN or Inf."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """Of the next step, on a base model in float16."""
    evaluated_before_training: bool = False


class Checkpointer:
    """Saves adapters and the states to resume from, and removes those that are no longer needed."""

    def __init__(
        self,
        run: Run,
        base: Base,
        optimizer: Optimizer,
        progress: Progress,
        score_canaries: Callable[[Loss | None], list[tuple[str, float]]],
    ) -> None:
        """
        Args:
            score_canaries: Gives the log-probability of each canary row by its place, by which the certificate recognizes the
                adapter. Is given the evaluation that has just been made, if there was one.
        """
        self.run, self.base, self.optimizer, self.progress, self.score_canaries = run, base, optimizer, progress, score_canaries
        self.started = time.perf_counter() - progress.seconds

    def count(self, step: Step) -> None:
        self.progress.tokens += step.tokens
        self.progress.computed += step.computed

    def lacks_evaluation(self, every: int, steps: int) -> bool:
        """Whether the last checkpoint is of a step after which held-out examples are evaluated, and they have not been."""
        step = self.progress.last["step"]
        return (step % every == 0 or step == steps) and self.progress.last["eval_loss"] is None

    def resume_hint(self) -> str:
        """Where an interrupted run resumes."""
        if not self.progress.last:
            return "nothing has been saved yet; the same command starts again"
        step, folder = self.progress.last["step"], self.run.folder / self.progress.last["folder"]
        return f"the adapter after step {step} is in {folder}; the same command resumes from there"

    def save(self, step: int, train_loss: float | None, evaluated: Loss | None) -> None:
        """Save a checkpoint after this step."""
        if broken := self.optimizer.not_finite():
            raise NonFinite(f"After step {step}, {broken[0]} holds NaN or Inf, so it is not saved. Lower train.lr.")
        canaries, eval_loss = self.score_canaries(evaluated), evaluated.loss if evaluated else None
        if broken := [place for place, logprob in canaries if not math.isfinite(logprob)]:
            raise NonFinite(
                f"After step {step}, the model gives {broken[0]} a log-probability of NaN or Inf, so it is not saved. Lower train.lr."
            )
        folder, progress = self.run.folder, self.progress
        name = f"{CHECKPOINTS}/step-{step:06d}"
        loss = train_loss if train_loss is not None and math.isfinite(train_loss) else None  # a step that was skipped
        facts = {"step": step, "folder": name, "train_loss": loss, "eval_loss": eval_loss}
        facts |= evaluated.by_source if evaluated else {}
        last = {**facts, "canaries": [logprob for _, logprob in canaries]}
        better = eval_loss is not None and (progress.best is None or eval_loss < progress.best["eval_loss"])
        seconds = time.perf_counter() - self.started
        best = last if better else progress.best
        progress = replace(progress, best=best, last=last, skipped=self.optimizer.skipped, seconds=seconds)
        progress = replace(progress, loss_scale=asdict(self.optimizer.loss_scale))
        facts |= {key: self.run.record[key] for key in ("data_digest", "objective", "reference", "start")}
        with interrupts_deferred():
            if not (folder / name).exists():  # it does if writing the state failed before
                save_adapter(self.base, self.optimizer.adapter, folder / name, facts)
            write_state(folder / STATES, State(step, self.optimizer.state(), asdict(progress)))
            self.progress = progress  # now that it is on disk
            self.run.write(best=progress.best, last=progress.last)
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the newest states, and adapters that those do not name."""
        states, kept = saved_states(self.run.folder / STATES), set[str]()
        for state in states[:KEPT]:
            facts = files.read_json(state / MANIFEST)["facts"]
            kept |= {facts[key]["folder"] for key in ("best", "last") if facts[key]}
        for folder in states[KEPT:]:
            files.remove_folder(folder)
        keep_adapters(self.run.folder, kept)


def keep_adapters(folder: Path, names: set[str]) -> None:
    """Remove all saved adapters of a run but these."""
    for old in (folder / CHECKPOINTS).glob("step-*"):
        if f"{CHECKPOINTS}/{old.name}" not in names:
            files.remove_folder(old)


def remove_states(folder: Path) -> None:
    """Remove what a run resumes from: it has ended well, so a disk that fails now can only leave some of that behind."""
    with suppress(StorageError):
        files.remove_file(folder / LOCK)
        files.remove_folder(folder / STATES)
