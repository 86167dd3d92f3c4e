"""Scores, answers and folders as tables."""

import json
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trimtab.artifacts import advice, is_adapter, is_run, read_adapter, read_record, standing
from trimtab.artifacts.run_folder import ADAPTER, METRICS, RUN
from trimtab.core.errors import ArtifactError, RecipeError


def scores_table(scores: dict[str, dict[str, Any]], source: str) -> Table:
    """One row a model: loss, perplexity and exact match with their 95 % intervals."""
    rows = next(iter(scores.values()))["rows"]
    table = Table(title=f"{escape(source)}: {rows:,} rows, 95 % intervals", title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("loss", "perplexity", "exact match", "ended by itself"):
        table.add_column(column, justify="right")
    for name, one in scores.items():
        match, stopped = "–", "–"
        if one["exact_match"] is not None:
            match = _with_interval(f"{one['exact_match']:.1%}", *(f"{end:.1%}" for end in one["exact_match_interval"]))
            stopped = f"{one['stopped']:.1%}"
        loss = _with_interval(f"{one['loss']:.4f}", *(f"{end:.4f}" for end in one["loss_interval"]))
        table.add_row(name, loss, f"{one['perplexity']:.3f}", match, stopped)
    if full := [f"{one['cut_by_context']} of {name}" for name, one in scores.items() if one["cut_by_context"]]:
        table.caption = f"answers that were cut off because the model's context was full: {', '.join(full)}"
        table.caption_justify = "left"
    return table


def preferences_table(scores: dict[str, dict[str, Any]], source: str) -> Table:
    """One column a model: the objective's loss, and its measures."""
    first = next(iter(scores.values()))
    table = Table(
        title=f"{escape(source)}: {first['rows']:,} rows, {first['objective']}", title_justify="left", title_style="bold"
    )
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    losses = [(f"{one['loss']:.4f}", *(f"{end:.4f}" for end in one["loss_interval"])) for one in scores.values()]
    table.add_row("loss", *(_with_interval(*loss) for loss in losses))
    for key in [key for key in first if key not in ("objective", "rows", "loss", "loss_interval")]:
        shape = "{:.1%}" if key == "accuracy" else "{:z.3f}"
        table.add_row(key.replace("_", " "), *(shape.format(one[key]) for one in scores.values()))
    return table


def _with_interval(value: str, low: str, high: str) -> str:
    return f"{value}\n[dim]{low} – {high}[/]"


def answers_table(answers: dict[str, list[dict[str, Any]]]) -> Table:
    """Questions, expected answers, and what each model said."""
    names = list(answers)
    table = Table(show_lines=True)
    for column in ("question", "expected", *names):
        table.add_column(column, overflow="fold")
    for several in zip(*answers.values(), strict=True):
        said = [f"[green]{escape(a['answer'])}[/]" if a["right"] else escape(_short(a["answer"])) for a in several]
        table.add_row(escape(_short(several[0]["question"])), escape(several[0]["expected"]), *said)
    return table


def beside_table(answers: dict[str, list[dict[str, Any]]]) -> Table:
    """Prompts, the rows' answers, and what each model said; how long those are in the mean."""
    columns: dict[str, list[dict[str, Any] | None]] = {
        side: [row.get(side) for row in next(iter(answers.values()))] for side in ("chosen", "rejected", "good", "bad")
    }
    columns |= {name: [row["answer"] for row in rows] for name, rows in answers.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lengths = {name: [cell["tokens"] for cell in cells if cell] for name, cells in columns.items()}
    means = ", ".join(f"{name} {sum(several) / len(several):.1f}" for name, several in lengths.items())
    table = Table(title=f"tokens in the mean: {means}", title_justify="left", title_style="", show_lines=True)
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold")
    for row, cells in zip(next(iter(answers.values())), zip(*columns.values(), strict=True), strict=True):
        table.add_row(escape(_short(row["question"])), *(escape(_short(cell["text"], 100)) if cell else "–" for cell in cells))
    return table


def _short(text: str, most: int = 200) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]}…"


def described(folder: Path) -> dict[str, Any]:
    """What is in a run or adapter folder, as JSON data; reading it verifies every hash."""
    if is_run(folder):
        state = read_record(folder)
        if not {"status", "base", "steps", "peak_lr", "lr_formula"} <= state.keys():
            raise ArtifactError(f"{folder / RUN}: is not the record of a run. Restore it from a copy.")
        certificate = {"certificate": asdict(standing(folder)), "held_out": _held_out(folder)}
        return {"run": str(folder), **state, **certificate, **_adapter_facts(folder / ADAPTER)}
    if is_adapter(folder):
        return _adapter_facts(folder)
    raise RecipeError(f"{folder} is neither a run nor an adapter folder." if folder.exists() else f"{folder}: no such folder.")


def _held_out(folder: Path) -> dict[str, float | None]:
    """The loss on held-out rows at first and at its lowest, as the run's log has it; a line that is cut off is none."""
    losses = []
    with suppress(OSError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                one = json.loads(line)
                losses += [(one["step"], one["loss"])] if one["kind"] == "eval" else []
    first = next((loss for step, loss in losses if step == 0), None)
    return {"first": first, "lowest": min((loss for step, loss in losses if step), default=None)}


def _adapter_facts(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        return {}
    adapter = read_adapter(folder)
    return {
        "adapter": {
            "folder": str(folder),
            "verified": adapter.method is not None,
            "base": adapter.source,
            "fingerprint": adapter.base.get("fingerprint"),
            "method": adapter.method
            or {"name": str(adapter.config.get("peft_type", "adapters")).lower(), "peft_config": adapter.config},
            "tensors": len(adapter.tensors),
            "parameters": sum(t.numel() for t in adapter.tensors.values()),
            "trained": adapter.trained,
            "versions": adapter.versions,
        }
    }


def memory_words(held: dict[str, float]) -> str:
    """How much memory training has held, and how far off its plan was."""
    off = held["planned"] / held["measured"] - 1
    beside = f"{abs(off):.0%} {'more' if off > 0 else 'less'}" if round(abs(off), 2) else "as much"
    return f"{held['measured'] / 1e9:.2f} GB at most; {held['planned'] / 1e9:.2f} GB had been planned ({beside})"


def describe(facts: dict[str, Any]) -> RenderableType:
    """`described` as a page."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, words: Any) -> None:
        table.add_row(name, words if isinstance(words, Text) else escape(str(words)))

    if "run" in facts:
        _describe_run(facts, row)
    if adapter := facts.get("adapter"):
        row("adapter", adapter["folder"])
        row(
            "checked",
            "every hash in its manifest" if adapter["verified"] else "no manifest (PEFT's): nothing to check it against",
        )
        row("on base", adapter["base"] or "not said")
        settings = (
            f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in adapter["method"].items()
        )
        row("method", "; ".join(settings).removeprefix("name "))
        row("size", f"{adapter['parameters']:,} parameters in {adapter['tensors']} tensors")
        for part, digest in (adapter["fingerprint"] or {}).items():
            row(f"  {part}", f"sha256 {digest[:16]}…")
        if adapter["versions"]:
            row("made with", ", ".join(f"{name} {version}" for name, version in adapter["versions"].items()))
    if "run" in facts:
        row("next", "\n".join(_next(facts)))
    return Group(table)


def _describe_run(facts: dict[str, Any], row: Callable[[str, Any], None]) -> None:
    how = facts["certificate"]
    color = "green" if how["certified"] else "red" if how["tests"] or facts["status"] == "failed" else "yellow"
    row("run", Text.assemble(f"{facts['run']}: ", (how["words"], color)))
    for one in how["tests"]:
        if one["status"] != "passed" or one["name"] == "gain":
            row(one["name"] if one["status"] == "passed" else f"{one['name']} ({one['status']})", one["words"])
    for words in advice(how["tests"]):
        row("what to do", words)
    first, lowest = facts["held_out"].values()
    if not how["tests"] and lowest is not None:
        row(
            "gain",
            f"on held-out rows the loss is {lowest:.4f}" + (f", and was {first:.4f} at first" if first is not None else ""),
        )
    row("base", facts["base"]["source"])
    row("steps", f"{facts['steps']:,}, learning rate {facts['peak_lr']:g} ({facts['lr_formula']})")
    if facts.get("seconds"):
        row("took", f"{facts['seconds']:.0f} s")
    if facts.get("memory_held"):
        row("memory", memory_words(facts["memory_held"]))
    if facts.get("computed_tokens"):
        row("tokens", f"{facts['tokens']:,} in rows, {facts['computed_tokens']:,} computed")
    for which in ("best", "last"):
        if one := facts.get(which):
            loss = f", eval loss {one['eval_loss']:.4f}" if one["eval_loss"] is not None else ""
            row(which, f"step {one['step']}{loss}, in {one['folder']}")
    if facts.get("error"):
        row("error", facts["error"])


def _next(facts: dict[str, Any]) -> list[str]:
    """The commands that one would go on with."""
    run, done = shlex.quote(facts["run"]), facts["status"] == "done"
    if not done:
        return [f"trimtab train {run}/recipe.yaml", *([f"trimtab eval {run}"] if facts.get("last") else [])]
    look = [f"trimtab eval {run} --base --show 5", f"trimtab chat {run}"]
    return [*look, f"trimtab merge {run} FOLDER"] if facts["certificate"]["certified"] else look
