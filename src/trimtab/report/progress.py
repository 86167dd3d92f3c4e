"""A run on the terminal: what is about to be trained, a progress bar, and the result."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.status import Status

from trimtab.core.config import Choice
from trimtab.core.errors import RecipeError
from trimtab.data import SourceReport
from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.report.events import RunObserver
from trimtab.report.folders import memory_text
from trimtab.report.scores import short

_REFERENCES = {"base": "the base model", "start": "the adapter that training starts from"}
_EVAL_VALUES = {"loss", "low", "high", "tokens", "rows", "sources"}
"""Of an evaluation; what else it has are the objective's measures."""
_COLORS = {"passed": "green", "noted": "yellow", "failed": "red"}


class Terminal(RunObserver):
    """Shows a run on the terminal: what is being done, and a bar while it trains; in a log file, lines instead."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._status: Status | None = None
        self._task = TaskID(0)
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self._planned_steps = 0
        self._losses: deque[float] = deque(maxlen=1)
        self._compared_with = "base model"
        self._stages_shown = set[str]()

    def on_stage(self, stage: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, stage=stage)
        elif self.console.is_terminal:
            if self._status is None:
                self._status = self.console.status("")
                self._status.start()
            self._status.update(f"[dim]{escape(stage)} …[/]")
        elif stage not in self._stages_shown:
            self._stages_shown.add(stage)
            self.console.print(f"[dim]{escape(stage)} …[/]")

    def on_plan(self, facts: dict[str, Any], reports: list[SourceReport], train_examples: int, eval_examples: int) -> None:
        self._stop_status()
        trained, frozen = facts["trainable_parameters"], facts["base_parameters"]
        if facts["processes"] > 1:
            self._line("processes", f"{facts['processes']} by {facts['engine']}, each on {facts['device']} in {facts['dtype']}")
        self._line("base model", f"{facts['base']['source']}  ({frozen:,} parameters, frozen)")
        self._line("method", f"{_settings(Method, facts['method'])}  ({trained:,} parameters, {trained / frozen:.2%})")
        if facts["left_frozen"]:
            self._line("", f"not adapted, frozen: {facts['left_frozen']}")
        if facts["positions"]:
            self._line("", f"its virtual tokens take {facts['positions']:,} positions of every example's context")
        for report in reports:
            self._line("data", str(report))
            for place, reason in report.rejected[:5]:
                self._line("", f"[yellow]rejected[/] {escape(place)}: {escape(reason)}", markup=True)
            if len(report.rejected) > 5:
                self._line("", f"… and {len(report.rejected) - 5} more, in data.json")
            if report.ignored_columns:
                self._line("", f"ignored columns: {', '.join(sorted(report.ignored_columns))}")
        for name, source in facts["sources"].items():
            self._line("", f"{name}: {source['words']}")
        self._line(
            "",
            f"{train_examples:,} training examples ({facts['learned_tokens']:,} target tokens), {eval_examples:,} validation",
        )
        self._line("objective", _settings(Objective, facts["objective"]))
        if (reference := facts["reference"]) is not None:
            known = reference["rows"] - reference["computed"]
            cached = f", {known:,} from the cache" if known else ""
            name = _REFERENCES.get(reference["kind"], reference["kind"])
            self._line("", f"reference model: {name} ({reference['computed']:,} log-probabilities computed{cached})")
        if facts["start"] is not None or reference is not None:
            self._compared_with = "start"
        if facts["start"] is not None:
            self._line("", f"starts from the adapter in {facts['start']['folder']}")
        epochs = "epoch" if facts["epochs"] == 1 else "epochs"
        limit = " (train.max_steps)" if facts["steps"] == facts["max_steps"] else ""
        auto = "" if facts["lr_formula"] == "given" else f" (auto: {facts['lr_formula']})"
        self._line(
            "training",
            f"{facts['steps']:,} steps{limit} of {facts['rows_per_step']:.3g} examples in {facts['epochs']:.4g} {epochs}, "
            f"learning rate {facts['peak_lr']:g}{auto}",
        )
        self._line("", facts["memory"])
        self._planned_steps = facts["steps"]
        self._losses = deque(maxlen=max(1, facts["steps"] // 20))
        if self.console.is_terminal:
            self._start_bar()

    def on_notice(self, message: str) -> None:
        self._line("note", message, style="bold yellow")

    def on_tracker(self, name: str, place: str) -> None:
        self._line("track", f"{name}: {place}")

    def logged(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "eval":
            self._show_evaluation(step, values)
        elif kind == "samples":
            self._show_samples(values)
        else:
            self._show_step(step, values)

    def _show_samples(self, values: dict[str, Any]) -> None:
        measured = "  ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in values.items() if key != "answers")
        self._line("", f"{len(values['answers']):,} answers: {measured}")
        for each in values["answers"]:
            question, expected, answer = (
                escape(short(" ".join(each[key].split()), 70)) for key in ("question", "expected", "answer")
            )
            shown = f"[green]{answer}[/]" if each["right"] else f"{answer} [dim](expected {expected})[/]"
            self._line("", f"  [dim]{question} →[/] {shown}", markup=True)

    def _show_step(self, step: int, values: dict[str, Any]) -> None:
        self._steps += 1
        self._tokens += values["tokens"]
        self._seconds += values["took"]
        if "skipped" not in values:
            self._losses.append(values["loss"])
        total = self._planned_steps
        left = _duration((total - step) * self._seconds / self._steps)
        rate = self._tokens / self._seconds if self._seconds else 0.0
        if self._bar is not None:
            loss = f"{sum(self._losses) / len(self._losses):.4f}" if self._losses else "–"
            progress = f"loss {loss}  {rate:,.0f} tokens/s  {left} left"
            self._bar.update(self._task, completed=step, stage="training", progress=progress)
        elif step in (1, total) or step % max(1, total // 10) == 0:
            self._line("", f"step {step}/{total}  loss {values['loss']:.4f}  {rate:,.0f} tokens/s  {left} left")

    def _show_evaluation(self, step: int, values: dict[str, Any]) -> None:
        name = self._compared_with if step == 0 else f"step {step}"
        measures = "".join(f"  {key.replace('_', ' ')} {values[key]:.3g}" for key in values if key not in _EVAL_VALUES)
        self._line("eval", f"{name}: {_loss(values)}{escape(measures)}", markup=True)
        for source, of_source in values.get("sources", {}).items():
            self._line("", f"  {source}: {_loss(of_source)}", markup=True)

    def on_finish(self, record: dict[str, Any], folder: Path) -> None:
        self._stop()
        best, tokens, seconds = record["best"], record["tokens"], record["seconds"]
        processed = f"{record['computed_tokens']:,} processed (shared prefixes once, none after the last target token)"
        self._line("tokens", f"{tokens:,} tokens, {processed}")
        if record.get("memory_held"):
            self._line("memory", memory_text(record["memory_held"]))
        if record["stopped"]:
            self._line("stopped", record["stopped"].removeprefix("stopped "))
        self._line("done", f"{seconds:.0f} s with evaluation, {tokens / seconds:,.0f} tokens/s")
        self._line("adapter", f"step {best['step']}, in {folder / 'adapter'}")

    def on_certificate(self, certificate: dict[str, Any]) -> None:
        self._stop_status()
        for number, test in enumerate(certificate["tests"]):
            status = f"[{_COLORS[test['status']]}]{test['status']}[/]"
            self._line("" if number else "certificate", f"{status} {test['name']}: {escape(test['words'])}", markup=True)

    def _line(self, label: str, text: str, *, style: str = "bold", markup: bool = False) -> None:
        console = self._bar.console if self._bar else self.console
        console.print(f"[{style}]{label:11}[/] {text if markup else escape(text)}")

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]training[/]   "),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}  {task.fields[progress]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[stage]}[/]"),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=self._planned_steps, progress="", stage="")
        self._bar.start()

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _stop(self) -> None:
        self._stop_status()
        if self._bar is not None:
            self._bar.update(self._task, stage="")
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()  # an error message must not be drawn over by the bar


class AnsweringBar:
    """Shows how many questions have been answered, while they are."""

    def __init__(self, console: Console, questions: int | None, *, quiet: bool = False) -> None:
        """
        Args:
            questions: How many there are, if that is known.
        """
        self._bar = Progress(
            TextColumn("[bold]{task.description}[/] answers"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}" + ("/{task.total}" if questions is not None else "")),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._questions = questions

    def of(self, model: str) -> Callable[[int], None]:
        """A function to call with the number of questions that this model has answered since the last call."""
        task = self._bar.add_task(model, total=self._questions)
        return lambda count: self._bar.advance(task, count)

    def __enter__(self) -> "AnsweringBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _loss(values: dict[str, Any]) -> str:
    """A loss with its interval, in markup."""
    if values["low"] is None:
        return f"loss {values['loss']:.4f}  [dim](one example)[/]"
    return f"loss {values['loss']:.4f}  [dim](95 % interval {values['low']:.4f} to {values['high']:.4f}, {values['rows']:,} examples)[/]"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _settings(family: type[Choice], facts: dict[str, Any]) -> str:
    """A method or an objective in a line: its sizes, and what differs from the default. The run's recipe.yaml has every key."""
    try:
        defaults = family.member(facts["name"])().plain()
    except RecipeError:  # it has none
        defaults = {}
    shown = [
        f"{key} {_value(value)}"
        for key, value in facts.items()
        if key != "name" and (type(value) is int or value != defaults.get(key))
    ]
    return f"{facts['name']}{': ' if shown else ''}{', '.join(shown)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= 3 else f"{len(value)} names"
    return f"{value:g}" if isinstance(value, float) else str(value)
