"""A run's folder while it trains: what is written to it, what is kept, and from where it can go on."""

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
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.errors import NonFinite, StorageError
from trimtab.core.interrupts import interrupts_deferred
from trimtab.deploy import save_adapter
from trimtab.evaluate import Loss
from trimtab.train import Optimizer

KEPT = 2
"""States that are kept, should the newest be damaged."""


@dataclass
class Run:
    """A run's folder, and what is known about it. `state` is what run.json holds."""

    folder: Path
    state: dict[str, Any] = field(default_factory=dict)

    def write(self, **news: Any) -> None:
        """Add to run.json."""
        self.state |= news
        files.write_json(self.folder / RUN, self.state)

    def log(self, **line: Any) -> None:
        """Add a line to metrics.jsonl."""
        files.append_line(self.folder / METRICS, json.dumps(files.as_json(line), allow_nan=False))


@dataclass
class Progress:
    """How far training is, as it was saved last."""

    best: dict[str, Any] | None = None
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0
    skipped: int = 0
    """Steps that were not taken, because a number was none."""
    compared: bool = False
    """The held-out rows have been measured before training."""


class Saver:
    """Saves adapters, and all that the run goes on from; keeps of them what is still needed."""

    def __init__(
        self,
        run: Run,
        base: Base,
        optimizer: Optimizer,
        done: Progress,
        canaries: Callable[[Loss | None], list[tuple[str, float]]],
    ) -> None:
        """
        Args:
            canaries: What the model as it stands makes of a few rows, by their places; its adapter is recognized by that later.
                Given what has just been made of the held-out rows, if it has.
        """
        self.run, self.base, self.optimizer, self.done, self.canaries = run, base, optimizer, done, canaries
        self.started = time.perf_counter() - done.seconds

    def unseen(self, every: int, steps: int) -> bool:
        """The step that was saved last is one after which held-out rows are measured, and they have not been."""
        step = self.done.last["step"]
        return (step % every == 0 or step == steps) and self.done.last["eval_loss"] is None

    def words(self) -> str:
        """Where an interrupted run can be resumed from."""
        if not self.done.last:
            return "nothing has been saved yet; the same command begins anew"
        step, folder = self.done.last["step"], self.run.folder / self.done.last["folder"]
        return f"the adapter after step {step} is in {folder}; the same command goes on from there"

    def save(self, step: int, train_loss: float | None, scored: Loss | None) -> None:
        """Save everything as it stands after this step."""
        if broken := self.optimizer.not_finite():
            raise NonFinite(
                f"After step {step}, {broken[0]} holds values that are not numbers, so it is not saved. Lower train.lr."
            )
        canaries, eval_loss = self.canaries(scored), scored.loss if scored else None
        if broken := [where for where, value in canaries if not math.isfinite(value)]:
            raise NonFinite(
                f"After step {step}, the model gives {broken[0]} a log-probability that is not a number, so it is not saved. Lower train.lr."
            )
        folder, done = self.run.folder, self.done
        name = f"{CHECKPOINTS}/step-{step:06d}"
        loss = train_loss if train_loss is not None and math.isfinite(train_loss) else None  # a step that was skipped
        news = {"step": step, "folder": name, "train_loss": loss, "eval_loss": eval_loss}
        last = {**news, "canaries": [value for _, value in canaries]}
        better = eval_loss is not None and (done.best is None or eval_loss < done.best["eval_loss"])
        seconds = time.perf_counter() - self.started
        done = replace(done, best=last if better else done.best, last=last, skipped=self.optimizer.skipped, seconds=seconds)
        facts = {key: self.run.state[key] for key in ("data_digest", "objective", "reference", "start")}
        with interrupts_deferred():
            if not (folder / name).exists():  # it does where what follows failed
                save_adapter(self.base, self.optimizer.adapter, folder / name, {**news, **facts})
            write_state(folder / STATES, State(step, self.optimizer.state(), asdict(done)))
            self.done = done  # now that it is so
            self.run.write(best=done.best, last=done.last)
            self._let_go()

    def _let_go(self) -> None:
        """Of all but the newest states, and of adapters that those do not speak of."""
        states, kept = saved_states(self.run.folder / STATES), set[str]()
        for state in states[:KEPT]:
            facts = files.read_json(state / "state.json")["facts"]
            kept |= {facts[which]["folder"] for which in ("best", "last") if facts[which]}
        for folder in states[KEPT:]:
            files.remove_folder(folder)
        keep_adapters(self.run.folder, kept)


def keep_adapters(folder: Path, names: set[str]) -> None:
    """Let go of all saved adapters but these."""
    for old in (folder / CHECKPOINTS).glob("step-*"):
        if f"{CHECKPOINTS}/{old.name}" not in names:
            files.remove_folder(old)


def end(folder: Path) -> None:
    """Let go of what a run goes on from: it has ended well, so a disk that fails now can only leave some of that behind."""
    with suppress(StorageError):
        files.remove_file(folder / LOCK)
        files.remove_folder(folder / STATES)
