"""docs/models.md, from the results that are kept in docs/measured/models.json."""

import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.lines import LINES

Result = dict[str, Any]
HEAD = """# Models

Which models Trimtab supports, and how exactly: measured on every class that Transformers {transformers} registers as a causal language
model or as one that reads images and text, each as a tiny random model of 4 to 6 layers, and on variants with what is off by default.
`make models` measures it again, {measures} measures a model, in float32 on a CPU. `make docs` generates this page from the results.

A model's windows, chunks, blocks and top-k are 8 tokens or fewer, and the rows have up to 75, so that they exceed all of them. Everything
is compared with an untouched copy that plain Transformers runs row by row: log-probabilities of packed rows (flat, and as a tree of shared
beginnings), gradients, the loss of each training step, tokens generated from a cache, the model's own passes with an adapter that is
switched off (bit for bit), merged models as Transformers loads them, and the gradient from a row to another, which has to be exactly 0.
*Exact* means that nothing deviates by more than 1e-4 (of gradients, 1e-3 of the largest; of logits in each step of generation, 5e-4 of the
largest); *exact by hand*, that Trimtab's fused operations compute attention or MLPs of it. *Refused* means an error that says why. Random
weights prove the arithmetic, not that a checkpoint of a real size fits into memory or loads quickly; images are never read.

"""
NUMBERS = re.compile(r"(?<= )-?\d+\.\d+|(?<=example )\d")
"""In reasons: those of single models."""
SHORT, LONGEST = 100, 400
"""Characters of a reason in the table of lines, and of one that is kept."""


def keep(results: dict[str, Result], path: Path) -> None:
    """Write results, all at once: a file that is half written is never seen."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    kept = {"versions": versions, "models": {name: _rounded(result) for name, result in results.items()}}
    fresh = path.with_suffix(".new")
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(result, ensure_ascii=False)}" for name, result in kept["models"].items()
    )
    fresh.write_text(f'{{"versions": {json.dumps(versions)},\n "models": {{\n{lines}\n}}}}\n', encoding="utf-8")
    fresh.replace(path)


def _rounded(value: Any) -> Any:
    """A result without what changes from run to run (seconds, all but a number's first two digits), its texts cut."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items() if key != "seconds"}
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]} …"
    return float(f"{value:.1e}") if isinstance(value, float) else value


def page(kept: dict[str, Any]) -> str:
    """docs/models.md, all of it."""
    from models.measures import MEASURES

    models: dict[str, Result] = kept["models"]
    parts = [HEAD.format(transformers=kept["versions"]["transformers"], measures=len(MEASURES)), _counts(models.values()), "\n"]
    parts += ["## What people fine-tune in 2026\n\n", lines_table(models)]
    for title, statuses in (
        ("Exact", ("exact by hand", "exact")), ("Wrong, or ends with an unclear error", ("WRONG", "crash")), ("Refused", ("refused",)),
        ("Not measured", ("unbuilt",)),
    ):  # fmt: skip
        chosen = {name: result for name, result in sorted(models.items()) if result["status"] in statuses}
        if chosen:
            table = models_table if title == "Exact" else reasons_table
            parts.append(f"\n## {title}\n\n{_about(title)}{table(chosen)}")
    return "".join(parts)


def _counts(results: Iterable[Result]) -> str:
    statuses = [result["status"] for result in results]
    words = {
        "exact by hand": "exact by hand", "exact": "exact", "refused": "refused with a reason", "WRONG": "silently wrong",
        "crash": "end with an unclear error", "unbuilt": "could not be built or run on text here",
    }  # fmt: skip
    return (
        f"Of {len(statuses)} models: " + ", ".join(f"**{statuses.count(key)}** {word}" for key, word in words.items()) + ".\n"
    )


def _about(title: str) -> str:
    return {
        "Exact": (
            "`vl:` marks a class that reads images, `!` a variant. By hand: the parts of decoder layers that fused operations compute. "
            "Default LoRA: which weights of the text model `targets: all-linear` leaves as they are; or that it is refused, and `attention` "
            "adapts the attention alone. PEFT: whether it loads the saved LoRA, to the same log-probabilities; – where it loads its own "
            "adapters of the model wrongly, or not at all. Last: the largest deviation.\n\n"
        ),
        "Not measured": "These do not run on text by plain Transformers, or not with what is installed here.\n\n",
    }.get(title, "")


def lines_table(models: dict[str, Result]) -> str:
    """Each line of models, by its cases."""
    rows, by_name, default = [], 0, 0
    for number, (line, cases) in enumerate(LINES.items(), start=1):
        known = [case for case in cases if case in models]
        for place, case in enumerate(known):
            result = models[case]
            cells = (number, line) if place == 0 else ("", "")
            named, lora = _is_named(result), _has_default_lora(result)
            by_name += named and place == 0
            default += named and lora and place == 0
            shown = (
                f"`{case}`",
                result["status"],
                _yes(named),
                _lora(result),
                _yes(_holds(result, "prefix")),
                _in_the_way(result),
            )
            rows.append(f"| {' | '.join(map(str, (*cells, *shown)))} |")
    head = (
        f"Of {len(LINES)} lines, {by_name} can be trained by name, {default} of them with LoRA's default: counted by the first case of each. "
        "*By name*: a folder or hub name in a recipe, or in `trimtab.load`.\n\n"
        "| | line | case | | by name | default LoRA | prefix | in the way |\n|--:|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _is_named(result: Result) -> bool:
    """Whether it can be trained by name."""
    return result["status"].startswith("exact") and _holds(result, "by name")


def _has_default_lora(result: Result) -> bool:
    return result["status"].startswith("exact") and result.get("lora", {}).get("targets") == "all-linear"


def _holds(result: Result, measure: str) -> bool:
    """Whether Trimtab does this, and exactly."""
    from models.measures import MEASURES

    return result.get("measured", {}).get(measure, {}).get("deviation", float("inf")) <= MEASURES[measure].tolerance


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _does(result: Result, measure: str) -> str:
    """Whether Trimtab does this, and exactly; – where there is nothing to compare with."""
    return "–" if "left out" in result["measured"].get(measure, {}) else _yes(_holds(result, measure))


def _lora(result: Result) -> str:
    """What the default LoRA does to this model."""
    facts = result.get("lora")
    if facts is None or not result["status"].startswith("exact"):
        return "–"
    if facts["targets"] != "all-linear":
        return "refused; `attention`"
    left = ", ".join(f"{name.removesuffix('.weight')}" for name in facts["left"])
    return f"yes, except {left}" if left else "yes"


def _in_the_way(result: Result) -> str:
    """The reason of a refusal; of an exact model, the first thing that it is refused."""
    if result["status"] not in ("exact", "exact by hand"):
        return _text(result["reason"], SHORT)
    if "limit" in result:
        return f"takes rows of up to {result['limit']} tokens: as many as its indexer chooses, which is {result['limit']} here"
    for name in ("by name", "prefix", "merge", "generated"):
        if refused := result["measured"].get(name, {}).get("refused"):
            return f"{name}: {_text(refused, SHORT)}"
    return ""


def models_table(models: dict[str, Result]) -> str:
    """One line a model that is supported."""
    lines = [
        "| model | class | by hand | by name | default LoRA | merge | PEFT | prefix | bottleneck | deviation |",
        "|---|---|---|---|---|---|---|---|---|--:|",
    ]
    for name, result in models.items():
        deviations = [measure["deviation"] for measure in result["measured"].values() if "deviation" in measure]
        cells = [
            f"`{name}`", result["class"], _by_hand(result), _yes(_holds(result, "by name")), _lora(result),
            *(_does(result, measure) for measure in ("merge", "PEFT", "prefix", "bottleneck")), f"{max(deviations):.0e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _by_hand(result: Result) -> str:
    """The parts of its layers that fused operations compute."""
    names = dict.fromkeys("norms" if "norm" in part else part for part in result["by_hand"])
    return ", ".join(sorted(names)) or "no"


def reasons_table(models: dict[str, Result]) -> str:
    """Models by the reason why not, the name of their class aside."""
    by_reason: dict[str, list[str]] = {}
    for name, result in models.items():
        reason = NUMBERS.sub("…", result["reason"].replace(result["class"], "The model"))
        by_reason.setdefault(_text(reason, 300), []).append(f"`{name}`")
    lines = [
        f"| {', '.join(names)} | {reason} |" for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return "| models | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _text(reason: str, most: int) -> str:
    """The first line of a reason, for a cell."""
    line = next(iter(reason.splitlines()), "").replace("|", r"\|")
    return line if len(line) <= most else f"{line[:most].rsplit(' ', 1)[0]} …"
