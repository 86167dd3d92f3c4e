"""The checks before training and the tokenized examples: on the terminal, and as an HTML page."""

from collections.abc import Iterator, Sequence
from html import escape as html
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
        parts += [Text(_name(row), style="bold"), *_lines(row["parts"]), Text()]
    if histogram := _histogram(findings):
        bars = Table.grid(padding=(0, 2))
        for low, count, share in histogram:
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


def _name(row: dict[str, Any]) -> str:
    return f"{row['where']}{' ' + row['side'] if row['side'] else ''}"


def _histogram(findings: Sequence[Finding]) -> list[tuple[int, int, float]]:
    """By powers of two of target tokens: from how many, how many examples have so many, and their share of the largest count."""
    counts: dict[str, int] = next((finding.facts["histogram"] for finding in findings if "histogram" in finding.facts), {})
    return [(int(low), count, count / max(counts.values())) for low, count in counts.items()]


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Trimtab: data check</title>
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
mark sup {{ font-weight: 400; }}
h3 {{ overflow-wrap: anywhere; }}
</style>
<h1>Data check</h1>
<p class="about">{about}</p>
<p class="verdict {status}">{verdict}</p>
{findings}
<h2>Target tokens per example</h2>
<div class="rows">{histogram}</div>
<h2>Tokenized examples</h2>
<p><mark>Target tokens</mark> are trained on, with their weight in the loss where it isn't 1; the rest is context.</p>
{rows}
<h2>Recipe</h2>
<pre class="recipe">{recipe}</pre>
</html>
"""


def _mark(part: dict[str, Any]) -> str:
    """The opening tag of target tokens, with their weight if it isn't 1."""
    weight = part["weight"]
    return "<mark>" if weight == 1 else f'<mark style="opacity: {min(1.0, 0.4 + 0.6 * weight):.2f}"><sup>×{weight:.4g}</sup>'


def checks_page(findings: Sequence[Finding], rows: Sequence[dict[str, Any]], about: Sequence[str], recipe: str) -> str:
    """The same as one self-contained HTML page.

    Args:
        about: What was checked: the recipe's file, the model, the date.
        recipe: The whole recipe, as YAML.
    """
    lines = "\n".join(
        f'<div class="finding"><span class="{finding.status}">{finding.status}</span><b>{html(finding.name)}</b>'
        f'<span class="words">{html(finding.message)}</span></div>'
        for finding in findings
    )
    bars = "\n".join(
        f'<span>{low:,} to {2 * low - 1:,}</span><div><div class="bar" style="width:{max(1, 100 * share):.1f}%"></div></div>'
        f"<span>{count:,}</span>"
        for low, count, share in _histogram(findings)
    )
    texts = []
    for row in rows:
        inside = "".join(
            f"{_mark(part)}{html(part['text'])}</mark>" if part["learned"] else html(part["text"]) for part in row["parts"]
        )
        texts.append(f"<h3>{html(_name(row))}</h3><pre>{inside}</pre>")
    status, sentence = verdict(findings)
    return PAGE.format(
        about=html(" · ".join(about)), status=status, verdict=html(sentence), findings=lines, histogram=bars, rows="\n".join(texts),
        recipe=html(recipe),
    )  # fmt: skip
