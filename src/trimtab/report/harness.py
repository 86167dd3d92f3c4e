"""Results of lm-evaluation-harness as a table."""

from typing import Any

from rich.markup import escape
from rich.table import Table

Z = 1.96


def harness_table(results: dict[str, Any]) -> Table:
    """A row for each metric of each task: what each model has, and by how much the adapter differs, with 95 % intervals."""
    models = list(results["tasks"][0]["metrics"][0]["values"]) if results["tasks"] else []
    limited = f", the first {results['limit']:,} documents of each" if results["limit"] is not None else ""
    chat = ", with the chat template" if results["chat_template"] else ""
    title = f"lm-evaluation-harness {results['harness']}{limited}{chat}, 95 % intervals"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in (*models, *(["difference"] if len(models) > 1 else [])):
        table.add_column(column, justify="right")
    for task in results["tasks"]:
        shots = f"\n[dim]{task['fewshot']}-shot, {task['documents']:,}[/]" if task["documents"] is not None else ""
        for number, metric in enumerate(task["metrics"]):
            arrow = {True: " ↑", False: " ↓"}.get(metric["higher_is_better"], "")
            filtered = f", {metric['filter']}" if metric["filter"] != "none" else ""
            cells = [_value(metric["values"][model], metric["errors"][model]) for model in models]
            if len(models) > 1:
                cells.append(_difference(metric))
            first = f"{escape(task['task'])}{shots}" if number == 0 else ""
            table.add_row(first, f"{escape(metric['metric'])}{escape(filtered)}{arrow}", *cells)
    if results["truncated"]:
        table.caption = f"{results['truncated']:,} prompts longer than the context were cut on the left, as the harness asks"
        table.caption_justify = "left"
    return table


def _value(value: Any, error: float | None) -> str:
    if not isinstance(value, int | float):
        return escape(str(value))
    return f"{value:.4f}" + (f"\n[dim]± {Z * error:.4f}[/]" if error is not None else "")


def _difference(metric: dict[str, Any]) -> str:
    if "difference" not in metric:
        return "–"
    low, high = metric["interval"]
    return f"{metric['difference']:+.4f}\n[dim]{low:+.4f} – {high:+.4f}[/]"
