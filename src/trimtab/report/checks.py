"""The checks before training and the tokenized examples on the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.data import Finding

MARKS = {"good": "[green]good[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
SHOWN = 1000
"""Characters at each end of a longer text that the terminal shows; the page shows all."""


def verdict(findings: Sequence[Finding]) -> tuple[str, str]:
    """The worst status, and what it means in a sentence."""
    named = {status: [finding.name for finding in findings if finding.status == status] for status in MARKS}
    problems, notes = named["problem"], named["note"]
    if problems:
        return "problem", f"Not ready to train: {_counted(problems, 'problem')}."
    if notes:
        return "note", f"Ready to train. Please read: {_counted(notes, 'note')}."
    return "good", f"Ready to train: all {len(findings)} checks are good."


def _counted(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({', '.join(dict.fromkeys(names))})"


def checks_table(findings: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> Group:
    """Examples line by line, with their target tokens marked; a histogram of target tokens; a line for each check; and the verdict."""
    parts: list[Any] = []
    for row in rows:
        parts += [Text(place_of(row), style="bold"), *_lines(row["parts"]), Text()]
    if counts := histogram(findings):
        bars = Table.grid(padding=(0, 2))
        for low, count, share in counts:
            bars.add_row(f"{low:>6,} to {2 * low - 1:,}", f"[cyan]{'█' * max(1, round(40 * share))}[/] {count:,}")
        parts += [Text.from_markup("[bold]Target tokens per example[/]"), bars, Text()]
    parts += [
        Text.from_markup(
            f"{MARKS[finding.status]}{' ' * (9 - len(finding.status))}[bold]{finding.name:15}[/] {escape(finding.message)}"
        )
        for finding in findings
    ]
    status, sentence = verdict(findings)
    return Group(
        *parts, Text(), Text(sentence, style={"good": "bold green", "note": "bold yellow", "problem": "bold red"}[status])
    )


def _lines(parts: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """An example's text behind a margin that marks target tokens, or has their weight if it isn't 1; `:` where a line of the text continues
    with another marking."""
    continues = False
    for part in parts:
        text, target = part["text"], part["learned"]
        mark = "" if not target else "target" if part["weight"] == 1 else f"×{part['weight']:.4g}"
        if len(text) > 2 * SHOWN:
            text = f"{text[:SHOWN]}\n… {len(text) - 2 * SHOWN:,} characters …\n{text[-SHOWN:]}"
        lines = text.removesuffix("\n").split("\n")
        for line in lines[1:] if continues and not lines[0] else lines:
            margin = f"{mark:>6} {':' if continues else '|'} "
            yield Text.assemble((margin, "green" if target else "dim"), (line, "black on green" if target else "dim"))
            continues = False
        continues = not text.endswith("\n")


def place_of(row: dict[str, Any]) -> str:
    """Where an example is from, and which of a pair's answers it has."""
    return f"{row['where']}{' ' + row['side'] if row['side'] else ''}"


def histogram(findings: Sequence[Finding]) -> list[tuple[int, int, float]]:
    """By powers of two of target tokens: from how many, how many examples have so many, and their share of the largest count."""
    counts: dict[str, int] = next((finding.facts["histogram"] for finding in findings if "histogram" in finding.facts), {})
    return [(int(low), count, count / max(counts.values())) for low, count in counts.items()]
