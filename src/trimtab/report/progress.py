"""A run on the terminal: what is about to happen, a bar while it does, what came of it."""

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
from trimtab.evaluate import Loss
from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.report.tables import memory_words
from trimtab.train import Step

_REFERENCES = {"base": "the base", "start": "the adapter that training starts from"}


def _computed(reference: dict[str, Any]) -> str:
    known = reference["rows"] - reference["computed"]
    return f"{reference['computed']:,} rows computed" + (f", {known:,} known from before" if known else "")


class Terminal:
    """Shows a run on the terminal: what is being done, a bar while it trains; in a log file, lines instead."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._status: Status | None = None
        self._task = TaskID(0)
        self._steps, self._tokens, self._seconds = 0, 0, 0.0
        self._losses: deque[float] = deque(maxlen=1)
        self._first = "base"
        self._begun = set[str]()

    def began(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, doing=what)
        elif self.console.is_terminal:
            if self._status is None:
                self._status = self.console.status("")
                self._status.start()
            self._status.update(f"[dim]{escape(what)} …[/]")
        elif what not in self._begun:
            self._begun.add(what)
            self.console.print(f"[dim]{escape(what)} …[/]")

    def planned(self, facts: dict[str, Any], accounts: list[SourceReport], train_rows: int, eval_rows: int) -> None:
        self._no_status()
        say = self.console.print
        share = facts["trainable_parameters"] / facts["base_parameters"]
        say(f"[bold]base[/]    {escape(facts['base']['source'])}  ({facts['base_parameters']:,} parameters, frozen)")
        say(
            f"[bold]method[/]  {escape(_member(Method, facts['method']))}  ({facts['trainable_parameters']:,} parameters, {share:.2%})"
        )
        if facts["positions"]:
            say(f"          its virtual tokens take {facts['positions']:,} positions of every row's context")
        for account in accounts:
            say(f"[bold]data[/]    {escape(str(account))}")
            for where, reason in account.rejected[:5]:
                say(f"          [yellow]refused[/] {escape(where)}: {escape(reason)}")
            if len(account.rejected) > 5:
                say(f"          … and {len(account.rejected) - 5} more, in data.json")
            if account.ignored_columns:
                say(f"          columns that nothing reads: {escape(', '.join(sorted(account.ignored_columns)))}")
        say(f"          {train_rows:,} rows to learn ({facts['learned_tokens']:,} tokens of answers), {eval_rows:,} held out")
        say(f"[bold]learn[/]   {escape(_member(Objective, facts['objective']))}")
        if facts["start"] is not None or facts["reference"] is not None:
            self._first = "start"
        if (reference := facts["reference"]) is not None:
            say(
                f"          compared with {escape(_REFERENCES.get(reference['kind'], reference['kind']))}: {_computed(reference)}"
            )
        if facts["start"] is not None:
            say(f"          goes on from {escape(facts['start']['folder'])}")
        auto = "" if facts["lr_formula"] == "given" else " (auto)"
        say(
            f"[bold]train[/]   {facts['steps']:,} steps of {facts['rows_per_step']:.3g} rows in {facts['epochs']:g} epochs, "
            f"learning rate {facts['peak_lr']:g}{auto}"
        )
        say(f"          {facts['memory']}")
        self._losses = deque(maxlen=max(1, facts["steps"] // 20))
        if self.console.is_terminal:
            self._start(facts["steps"])

    def noticed(self, words: str) -> None:
        where = self._bar.console if self._bar else self.console
        where.print(f"[bold yellow]note[/]    {escape(words)}")

    def stepped(self, step: Step, steps: int) -> None:
        self._steps += 1
        self._tokens += step.tokens
        self._seconds += step.seconds
        if step.skipped is None:
            self._losses.append(step.loss)
        left = (steps - step.number) * self._seconds / self._steps
        rate = self._tokens / self._seconds
        if self._bar is not None:
            loss = f"{sum(self._losses) / len(self._losses):.4f}" if self._losses else "–"
            said = f"loss {loss}  {rate:,.0f} tokens/s  {_time(left)} left"
            self._bar.update(self._task, completed=step.number, doing="training", said=said)
        elif step.number in (1, steps) or step.number % max(1, steps // 10) == 0:
            self.console.print(
                f"          step {step.number}/{steps}  loss {step.loss:.4f}  {rate:,.0f} tokens/s  {_time(left)} left"
            )

    def evaluated(self, step: int, scored: Loss) -> None:
        low, high = scored.interval
        where = self._bar.console if self._bar else self.console
        what = self._first if step == 0 else f"step {step}"
        beside = "".join(f"  {name.replace('_', ' ')} {value:.3g}" for name, value in scored.measures.items())
        where.print(
            f"[bold]eval[/]    {what}: loss {scored.loss:.4f}  [dim](95 %: {low:.4f} to {high:.4f}, {scored.rows:,} rows)[/]{beside}"
        )

    def finished(self, state: dict[str, Any], folder: Path) -> None:
        self._stop()
        best = state["best"]
        rate = state["tokens"] / state["seconds"]
        self.console.print(
            f"[bold]tokens[/]  {state['tokens']:,} in rows, {state['computed_tokens']:,} computed: "
            "what rows begin with in common once, and nothing after the last token to learn"
        )
        if state.get("memory_held"):
            self.console.print(f"[bold]memory[/]  {memory_words(state['memory_held'])}")
        self.console.print(
            f"[bold]done[/]    {state['seconds']:.0f} s with evaluation, {rate:,.0f} tokens/s. "
            f"Best adapter: step {best['step']}, in {escape(str(folder / 'adapter'))}"
        )

    def certified(self, certificate: dict[str, Any]) -> None:
        self._no_status()
        colors = {"passed": "green", "noted": "yellow", "failed": "red"}
        for number, one in enumerate(certificate["tests"]):
            head = "[bold]proof[/]   " if number == 0 else "        "
            self.console.print(f"{head}[{colors[one['status']]}]{one['status']}[/] {one['name']}: {escape(one['words'])}")

    def _start(self, steps: int) -> None:
        self._bar = Progress(
            TextColumn("[bold]train[/]  "),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}  {task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[doing]}[/]"),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=steps, said="", doing="")
        self._bar.start()

    def _no_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _stop(self) -> None:
        self._no_status()
        if self._bar is not None:
            self._bar.update(self._task, doing="")
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()  # an error message must not be drawn over by the bar


def _time(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Answering:
    """Shows how many questions have been answered, while they are."""

    def __init__(self, console: Console, questions: int, *, quiet: bool = False) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}[/] answers"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
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

    def __enter__(self) -> "Answering":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _member(family: type[Choice], facts: dict[str, Any]) -> str:
    """A method or an objective in a line: its sizes, and what is not as it is by default. The run's recipe.yaml has every key."""
    kind = family.member(facts["name"])
    try:
        usual = kind().plain()
    except RecipeError:  # it has no defaults
        usual = {}
    sizes = {key for key, value in facts.items() if type(value) is int}
    shown = [
        f"{key} {_words(value)}" for key, value in facts.items() if key != "name" and (key in sizes or value != usual.get(key))
    ]
    return f"{facts['name']}{': ' if shown else ''}{', '.join(shown)}"


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= 3 else f"{len(value)} names"
    return f"{value:g}" if isinstance(value, float) else str(value)
