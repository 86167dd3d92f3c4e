"""What was looked at before training, for people: on the terminal, and as a page."""

from collections.abc import Iterator, Sequence
from html import escape as html
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.data import Finding

MARKS = {"good": "[green]good[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
MOST = 1000
"""Characters at each end of a longer part of a row that the terminal shows; the page shows all."""


def verdict(findings: Sequence[Finding]) -> tuple[str, str]:
    """The worst status, and what it means in a sentence."""
    named = {status: [one.name for one in findings if one.status == status] for status in MARKS}
    problems, notes = named["problem"], named["note"]
    if problems:
        return "problem", f"Not to be trained on as it is: {_counted(problems, 'problem')}."
    if notes:
        return "note", f"Ready to train. Read first: {_counted(notes, 'note')}."
    return "good", f"Ready to train: all {len(findings)} things that were looked at are good."


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({', '.join(dict.fromkeys(names))})"


def proof_table(findings: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> Group:
    """Rows as they are learned, line by line; the histogram of learned tokens; a line for each finding; and the verdict."""
    parts: list[Any] = []
    for row in rows:
        parts += [Text(_name(row), style="bold"), *_lines(row["parts"]), Text()]
    if histogram := _histogram(findings):
        bars = Table.grid(padding=(0, 2))
        for low, count, share in histogram:
            bars.add_row(f"{low:>6,} to {2 * low - 1:,}", f"[cyan]{'█' * max(1, round(40 * share))}[/] {count:,}")
        parts += [Text.from_markup("[bold]Learned tokens a row[/]"), bars, Text()]
    parts += [
        Text.from_markup(f"{MARKS[one.status]}{' ' * (9 - len(one.status))}[bold]{one.name:15}[/] {escape(one.message)}")
        for one in findings
    ]
    status, words = verdict(findings)
    return Group(
        *parts, Text(), Text(words, style={"good": "bold green", "note": "bold yellow", "problem": "bold red"}[status])
    )


def _lines(parts: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """A row's text behind a margin, which says what is learned; `:` where a line of the text goes on, of which a part is learned."""
    goes_on = False
    for part in parts:
        text, learned = part["text"], part["learned"]
        if len(text) > 2 * MOST:
            text = f"{text[:MOST]}\n… {len(text) - 2 * MOST:,} characters …\n{text[-MOST:]}"
        lines = text.removesuffix("\n").split("\n")
        for line in lines[1:] if goes_on and not lines[0] else lines:
            margin = f"{'learned' if learned else '':>7} {':' if goes_on else '|'} "
            yield Text.assemble((margin, "green" if learned else "dim"), (line, "black on green" if learned else "dim"))
            goes_on = False
        goes_on = not text.endswith("\n")


def _name(row: dict[str, Any]) -> str:
    return f"{row['where']}{' ' + row['side'] if row['side'] else ''}"


def _histogram(findings: Sequence[Finding]) -> list[tuple[int, int, float]]:
    """Of each power of two: from how many learned tokens, how many rows have so many, and what part of the most that is."""
    found: dict[str, int] = next((one.facts["histogram"] for one in findings if "histogram" in one.facts), {})
    return [(int(low), count, count / max(found.values())) for low, count in found.items()]


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Trimtab: what will be learned</title>
<style>
:root {{ color-scheme: light dark; --text: #1d2733; --ground: #fff; --soft: #5b6875; --line: #e3e8ee; --box: #f6f8fa;
  --good: #17733a; --note: #8a5a00; --problem: #b3261e; --bar: #4a90c2; --mark: #b6e3c1; --marked: #0d2a16; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e3e8ee; --ground: #12171d; --soft: #9aa7b4; --line: #2b343e; --box: #1b222a;
  --good: #6fd08c; --note: #e8b64c; --problem: #ff8a80; --bar: #4a90c2; --mark: #1f5c33; --marked: #e9fbef; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--ground); }}
h1 {{ margin-bottom: 0; }} .about {{ color: var(--soft); margin-top: .2rem; overflow-wrap: anywhere; }}
.verdict {{ font-size: 1.2rem; font-weight: 600; border-left: .4rem solid; padding: .2rem .8rem; }}
.good {{ color: var(--good); }} .note {{ color: var(--note); }} .problem {{ color: var(--problem); font-weight: 600; }}
.finding {{ display: grid; grid-template-columns: 5rem 8rem 1fr; gap: 0 .8rem; padding: .4rem 0; border-bottom: 1px solid var(--line); }}
.finding span {{ overflow-wrap: anywhere; min-width: 0; }}
@media (max-width: 40rem) {{ .finding {{ grid-template-columns: 5rem 1fr; }} .finding .words {{ grid-column: 1 / -1; }} }}
.rows {{ display: grid; grid-template-columns: max-content 1fr max-content; gap: .2rem .8rem; align-items: center; }}
.bar {{ background: var(--bar); height: .9rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .8rem; border-radius: 6px; color: var(--soft); }}
pre.recipe {{ color: var(--text); }}
mark {{ background: var(--mark); color: var(--marked); font-weight: 600; text-decoration: underline; text-underline-offset: .2em; }}
h3 {{ overflow-wrap: anywhere; }}
</style>
<h1>What will be learned</h1>
<p class="about">{about}</p>
<p class="verdict {status}">{verdict}</p>
{findings}
<h2>Learned tokens a row</h2>
<div class="rows">{histogram}</div>
<h2>Rows as they are learned</h2>
<p><mark>Learned</mark>, and only read.</p>
{rows}
<h2>Recipe</h2>
<pre class="recipe">{recipe}</pre>
</html>
"""


def proof_page(findings: Sequence[Finding], rows: Sequence[dict[str, Any]], about: Sequence[str], recipe: str) -> str:
    """The same as a page that needs nothing else.

    Args:
        about: What was looked at, in short: the recipe's file, the model, the day.
        recipe: The recipe, whole.
    """
    lines = "\n".join(
        f'<div class="finding"><span class="{one.status}">{one.status}</span><b>{html(one.name)}</b>'
        f'<span class="words">{html(one.message)}</span></div>'
        for one in findings
    )
    bars = "\n".join(
        f'<span>{low:,} to {2 * low - 1:,}</span><div><div class="bar" style="width:{max(1, 100 * share):.1f}%"></div></div>'
        f"<span>{count:,}</span>"
        for low, count, share in _histogram(findings)
    )
    texts = []
    for row in rows:
        inside = "".join(
            f"<mark>{html(part['text'])}</mark>" if part["learned"] else html(part["text"]) for part in row["parts"]
        )
        texts.append(f"<h3>{html(_name(row))}</h3><pre>{inside}</pre>")
    status, words = verdict(findings)
    return PAGE.format(
        about=html(" · ".join(about)), status=status, verdict=html(words), findings=lines, histogram=bars, rows="\n".join(texts),
        recipe=html(recipe),
    )  # fmt: skip
