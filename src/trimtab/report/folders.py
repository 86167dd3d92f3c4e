"""A run or adapter folder: its facts as JSON data, and as a page on the terminal."""

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

from trimtab.artifacts import failure_advice, is_adapter, is_run, read_adapter, read_record, run_status
from trimtab.artifacts.run_folder import ADAPTER, METRICS, REPORT, RUN
from trimtab.core.errors import ArtifactError, RecipeError


def folder_facts(folder: Path) -> dict[str, Any]:
    """What a run or adapter folder contains, as JSON data; reading it verifies every hash."""
    if is_run(folder):
        record = read_record(folder)
        if not {"status", "base", "steps", "peak_lr", "lr_formula"} <= record.keys():
            raise ArtifactError(f"{folder / RUN}: is not the record of a run. Restore it from a copy.")
        certificate = {"certificate": asdict(run_status(folder)), "held_out": _eval_losses(folder)}
        return {"run": str(folder), **record, **certificate, **_adapter_facts(folder / ADAPTER)}
    if is_adapter(folder):
        return _adapter_facts(folder)
    raise RecipeError(f"{folder} is neither a run nor an adapter folder." if folder.exists() else f"{folder}: no such folder.")


def _eval_losses(folder: Path) -> dict[str, float | None]:
    """The loss on held-out examples before training and at its lowest, by the run's metrics; an incomplete line is passed over."""
    losses = []
    with suppress(OSError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                values = json.loads(line)
                losses += [(values["step"], values["loss"])] if values["kind"] == "eval" else []
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


def memory_text(held: dict[str, float]) -> str:
    """How much memory training held at most, and what was planned."""
    error = held["planned"] / held["measured"] - 1
    compared = f"{abs(error):.0%} {'more' if error > 0 else 'less'}" if round(abs(error), 2) else "as much"
    return f"peak {held['measured'] / 1e9:.2f} GB; {held['planned'] / 1e9:.2f} GB planned ({compared})"


def folder_page(facts: dict[str, Any]) -> RenderableType:
    """`folder_facts` as a page."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, text: Any) -> None:
        table.add_row(name, text if isinstance(text, Text) else escape(str(text)))

    if "run" in facts:
        _add_run(facts, row)
    if adapter := facts.get("adapter"):
        row("adapter", adapter["folder"])
        verified = "every hash in its manifest" if adapter["verified"] else "no manifest (PEFT's): nothing to verify it against"
        row("verified", verified)
        row("base model", adapter["base"] or "not recorded")
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
        row("next", "\n".join(_next_commands(facts)))
        if (report := Path(facts["run"]) / REPORT).is_file():
            row("report", report)
    return Group(table)


def _add_run(facts: dict[str, Any], row: Callable[[str, Any], None]) -> None:
    state = facts["certificate"]
    color = "green" if state["certified"] else "red" if state["tests"] or facts["status"] == "failed" else "yellow"
    row("run", Text.assemble(f"{facts['run']}: ", (state["words"], color)))
    for test in state["tests"]:
        if test["status"] != "passed" or test["name"] == "gain":
            row(test["name"] if test["status"] == "passed" else f"{test['name']} ({test['status']})", test["words"])
    for text in failure_advice(state["tests"]):
        row("what to do", text)
    first, lowest = facts["held_out"].values()
    if not state["tests"] and lowest is not None:
        before = f"; before training it was {first:.4f}" if first is not None else ""
        row("gain", f"lowest loss on held-out examples: {lowest:.4f}{before}")
    row("base model", facts["base"]["source"])
    row("steps", f"{facts['steps']:,}, learning rate {facts['peak_lr']:g} ({facts['lr_formula']})")
    if facts.get("stopped"):
        row("stopped", facts["stopped"].removeprefix("stopped "))
    if facts.get("seconds"):
        row("took", f"{facts['seconds']:.0f} s")
    if facts.get("memory_held"):
        row("memory", memory_text(facts["memory_held"]))
    if facts.get("computed_tokens"):
        row("tokens", f"{facts['tokens']:,}, {facts['computed_tokens']:,} processed")
    for name in ("best", "last"):
        if saved := facts.get(name):
            loss = f", eval loss {saved['eval_loss']:.4f}" if saved["eval_loss"] is not None else ""
            row(name, f"step {saved['step']}{loss}, in {saved['folder']}")
    if facts.get("error"):
        row("error", facts["error"])


def _next_commands(facts: dict[str, Any]) -> list[str]:
    run, done = shlex.quote(facts["run"]), facts["status"] == "done"
    if not done:
        return [f"trimtab train {run}/recipe.yaml", *([f"trimtab eval {run}"] if facts.get("last") else [])]
    look = [f"trimtab eval {run} --base --show 5", f"trimtab chat {run}"]
    return [*look, f"trimtab merge {run} FOLDER"] if facts["certificate"]["certified"] else look
