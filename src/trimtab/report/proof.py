"""What was looked at before training, for people: on the terminal, and as a page."""

from collections.abc import Sequence
from html import escape as html
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.data import Finding

MARKS = {"good": "[green]good[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}


def proof_table(findings: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> Group:
    """A line for each finding, the histogram of learned tokens, and rows with what is learned of them coloured."""
    lines = [
        Text.from_markup(f"{MARKS[one.status]}{' ' * (9 - len(one.status))}[bold]{one.name:15}[/] {escape(one.words)}")
        for one in findings
    ]
    histogram: dict[str, int] = next((one.facts["histogram"] for one in findings if "histogram" in one.facts), {})
    bars = Table.grid(padding=(0, 2))
    most = max(histogram.values(), default=1)
    for low, count in histogram.items():
        bars.add_row(f"{int(low):>6,}-{2 * int(low) - 1:,}", f"[cyan]{'█' * max(1, round(40 * count / most))}[/] {count:,}")
    parts: list[Any] = [*lines]
    if histogram:
        parts += [Text(), Text.from_markup("[bold]learned tokens a row[/]"), bars]
    if rows:
        parts += [Text(), Text.from_markup("[bold]rows as they are learned[/] ([black on green]learned[/], [dim]only read[/])")]
    for row in rows:
        text = Text(f"{row['where']}{' ' + row['side'] if row['side'] else ''}\n", style="bold")
        for part in row["parts"]:
            text.append(part["text"], style="black on green" if part["learned"] else "dim")
        parts += [text, Text()]
    return Group(*parts)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Trimtab: what will be learned</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ padding: .4rem .8rem .4rem 0; vertical-align: top; border-bottom: 1px solid #e3e8ee; }}
.good {{ color: #17733a; }} .note {{ color: #8a5a00; }} .problem {{ color: #b3261e; font-weight: 600; }}
.bar {{ background: #4a90c2; height: .9rem; display: inline-block; vertical-align: middle; margin-right: .5rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem; border-radius: 6px; color: #5b6875; }}
mark {{ background: #b6e3c1; color: #0d2a16; padding: 0; }}
</style>
<h1>What will be learned</h1>
<table>{findings}</table>
<h2>Learned tokens a row</h2>
<table>{histogram}</table>
<h2>Rows as they are learned</h2>
<p><mark>Learned</mark>, and only read.</p>
{rows}
</html>
"""


def proof_page(findings: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> str:
    """The same as a page that needs nothing else."""
    lines = "".join(
        f'<tr><td class="{one.status}">{one.status}<td><b>{html(one.name)}</b><td>{html(one.words)}' for one in findings
    )
    histogram: dict[str, int] = next((one.facts["histogram"] for one in findings if "histogram" in one.facts), {})
    most = max(histogram.values(), default=1)
    bars = "".join(
        f'<tr><td>{int(low):,}–{2 * int(low) - 1:,}<td><span class="bar" style="width:{24 * count / most:.2f}rem"></span>{count:,}'
        for low, count in histogram.items()
    )
    texts = []
    for row in rows:
        inside = "".join(
            f"<mark>{html(part['text'])}</mark>" if part["learned"] else html(part["text"]) for part in row["parts"]
        )
        texts.append(f"<h3>{html(row['where'])}{' ' + row['side'] if row['side'] else ''}</h3><pre>{inside}</pre>")
    return PAGE.format(findings=lines, histogram=bars, rows="\n".join(texts))
