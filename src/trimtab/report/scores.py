"""Scores and answers as tables."""

from typing import Any

from rich.markup import escape
from rich.table import Table


def scores_table(scores: dict[str, dict[str, Any]], source: str, difference: dict[str, dict[str, Any]] | None = None) -> Table:
    """One column a model: its loss, perplexity and metrics with their 95 % intervals; and how far the second is from the first.

    Args:
        difference: By name, that of the models, if there are two.
    """
    first, difference = next(iter(scores.values())), difference or {}
    table = Table(
        title=f"{escape(source)}: {first['rows']:,} examples, 95 % intervals", title_justify="left", title_style="bold"
    )
    for column in ("", *scores, *(["difference"] if difference else [])):
        table.add_column(column, justify="right" if column else "left")
    metrics = {name: best for score in scores.values() for name, best in score["metrics"].items()}
    for name, number in {"loss": "{:.4f}", **{name: _format_of(best) for name, best in metrics.items()}}.items():
        cells = [
            _with_interval(number.format(score[name]), *map(number.format, score[f"{name}_interval"])) if name in score else "–"
            for score in scores.values()
        ]
        if name in difference:
            cells.append(_difference(difference[name], number))
        table.add_row(name.replace("_", " "), *cells)
        if name == "loss":
            for part, of_first in first.get("sources", {}).items():
                parts = (score["sources"][part] for score in scores.values())
                table.add_row(f"[dim]{part}, {of_first['rows']:,}[/]", *map(_loss_of, parts))
            table.add_row("perplexity", *(f"{score['perplexity']:.3f}" for score in scores.values()))
    if any(score["answers"] for score in scores.values()):
        table.add_row("stopped at EOS", *(f"{score['stopped']:.1%}" for score in scores.values()))
    if full := [f"{score['cut_by_context']} of {name}" for name, score in scores.items() if score["cut_by_context"]]:
        table.caption = f"answers cut off because the model's context was full: {', '.join(full)}"
        table.caption_justify = "left"
    return table


def _format_of(best: float | None) -> str:
    """How a metric is written: in percent if it is 1 at best."""
    return "{:.1%}" if best == 1.0 else "{:.2f}" if best is not None else "{:.4g}"


def _difference(found: dict[str, Any], number: str) -> str:
    """A difference with its interval; or that the models can't be told apart by this many examples."""
    signed = number.replace(":", ":+")
    text = _with_interval(signed.format(found["value"]), *map(signed.format, found["interval"]))
    return text if found["distinguishable"] else f"{text}\n[dim]not distinguishable\n(p {found['p']:.2f})[/]"


def preferences_table(scores: dict[str, dict[str, Any]], source: str) -> Table:
    """One column a model: the objective's loss, and its measures."""
    first = next(iter(scores.values()))
    table = Table(
        title=f"{escape(source)}: {first['rows']:,} examples, {first['objective']}", title_justify="left", title_style="bold"
    )
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    losses = [(f"{score['loss']:.4f}", *(f"{end:.4f}" for end in score["loss_interval"])) for score in scores.values()]
    table.add_row("loss", *(_with_interval(*loss) for loss in losses))
    for source, part in first.get("sources", {}).items():
        table.add_row(f"[dim]{source}, {part['rows']:,}[/]", *(_loss_of(score["sources"][source]) for score in scores.values()))
    for key in [key for key in first if key not in ("objective", "rows", "loss", "loss_interval", "sources")]:
        number = "{:.1%}" if key == "accuracy" else "{:z.3f}"
        table.add_row(key.replace("_", " "), *(number.format(score[key]) for score in scores.values()))
    return table


def _loss_of(part: dict[str, Any]) -> str:
    if part["low"] is None:
        return f"{part['loss']:.4f}"
    return _with_interval(*(f"{part[key]:.4f}" for key in ("loss", "low", "high")))


def _with_interval(value: str, low: str, high: str) -> str:
    return f"{value}\n[dim]{low} – {high}[/]"


def answers_table(answers: dict[str, list[dict[str, Any]]]) -> Table:
    """Questions, expected answers, and each model's."""
    names = list(answers)
    table = Table(show_lines=True)
    for column in ("question", "expected", *names):
        table.add_column(column, overflow="fold")
    for row in zip(*answers.values(), strict=True):
        cells = [f"[green]{escape(a['answer'])}[/]" if a["right"] else escape(short(a["answer"])) for a in row]
        table.add_row(escape(short(row[0]["question"])), escape(row[0]["expected"]), *cells)
    return table


def compared_answers_table(answers: dict[str, list[dict[str, Any]]]) -> Table:
    """Prompts, the examples' answers, and what each model answered; the title has their average lengths."""
    columns: dict[str, list[dict[str, Any] | None]] = {
        side: [row.get(side) for row in next(iter(answers.values()))] for side in ("chosen", "rejected", "good", "bad")
    }
    columns |= {name: [row["answer"] for row in rows] for name, rows in answers.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lengths = {name: [cell["tokens"] for cell in cells if cell] for name, cells in columns.items()}
    means = ", ".join(f"{name} {sum(counts) / len(counts):.1f}" for name, counts in lengths.items())
    table = Table(title=f"tokens on average: {means}", title_justify="left", title_style="", show_lines=True)
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold")
    for row, cells in zip(next(iter(answers.values())), zip(*columns.values(), strict=True), strict=True):
        table.add_row(escape(short(row["question"])), *(escape(short(cell["text"], 100)) if cell else "–" for cell in cells))
    return table


def short(text: str, most: int = 200) -> str:
    """The beginning of a text, for a cell or a line."""
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]}…"
