"""A comparison of runs on the terminal."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.report.compared_run import ComparedRun
from trimtab.report.comparison import Comparison, forgetting, metrics
from trimtab.report.text_plot import SHARED, Curve, color_of, letter_of, plot

MOST_PAIRS = 45
"""Verdicts that are shown; --json has all."""


class Curves:
    """The runs' validation losses as a plot, as wide as the terminal."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = curves

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from plot(self.curves, options.max_width, ascii_only=options.ascii_only)


def comparison_page(compared: Comparison) -> Iterator[RenderableType]:
    """The parts of the page, one below the other."""
    yield from _legend(compared.runs)
    yield Text()
    yield _runs_table(compared.runs)
    for title, numbers in groups(compared.runs).items():
        curves = [
            Curve(letter_of(n), color_of(n), [(line["step"], line["loss"]) for line in compared.runs[n].evaluations])
            for n in numbers
        ]
        if any(curve.points for curve in curves):
            shared = f" ({SHARED} several)" if len(curves) > 1 else ""
            yield Text(f"\nvalidation loss, {title}{shared}", style="bold")
            yield Curves(curves)
    yield Text("\nvalidation losses of the best adapters, by examples", style="bold")
    yield from _verdicts(compared)
    if others := [line for line in _measured(compared.runs) if line]:
        yield Text("\nanswers", style="bold")
        yield from others
    yield from _differences("what differs in the recipes", compared.settings, compared.runs)
    yield from _differences("what else differs", compared.facts, compared.runs)
    for run in compared.runs:
        if run.recipe_error is not None:
            yield Text(run.recipe_error, style="yellow")


def groups(runs: Sequence[ComparedRun]) -> dict[str, list[int]]:
    """The runs whose losses mean the same and can share an axis, by what that is."""
    tokenizers = list(dict.fromkeys(run.fingerprint.get("tokenizer") for run in runs))
    found: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        tokens = f", in tokens of {run.record['base']['source']}" if len(tokenizers) > 1 else ""
        same = [title for title, (first, *_) in found.items() if _axis(runs[first]) == _axis(run)]
        found.setdefault(same[0] if same else f"{run.objective}{tokens}", []).append(number)
    return found


def _axis(run: ComparedRun) -> tuple[Any, ...]:
    return run.objective, run.fingerprint.get("tokenizer")


def _legend(runs: Sequence[ComparedRun]) -> Iterator[Text]:
    for number, run in enumerate(runs):
        base, method = run.record["base"]["source"], run.record["method"]["name"]
        yield Text.assemble(
            (f"{letter_of(number)}  ", f"bold {color_of(number)}"),
            (run.name, "bold"),
            (f": {run.status}; {base}, {method}, {run.objective}", "dim"),
        )


def _runs_table(runs: Sequence[ComparedRun]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "loss before", "best", "after step", "tokens", "time", "memory"):
        table.add_column(name, justify="right" if name else "left")
    for number, run in enumerate(runs):
        best, record = run.best, run.record
        held = (record.get("memory_held") or {}).get("measured")
        table.add_row(
            f"[bold {color_of(number)}]{letter_of(number)}[/]",
            f"{run.before:.4f}" if run.before is not None else "–",
            f"{best['loss']:.4f}" if best else "–",
            f"{best['step'] if best else '–'} of {record['steps']:,}",
            f"{record['tokens']:,}" if record.get("tokens") else "–",
            duration(record["seconds"]) if record.get("seconds") else "–",
            f"{held / 1e9:.2f} GB" if held else "–",
        )
    return table


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _verdicts(compared: Comparison) -> Iterator[Text]:
    order = compared.ordered
    for pair in order[:MOST_PAIRS]:
        yield Text(pair.said.en, style="green" if pair.distinguishable else "")
    if len(order) > MOST_PAIRS:
        yield Text(f"… and {len(order) - MOST_PAIRS:,} more pairs: --json has them all", style="dim")
    for refused in compared.refusals:
        yield Text(refused.en, style="yellow")
    for note in compared.notes:
        yield Text(note.en, style="dim")


def _measured(runs: Sequence[ComparedRun]) -> Iterator[RenderableType]:
    """What answers measure, of the runs that have them; nothing if only one has."""
    of_runs = [(run, metrics(run)) for run in runs if metrics(run)]
    names = [name for name in dict.fromkeys(name for _, values in of_runs for name in values) if name != "answers"]
    if len(of_runs) > 1:
        table = Table(box=None, pad_edge=False)
        for name in ("best adapter, on eval.samples", "answers", *names):
            table.add_column(name.replace("_", " "), justify="right" if name in ("answers", *names) else "left")
        for run, values in of_runs:
            table.add_row(escape(run.name), *(f"{values[key]:.4g}" if key in values else "–" for key in ("answers", *names)))
        yield table
    certified = [(run, run.certificate) for run in runs if run.certificate is not None]
    for run, certificate in certified if len(certified) > 1 else ():
        ends = [answer.get("ended") for answer in certificate["answers"]]
        forgotten = forgetting(run)
        told = f"{ends.count('stopped')} of {len(ends)} sampled answers stopped at EOS" if ends else "no answers"
        yield Text(
            f"{run.name}: certificate: {told}" + (f"; loss on general text {forgotten:+.4f}" if forgotten is not None else "")
        )


def _differences(
    title: str, differing: Sequence[tuple[str, list[Any]]], runs: Sequence[ComparedRun]
) -> Iterator[RenderableType]:
    """Keys with their values, and of each the runs that have it."""
    yield Text(f"\n{title}{'' if differing else ': nothing'}", style="bold")
    if not differing:
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for style in ("", "", "dim"):
        table.add_column(style=style, overflow="fold")
    for key, values in differing:
        for number, (value, having) in enumerate(grouped(values, runs)):
            letters = " ".join(letter_of(place) for place, run in enumerate(runs) if run in having)
            table.add_row("" if number else escape(key), escape(value_text(value)), letters)
    yield table


def grouped(values: Sequence[Any], runs: Sequence[ComparedRun]) -> list[tuple[Any, list[ComparedRun]]]:
    """Each value, with the runs that have it."""
    found: list[tuple[Any, list[ComparedRun]]] = []
    for value, run in zip(values, runs, strict=True):
        same = [having for known, having in found if known == value]
        if same:
            same[0].append(run)
        else:
            found.append((value, [run]))
    return found


def value_text(value: Any) -> str:
    """A value of a recipe, for a cell; digests by their beginnings."""
    if value is None:
        return "–"
    text = (
        value
        if isinstance(value, str)
        else f"{value:.6g}"
        if isinstance(value, float)
        else json.dumps(value, ensure_ascii=False)
    )
    return f"{text[:12]}…" if len(text) == 64 and not text.strip("0123456789abcdef") else text
