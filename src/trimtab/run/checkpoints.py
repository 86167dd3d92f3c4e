"""A run's folder while it trains: its record, its metrics, and the checkpoints from which it can resume."""

import json
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.artifacts import State, saved_states, write_state
from trimtab.artifacts.run_folder import CHECKPOINTS, LOCK, METRICS, RUN, STATES
from trimtab.artifacts.state import MANIFEST
from trimtab.certify.certificate import canaries
from trimtab.certify.fresh_process import PACK_TOKENS
from trimtab.core import files
from trimtab.core.errors import NonFinite, StorageError
from trimtab.core.interrupts import interrupts_deferred
from trimtab.core.processes import processes
from trimtab.deploy import save_adapter
from trimtab.evaluate import Loss
from trimtab.evaluate.reference import logprobs
from trimtab.report import RunObserver
from trimtab.run.losses import LossRecord, of_best
from trimtab.run.recipe import Recipe
from trimtab.run.start import PreparedRun
from trimtab.train import Optimizer, Step

DRIFTED = "Their gradients were not added up, or processors of different kinds round differently."


@dataclass
class Run(RunObserver):
    """A run's folder, and its record: what `run.json` holds."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)

    def write(self, **facts: Any) -> None:
        """Add to run.json, which is the first process's."""
        self.record |= facts
        if processes.first:
            files.write_json(self.folder / RUN, self.record)

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, which is the first process's."""
        if not processes.first:
            return
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
    standing: dict[str, Any] = field(default_factory=dict)
    """Of early stopping: the evaluation that later ones have to improve on."""
    stopped: str | None = None
    """Why the run ends early."""
    losses: dict[str, Any] = field(default_factory=dict)
    """Of each validation example, before training and of the best adapter; see `run/losses.py`."""


class Checkpointer:
    """Saves adapters and the states to resume from, and removes those that are no longer needed."""

    def __init__(self, run: Run, prepared: PreparedRun, optimizer: Optimizer, state: State | None) -> None:
        self.run, self.prepared, self.optimizer = run, prepared, optimizer
        self.progress = Progress(**state.facts) if state is not None else Progress()
        if prepared.steps.memory.plain() != run.record["plan"]:  # other packs, in whose order other rows have other places
            self.progress.standing = {}
        self.losses = LossRecord(prepared)
        self.losses.save(self.progress.losses)
        self.canaries = canaries(prepared.data)
        self.started = time.perf_counter() - self.progress.seconds
        config, steps = prepared.recipe.train, len(prepared.steps)
        self.evaluate_every = config.evaluate_every or max(1, -(-steps // 4))
        """Steps from one evaluation to the next, …"""
        self.save_every = config.save_every or self.evaluate_every
        """… and from one checkpoint to the next."""

    def is_due(self, every: int, step: int) -> bool:
        """Whether something is done after this step that is done every so many steps, and at the end."""
        return step % every == 0 or step == len(self.prepared.steps)

    def logged(self, step: Step) -> dict[str, Any]:
        """Count a step, and add it to the metrics: what it did, and how far training is after it."""
        self.progress.tokens += step.tokens
        self.progress.computed += step.computed
        seconds = round(time.perf_counter() - self.started, 4)
        values = {**step.values, "epoch": self.prepared.steps.epoch_after(step.number), "seconds": seconds}
        self.run.logged("train", step.number, values)
        return values

    def lacks_evaluation(self) -> bool:
        """Whether the last checkpoint is of a step after which held-out examples are evaluated, and they have not been."""
        last, evaluates = self.progress.last, bool(self.prepared.data.eval)
        return evaluates and self.is_due(self.evaluate_every, last["step"]) and last["eval_loss"] is None

    def resume_hint(self) -> str:
        """Where an interrupted run resumes."""
        if not self.progress.last:
            return "nothing has been saved yet; the same command starts again"
        step, folder = self.progress.last["step"], self.run.folder / self.progress.last["folder"]
        return f"the adapter after step {step} is in {folder}; {same_command(self.prepared.recipe)} resumes from there"

    def after(self, step: int, train_loss: float | None, evaluated: Loss | None) -> None:
        """Save a checkpoint after this step, if one is due, or if its adapter is the best so far or ends the run."""
        if self.is_due(self.save_every, step) or self._is_best(evaluated) or self.progress.stopped:
            self.save(step, train_loss, evaluated)

    def _is_best(self, evaluated: Loss | None) -> bool:
        best = self.progress.best
        return evaluated is not None and (best is None or evaluated.loss < best["eval_loss"])

    def save(self, step: int, train_loss: float | None, evaluated: Loss | None) -> None:
        """Save a checkpoint after this step."""
        if broken := self.optimizer.not_finite():
            raise NonFinite(f"After step {step}, {broken[0]} holds NaN or Inf, so it is not saved. Lower train.lr.")
        scored, eval_loss = self.score_canaries(evaluated), evaluated.loss if evaluated else None
        if broken := [place for place, logprob in scored if not math.isfinite(logprob)]:
            raise NonFinite(
                f"After step {step}, the model gives {broken[0]} a log-probability of NaN or Inf, so it is not saved. Lower train.lr."
            )
        folder, progress = self.run.folder, self.progress
        name = f"{CHECKPOINTS}/step-{step:06d}"
        loss = train_loss if train_loss is not None and math.isfinite(train_loss) else None  # a step that was skipped
        facts = {"step": step, "folder": name, "train_loss": loss, "eval_loss": eval_loss}
        facts |= evaluated.by_source if evaluated else {}
        last = {**facts, "canaries": [logprob for _, logprob in scored]}
        seconds = time.perf_counter() - self.started
        best, losses = progress.best, progress.losses
        if evaluated is not None and self._is_best(evaluated):
            best, losses = last, of_best(losses, evaluated, step)
        progress = replace(progress, best=best, losses=losses, last=last, skipped=self.optimizer.skipped, seconds=seconds)
        progress = replace(progress, loss_scale=asdict(self.optimizer.loss_scale))
        facts |= {key: self.run.record[key] for key in ("data_digest", "objective", "reference", "start")}
        processes.agree(
            f"the adapter after step {step}, so it is not saved. {DRIFTED}", files.json_digest(self.optimizer.digests())
        )
        state = State(step, self.optimizer.state(), asdict(progress))
        with interrupts_deferred():
            if processes.first:
                if not (folder / name).exists():  # it does if writing the state failed before
                    with self.optimizer.whole_in(state.tensors):
                        save_adapter(self.prepared.base, self.optimizer.adapter, folder / name, facts, tokenizer=False)
                write_state(folder / STATES, state)
            self.progress = progress  # now that it is on disk
            if best is last:
                self.losses.save(losses)
            self.run.write(best=progress.best, last=progress.last)
            if processes.first:
                self._remove_old()

    def score_canaries(self, evaluated: Loss | None) -> list[tuple[str, float]]:
        """Each canary's place, and its Σ log p in the model as it is, by which the certificate recognizes the adapter.

        They are the first of the held-out rows, if there are any, whose evaluation has them.
        """
        rows = self.canaries
        values = evaluated.logprobs[: len(rows)] if evaluated else logprobs(self.prepared.base, rows, PACK_TOKENS)
        return [(row.where, value) for row, value in zip(rows, values, strict=True)]

    def _remove_old(self) -> None:
        """Remove all but the newest states, and adapters that those do not name."""
        states, kept = saved_states(self.run.folder / STATES), set[str]()
        for state in states[: self.prepared.recipe.train.keep]:
            facts = files.read_json(state / MANIFEST)["facts"]
            kept |= {facts[key]["folder"] for key in ("best", "last") if facts[key]}
        for folder in states[self.prepared.recipe.train.keep :]:
            files.remove_folder(folder)
        keep_adapters(self.run.folder, kept)


def same_command(recipe: Recipe) -> str:
    """The command that goes on with a run that was interrupted."""
    return "the same command with resume=auto" if isinstance(recipe.resume, int) else "the same command"


def newest_checkpoints(folder: Path, count: int) -> set[str]:
    """The folders, within the run's, of the adapters that belong to its newest states."""
    return {f"{CHECKPOINTS}/{state.name}" for state in saved_states(folder / STATES)[:count]}


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
