"""Generate the pages and tables that follow from the code and from measurements: python docs/make_pages.py. A test checks that they are current.

docs/recipe.md comes from the recipe's own declarations, the tree in README.md from the files' first lines, the tables in
docs/methods.md from the methods, from docs/methods.json, which benchmarks/methods.py measures, and from docs/measured/regret.jsonl,
which benchmarks/regret.py measures, and those in
docs/performance.md from docs/measured, which benchmarks/peers (`trimtab bench`) and the scripts in benchmarks fill; those in
docs/preference.md from docs/preference.json, which benchmarks/preference.py measures; docs/faults.md from tests/fault_catalogue.py
and from docs/measured/peer_faults.json, which benchmarks/peer_faults measures; docs/models.md from docs/measured/models.json, which
benchmarks/models measures; the tables in docs/gpu.md from what the back ends say that they take; those in docs/scale.md from what
benchmarks/scale.py computes and docs/measured/scale.json, which it measures; docs/migration.md from the options of
other tools, which benchmarks/options.py reads, and the table of what they are here.
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_origin
from unittest.mock import patch

import torch
import transformers
from pydantic import BaseModel

from trimtab.core.config import Choice
from trimtab.data import DataConfig, Source
from trimtab.methods import Method
from trimtab.report.methods import methods_facts
from trimtab.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "recipe.md", ROOT / "README.md"
METHODS, MEASURED = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.json"
PERFORMANCE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "measured"
FAULTS = ROOT / "docs" / "faults.md"
TEMPLATES = ROOT / "docs" / "templates.md"
MODELS = ROOT / "docs" / "models.md"
GPU = ROOT / "docs" / "gpu.md"
SCALE = ROOT / "docs" / "scale.md"
OPTIONS = ROOT / "src" / "trimtab" / "migrate" / "options"
MIGRATION, USAGE = ROOT / "docs" / "migration.md", ROOT / "tests" / "fixtures" / "other_tools" / "usage.json"
PREFERENCE, COMPARED = ROOT / "docs" / "preference.md", ROOT / "docs" / "preference.json"
FLOORS = (
    ("the command line", ("cli.py", "commands", "__main__.py", "__init__.py")),
    ("the Python interface; other tools' files as recipes", ("api.py", "migrate")),
    ("one run, top to bottom", ("run",)),
    (
        "certificate, reports, trackers; several processes: engines, launchers",
        ("certify", "report", "track", "distributed", "launch"),
    ),
    ("the training loop, evaluation, and a tiny base for trials", ("train", "evaluate", "testing")),
    ("objectives, one short file each; adapters on disk, merging", ("objectives", "deploy")),
    ("the engine: passes, attention, decoding, memory", ("engine",)),
    ("base model, methods, data and files: they do not import each other", ("base", "methods", "data", "artifacts")),
    ("the foundation", ("core",)),
)
HEAD = """# The recipe

A recipe is one YAML file with everything that decides a run's result. The run keeps a copy with every default written out, which repeats
it. Unknown keys, wrong types and values out of range are refused. On the command line, `trimtab train RECIPE.yaml section.key=value …`
overrides any key. Relative paths are relative to the current directory. Terms are in the [glossary](glossary.md). `docs/make_pages.py`
generates this page from the code.

"""


def tree() -> str:
    """The files of src/trimtab, the highest floor first, each with the first line of its docstring."""
    source, lines = ROOT / "src" / "trimtab", []
    for number, (title, names) in reversed(list(enumerate(reversed(FLOORS)))):
        lines.append(f"{number}  {title}")
        for name in names:
            files = [source / name] if name.endswith(".py") else sorted((source / name).rglob("*.py"))
            for file in files:
                if file.name == "__init__.py" and file.parent != source:
                    continue
                summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")
                lines.append(f"   {file.relative_to(source).as_posix():22} {summary}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def readme() -> str:
    """README.md with a current tree."""
    return _filled(README.read_text(encoding="utf-8"), "tree", tree())


def methods() -> str:
    """docs/methods.md with current tables."""
    page = METHODS.read_text(encoding="utf-8")
    tables = {"methods": methods_table(), "measured": measured_table(), "search": search_table(), "regret": regret_table()}
    for name, table in tables.items():
        page = _filled(page, name, table)
    return page


def _filled(page: str, name: str, content: str) -> str:
    """A page with new content between two marks."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->\n")
    return f"{before}<!-- {name} -->\n{content}<!-- end of {name} -->\n{after}"


def methods_table() -> str:
    """What each method would train on a model of SmolLM2-135M's sizes."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(_smollm2())
    lines = [
        "| method | | parameters | merges | positions | starts as the base | objectives | PEFT |",
        "|---|---|--:|---|--:|---|---|---|",
    ]
    for facts in methods_facts(model):
        parameters = f"{facts['parameters']:,}" if facts["parameters"] is not None else facts["refused"].rstrip(".")
        merges, identity = ("yes" if facts[key] else "no" for key in ("mergeable", "identity_at_init"))
        objectives = ", ".join(facts["objectives"])
        lines.append(
            f"| `{facts['name']}` | {facts['summary']} | {parameters} | {merges} | {facts['positions'] or '–'} | {identity} | {objectives} "
            f"| {facts['peft'] or '–'} |"
        )
    return "\n".join(lines) + "\n"


def _smollm2() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip


def regret_table() -> str:
    """Today's defaults beside the best of what benchmarks/regret.py tried in their place."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from regret import results, table

    return table(results(), _smollm2())


def measured_table() -> str:
    """What benchmarks/methods.py measured: the cost, then each task, one line per method."""
    measured = sorted(_measured("measured").items())
    lines = ["**Cost**\n", "| method | parameters | learning rate | tokens/s | peak memory |", "|---|--:|--:|--:|--:|"]
    for method, tasks in measured:
        if "error" not in tasks.get("demo", {"error": ""}) and "error" not in tasks.get("speed", {"error": ""}):
            result = tasks["demo"] | tasks["speed"]
            cost = f"{result['tokens_per_s']:.0f} | {result['peak_gb']:.2f} GB"
            lines.append(f"| `{method}` | {result['parameters']:,} | {result['lr']:g} | {cost} |")
    for task, title in (("demo", "The demo's task"), ("nl2cmd", "nl2cmd")):
        lines += [
            f"\n**{title}**\n",
            "| method | validation loss | test loss | exact match | stopped at EOS |",
            "|---|--:|---|---|--:|",
        ]
        lines += [_line(method, tasks[task]) for method, tasks in measured if task in tasks]
    return "\n".join(lines) + "\n\n"


def search_table() -> str:
    """The validation loss after half an epoch of the demo's task, for each learning rate that was tried."""
    lines = ["| method | learning rate: validation loss |", "|---|---|"]
    for method, runs in sorted(_measured("search").items()):
        losses = {rate: run.get("held_out_loss") for rate, run in sorted(runs.items(), key=lambda pair: float(pair[0]))}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        shown = [
            f"{rate}: {'diverged' if loss is None else f'**{loss:.3f}**' if loss == best else f'{loss:.3f}'}"
            for rate, loss in losses.items()
        ]
        lines.append(f"| `{method}` | {' · '.join(shown)} |")
    return "\n".join(lines) + "\n"


def performance() -> str:
    """docs/performance.md with current tables."""
    text = PERFORMANCE.read_text(encoding="utf-8")
    tables = {"all-linear": bench_table("all-linear"), "q-v": bench_table("q-v"), "ablation": ablation_table()}
    tables |= {"startup": startup_table(), "guards": guards_table(), "memory": memory_table(), "waiting": waiting_table()}
    for name, table in (tables | {kind: scaling_table(kind) for kind in SCALES}).items():
        text = _filled(text, name, table)
    return text


def bench_table(targets: str) -> str:
    """Medians that `trimtab bench --output docs/measured/TARGETS` measured."""
    results = RESULTS / targets / "results.json"
    if not results.exists():
        return "Not measured yet.\n"
    lines = [
        "| | tokens/s | peak memory | of the floor | Trimtab is | memory | difference of losses |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in json.loads(results.read_text(encoding="utf-8")):
        cells = f"| {result['trainer']} | {result['tokens_per_s']:.0f} | {result['peak_rss_gb']:.2f} GB | {result['gemm_floor_fraction']:.0%} | "
        pairs = ", ".join(f"{pair:.2f}" for pair in result["pairs"])
        apart = "–" if result["loss_distance"] is None else f"{result['loss_distance']:.0e}"
        comparison = f"{result['trimtab_is_faster']:.2f}x ({pairs}) | {result['trimtab_memory']:.2f} | {apart} |"
        lines.append(cells + ("| | |" if result["trainer"] == "trimtab" else comparison))
    return "\n".join(lines) + "\n"


def ablation_table() -> str:
    """What benchmarks/ablation.py measured."""
    tricks = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))["tricks"]
    lines = ["| optimization | without it | the step takes | difference of gradients |", "|---|---|--:|--:|"]
    for name, trick in sorted(tricks.items(), key=lambda pair: -pair[1]["gain"]):
        lines.append(f"| {name} | {trick['without']} | {trick['gain']:.2f}x | {trick['gradients_apart']:.0e} |")
    return "\n".join(lines) + "\n"


def memory_table() -> str:
    """What benchmarks/memory.py measured: one line per run, then the absolute errors of the plans."""
    runs = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
    lines = ["| run | planned | peak | error | error of the growth |", "|---|--:|--:|--:|--:|"]
    errors, growth_errors = [], []
    for name, run in runs.items():
        planned, peak = run["before"] + run["planned"], run["before"] + run["grew"]
        errors.append(planned / peak - 1)
        growth_errors.append(run["planned"] / run["grew"] - 1)
        lines.append(
            f"| {name} | {planned / 1e6:,.0f} MB | {peak / 1e6:,.0f} MB | {errors[-1]:+.1%} | {growth_errors[-1]:+.1%} |"
        )
    for word, statistic in (("median", median), ("worst", max)):
        off = " | ".join(f"{statistic(map(abs, values)):.1%}" for values in (errors, growth_errors))
        lines.append(f"| **{word} absolute error of {len(runs)}** | | | {off} |")
    return "\n".join(lines) + "\n"


def startup_table() -> str:
    """What benchmarks/startup.py measured: seconds."""
    runs = json.loads((RESULTS / "startup.json").read_text(encoding="utf-8"))
    parts = [name for name in runs["warm"] if name != "in all"]
    lines = [f"| | total | {' | '.join(parts)} |", f"|---|--:|{'--:|' * len(parts)}"]
    for name, seconds in runs.items():
        lines.append(f"| {name} | {seconds['in all']:.1f} | " + " | ".join(f"{seconds[part]:.1f}" for part in parts) + " |")
    return "\n".join(lines) + "\n"


def guards_table() -> str:
    """What benchmarks/guards.py measured."""
    run = json.loads((RESULTS / "guards.json").read_text(encoding="utf-8"))
    lines = ["| guard | calls | seconds | share of the run |", "|---|--:|--:|--:|"]
    for name, guard in run["guards"].items():
        lines.append(f"| {name} | {guard['times']} | {guard['seconds']:.2f} | {guard['seconds'] / run['seconds']:.2%} |")
    spent = sum(guard["seconds"] for guard in run["guards"].values())
    lines.append(
        f"| **total**, of {run['steps']} steps in {run['seconds']:.0f} s | | {spent:.2f} | {spent / run['seconds']:.2%} |"
    )
    for name, guard in run["besides"].items():
        lines.append(
            f"| not counted: {name} | {guard['times']} | {guard['seconds']:.2f} | {guard['seconds'] / run['seconds']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def waiting_table() -> str:
    """What benchmarks/waiting.py measured: medians of its rounds, and of the ratios within each round with their range."""
    lines = [
        "| | waiting threads | training | decoding | training, relative to spinning | load average |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for place, results in json.loads((RESULTS / "waiting.json").read_text(encoding="utf-8")).items():
        for way, result in results.items():
            pairs = zip(result["runs"], results["spinning"]["runs"], strict=True)
            ratios = sorted(run["training"] / spinning["training"] for run, spinning in pairs)
            share = "" if way == "spinning" else f"{median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            speeds = f"{result['training']:.0f} tokens/s | {result['decoding']:.2g} tokens/s"
            lines.append(f"| {place} | {way} | {speeds} | {share} | {result['load']:.1f} |")
    return "\n".join(lines) + "\n"


SCALES = {
    "lengths": ("tokens per example", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "packs": ("tokens per micro-batch", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "ranks": ("rank", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "rows": (
        "examples",
        {"tokens": "{:,} tokens", "seconds": "{:.1f} s", "grew_gb": "{:.2f} GB more", "again_s": "{:.1f} s in a later run"},
    ),
    "bookkeeping": (
        "examples",
        {
            "tokens": "{:,} tokens",
            "packing_s": "{:.2f} s to pack",
            "evaluation_s": "{:.2f} s to evaluate",
            "reference_s": "{:.2f} s for the reference",
            "again_s": "{:.2f} s from the cache",
        },
    ),
}
"""What benchmarks/scaling.py measures: the name of the first column, and the format of each value."""


def scaling_table(kind: str) -> str:
    column, shapes = SCALES[kind]
    lines = [f"| {column} |{' |' * len(shapes)}", "|--:|" + "--:|" * len(shapes)]
    for value, result in json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8")).get(kind, {}).items():
        lines.append(
            f"| {int(value):,} | "
            + " | ".join(shape.format(result[key]) if key in result else "–" for key, shape in shapes.items())
            + " |"
        )
    return "\n".join(lines) + "\n"


def preference() -> str:
    """docs/preference.md with current tables."""
    text = PREFERENCE.read_text(encoding="utf-8")
    measured = json.loads(COMPARED.read_text(encoding="utf-8")) if COMPARED.exists() else {}
    for name, kind, table in (("families", "measured", families_table), ("rates", "rates", rates_table)):
        text = _filled(text, name, table(measured[kind]) if kind in measured else "Not measured yet.\n")
    return text


def families_table(measured: dict[str, Any]) -> str:
    """What benchmarks/preference.py measured after each stage, by method, with its seeds side by side."""
    lines = [
        "| method | after | correct line preferred | correct line generated | divergence | loss on prose |",
        "|---|---|--:|--:|--:|--:|",
    ]
    prose = {
        result["sft"]["base_prose_loss"] for seeds in measured.values() for result in seeds.values() if "error" not in result
    }
    lines += [f"| none | | – | – | – | {loss:.3f} |" for loss in sorted(prose)[:1]]
    for method, seeds in measured.items():
        for stage in ("sft", "dpo", "kto"):
            results = [result[stage] for _, result in sorted(seeds.items()) if "error" not in result]
            cells = [
                " / ".join(shape.format(result[key]) if key in result else "–" for result in results)
                for key, shape in (
                    ("accuracy", "{:.0%}"), ("exact_match", "{:.0%}"), ("divergence", "{:.3f}"), ("prose_loss", "{:.3f}")
                )
            ]  # fmt: skip
            lines.append(f"| `{method}` | {stage.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_table(rates: dict[str, Any]) -> str:
    """What each share of SFT's learning rate gave: correct lines generated, correct lines preferred, loss on prose."""
    lines = [
        "| objective | method | share of SFT's learning rate: correct line generated, preferred; loss on prose |",
        "|---|---|---|",
    ]
    for objective, methods_ in sorted(rates.items()):
        for method, results in methods_.items():
            shown = " · ".join(
                f"{share}: {result['exact_match']:.0%}, {result['accuracy']:.0%}; {result['prose_loss']:.2f}"
                for share, result in results.items()
                if share not in ("sft", "error")
            )
            lines.append(f"| `{objective}` | `{method}` | {shown} |")
    return "\n".join(lines) + "\n"


def _measured(kind: str) -> dict[str, Any]:
    return json.loads(MEASURED.read_text(encoding="utf-8")).get(kind, {}) if MEASURED.exists() else {}


def _line(method: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| `{method}` | {result['error']} | | | |"
    low, high = result["loss_interval"]
    least, most = result["exact_match_interval"]
    return (
        f"| `{method}` | {result['held_out_loss']:.4f} | {result['loss']:.4f} ({low:.4f} to {high:.4f}) "
        f"| {result['exact_match']:.1%} ({least:.1%} to {most:.1%}) | {result['stopped']:.0%} |"
    )


def page() -> str:
    """docs/recipe.md, all of it."""
    plain = {key: field for key, field in Recipe.model_fields.items() if _model_of(field.annotation) is None}
    rows = [f"| `{key}` | {_default(field)} | {' '.join(field.description.split())} |\n" for key, field in plain.items()]
    parts = [HEAD, "| key | default | |\n|---|---|---|\n", *rows]
    for key, field in Recipe.model_fields.items():
        kind = _model_of(field.annotation)
        if kind is None:
            continue
        parts.append(f"\n## {key}\n\n{field.description}\n")
        if issubclass(kind, Choice):
            parts += _members(kind, key)
            continue
        parts.append(_table(kind))
        if kind is DataConfig:
            parts.append(f"\n### `{key}: {{train: {{NAME: {{path: …}}}}}}`\n\n{inspect.getdoc(Source)}\n{_table(Source)}")
        for inner, inner_field in kind.model_fields.items():
            family = _model_of(inner_field.annotation)
            if family is not None and issubclass(family, Choice):
                parts += _members(family, f"{key}.{inner}")
    return "".join(parts)


def _members(family: type[Choice], key: str) -> Iterable[str]:
    """A part of the page for each member of a family."""
    for name in family.names():
        member = family.member(name)
        summary = (member.__doc__ or "").strip().splitlines()[0]
        yield f"\n### `{key}: {{{family.key}: {name}}}`\n\n{summary}\n{_table(member)}"


CHAPTERS = {
    "A": "The loss and the steps", "B": "Examples, tokens, labels", "C": "Saving, loading, resuming", "D": "Merging and combining",
    "E": "Inference", "F": "Code and supply chain",
}  # fmt: skip


FAULTS_HEAD = """# Known silent failures of fine-tuning

And what Trimtab does about each. *Impossible*: tests prove that it cannot happen. *Refused*: the command ends with a message that says what
to do. *Repaired*: it is corrected, and reported. *Shown*: it is measured and reported. `make docs` generates this page from
`tests/fault_catalogue.py`, which names the tests of each line.

The last column is what happened when the same fault was tried on the peers, as a user would run into it, on a random model of two layers.
*Silent*: wrong without any message. *Warned*: wrong, with a warning about it. *Refused*: any error. *Right*: the fault does not happen.
`python benchmarks/peer_faults` measures this again; its files say how.

"""
PEER_FAULTS = RESULTS / "peer_faults.json"
PEER_NAMES = {"peft": "PEFT", "transformers": "Transformers", "trl": "TRL"}


def faults() -> str:
    """docs/faults.md, all of it, from the catalogue beside the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fault_catalogue import FAULTS as KNOWN
    from fault_catalogue import MISSING

    counts = {
        word: sum(fault.outcome == word for fault in KNOWN.values()) for word in ("impossible", "refused", "repaired", "shown")
    }
    totals = ", ".join(f"{count} {word}" for word, count in counts.items())
    left = "; ".join(f"{key}, {why}" for key, why in MISSING.items())
    peers = json.loads(PEER_FAULTS.read_text(encoding="utf-8"))
    parts = [FAULTS_HEAD, f"{totals}; none silent. Not testable yet: {left}.\n\n{_peer_totals(peers)}\n"]
    for chapter, title in CHAPTERS.items():
        lines = [
            f"| {key} | {fault.what} | {fault.outcome} | {fault.how} | {_on_a_peer(peers, key)} |"
            for key, fault in KNOWN.items()
            if key[0] == chapter
        ]
        head = f"| | what goes wrong | in Trimtab | how | {', '.join(PEER_NAMES.values())} |\n|---|---|---|---|---|\n"
        parts.append(f"\n## {title}\n\n{head}" + "\n".join(lines) + "\n")
    return "".join(parts)


def models() -> str:
    """docs/models.md, all of it, as benchmarks/models writes it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from models.table import page

    return page(json.loads((RESULTS / "models.json").read_text(encoding="utf-8")))


def scale() -> str:
    """docs/scale.md with current tables, as benchmarks/scale.py computes them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from scale import page

    return page()


def migration() -> str:
    """docs/migration.md with current tables, from the options of other tools and what they are here."""
    from trimtab.core.synonyms import meaning_of
    from trimtab.migrate import TOOLS, options_of

    titles = {tool: module.TITLE for tool, module in TOOLS.items()}
    known = {tool: {name for options in options_of(tool).values() for name in options} for tool in TOOLS}
    lines = ["| option | of | here |", "|---|---|---|"]
    for name in sorted(set().union(*known.values())):
        meaning = meaning_of(name)
        assert meaning is not None, f"{name}: core/other_tools.py does not say what it is here"
        here = {"key": f"`{meaning.said}`", "derived": f"derived: {meaning.said}", "missing": f"not there: {meaning.said}"}
        tools = ", ".join(title for tool, title in titles.items() if name in known[tool])
        lines.append(f"| `{name}` | {tools} | {here[meaning.outcome]} |")
    counts = [
        "| example recipes of | files | settings | key | derived | not there | unknown | key or derived |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tool, by in coverage().items():
        total = sum(by.values()) - by["files"]
        share = (by["key"] + by["derived"]) / total
        cells = " | ".join(f"{by[outcome]:,}" for outcome in ("key", "derived", "missing", "unknown"))
        counts.append(f"| {titles[tool]} | {by['files']} | {total:,} | {cells} | {share:.1%} |")
    versions = ", ".join(json.loads((OPTIONS / f"{tool}.json").read_text(encoding="utf-8"))["version"] for tool in TOOLS)
    page = _filled(MIGRATION.read_text(encoding="utf-8"), "versions", f"{versions}.\n")
    page = _filled(page, "coverage", "\n".join(counts) + "\n")
    return _filled(page, "options", "\n".join(lines) + "\n")


def coverage() -> dict[str, dict[str, int]]:
    """Of each tool's example recipes: how many settings, by occurrence, are a key, derived, not there or unknown."""
    from trimtab.core.synonyms import meaning_of

    found = {}
    for tool, usage in json.loads(USAGE.read_text(encoding="utf-8")).items():
        by = {"files": usage["files"], "key": 0, "derived": 0, "missing": 0, "unknown": 0}
        for name, count in usage["keys"].items():
            meaning = meaning_of(name)
            by[meaning.outcome if meaning else "unknown"] += count
        found[tool] = by
    return found


_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


class _Card(NamedTuple):
    """A kind of device, which need not be there, as far as ways of computing ask about it."""

    name: str
    kind: str
    capability: tuple[int, int] = (0, 0)
    hip: str | None = None


CARDS = (
    _Card("CPU", "cpu"),
    _Card("CUDA, capability 8.0 and later (A100, L4, RTX 30, H100, …)", "cuda", (8, 0)),
    _Card("CUDA, capability 7 (V100, T4, RTX 20)", "cuda", (7, 5)),
    _Card("ROCm", "cuda", (9, 4), hip="6"),
    _Card("MPS, XPU and others", "mps"),
)


def gpu() -> str:
    """docs/gpu.md with current tables, from what the back ends say that they take."""
    page = _filled(GPU.read_text(encoding="utf-8"), "ways", ways_table())
    return _filled(page, "by-hand", by_hand_table())


def ways_table() -> str:
    """Device by dtype: by what passes over memory and attention are computed."""
    from trimtab.engine.backends import AttentionPlan, Heads, ways

    plain = AttentionPlan((), Heads(2, 4, 64), 1.0)
    kinds = {
        "attention, also with virtual tokens, chunks": (plain, False),
        "windows": (plain._replace(window=4), False),
        "sinks": (plain, True),
        "soft-capped scores": (plain._replace(softcap=30.0), False),
        "other head sizes": (plain._replace(heads=Heads(2, 4, 60)), False),
    }
    lines = [f"| device | dtype | norms, gates, softmax, rotary | {' | '.join(kinds)} |", f"|---|---|---|{'---|' * len(kinds)}"]
    for card in CARDS:
        by = dict[tuple[str, ...], list[str]]()
        with patch.object(ways, "_capability", lambda _, card=card: card.capability), patch("torch.version.hip", card.hip):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                by.setdefault(_ways(card, dtype, kinds.values()), []).append(str(dtype).removeprefix("torch."))
        mark = "" if card.kind == "cpu" else " †"
        lines += [
            f"| {card.name} | {', '.join(dtypes)} | {' | '.join(f'{cell}{mark}' for cell in row)} |"
            for row, dtypes in by.items()
        ]
    return "\n".join(lines) + "\n"


def _ways(card: _Card, dtype: torch.dtype, kinds: Iterable[Any]) -> tuple[str, ...]:
    from trimtab.engine.backends import cpu, cuda, passes, ways
    from trimtab.engine.backends import torch as reference

    kind = card.kind
    q: Any = SimpleNamespace(
        is_cuda=kind == "cuda", is_cpu=kind == "cpu", is_meta=False, dtype=dtype, device=torch.device(kind)
    )
    backend: Any = cuda if q.is_cuda else cpu if q.is_cpu and dtype in cpu._PREFIXES else reference
    known = ways.WAYS if q.is_cuda else ways.WAYS[-1:]
    found = ["C" if backend is cpu else "Triton" if q.is_cuda and dtype in passes._DTYPES else "PyTorch"]
    for plan, sinks in kinds:
        if plan.softcap is not None and not backend.supports_softcap(q):
            found.append("the model's own code")
        else:
            found.append("C" if backend is cpu else next(way.name for way in known if way.takes(q, plan, sinks)))
    return tuple(found)


def by_hand_table() -> str:
    """What each method adds to decoder layers by hand, in 16 bits, on a small Llama."""
    from trimtab.certify.doctor import NEEDED, _Case
    from trimtab.engine.low_rank import linear_of
    from trimtab.engine.patching import layers_of
    from trimtab.methods import AdapterLayer, unwrap

    found = dict[str, list[str]]()
    for name in Method.names():
        base, _ = _Case(Method.member(name)(**NEEDED.get(name, {}))).adapted(torch.bfloat16)
        parents = [m for layer in layers_of(base.model) for m in layer.modules() if not isinstance(m, AdapterLayer)]
        adapted = [child for parent in parents for child in parent.children() if isinstance(child, AdapterLayer)]
        linear = [child for child in adapted if isinstance(unwrap(child), torch.nn.Linear)]
        if not adapted:
            words = "layers are as without it; virtual keys take part in the call of attention"
        elif linear and all(linear_of(child, torch.bfloat16) is not None for child in linear):
            words = "its products, dropout included, are part of the operation of the frozen matrix"
        else:
            words = "its own operations at the modules that it adapts; norms, gates and attention around them by hand"
        found.setdefault(words, []).append(f"`{name}`")
    lines = [f"| {', '.join(names)} | {words} |" for words, names in found.items()]
    return "| methods | within a layer |\n|---|---|\n" + "\n".join(lines) + "\n"


def templates() -> str:
    """docs/templates.md with current tables, from what the tests expect of real templates."""
    sys.path.insert(0, str(ROOT / "tests"))
    from chat_templates import EMBEDDED, SCENARIOS, TAUGHT

    templates_ = {**TAUGHT, "smollm2-135m-instruct": EMBEDDED}
    firsts = {name: [template.runs(scenario)[0] for scenario in SCENARIOS] for name, template in templates_.items()}
    reasons = list(dict.fromkeys(run[1:] for runs in firsts.values() for run in runs if run[0] == "!"))
    right = [f"| template | {' | '.join(SCENARIOS)} |", f"|---|{'---|' * len(SCENARIOS)}"]
    right += [
        f"| {name} | {' | '.join(_MARKS[reasons.index(run[1:])] if run[0] == '!' else 'right' for run in runs)} |"
        for name, runs in firsts.items()
    ]
    right += ["", *(f"{mark} refused: “{reason}”  " for mark, reason in zip(_MARKS, reasons, strict=False))]
    taught = ["| template | the prompt ends with | targets of an answer {A} | with reasoning {R} |", "|---|---|---|---|"]
    for name, template in templates_.items():
        reasoned = "–" if template.reasoned[0] == "!" else _code(template.reasoned)
        taught.append(f"| {name} | {_code(template.opens)} | {_code(template.answer)} | {reasoned} |")
    page = _filled(TEMPLATES.read_text(encoding="utf-8"), "right", "\n".join(right) + "\n")
    return _filled(page, "taught", "\n".join(taught) + "\n")


def _code(text: str) -> str:
    """A text as code in a table, with its line ends visible."""
    return f"`{text}`".replace("\n", "⏎").replace("|", r"\|")


def _peer_totals(peers: dict[str, Any]) -> str:
    outcomes = [result["outcome"] for result in peers["faults"].values()]
    *names, last = (f"{PEER_NAMES[peer]} {version}" for peer, version in peers["versions"].items())
    return (
        f"Of {len(outcomes)} faults tried on {', '.join(names)} and {last}, {outcomes.count('silent')} pass silently, "
        f"{outcomes.count('warned')} with a warning, {outcomes.count('refused')} are refused, {outcomes.count('right')} do not happen."
    )


def _on_a_peer(peers: dict[str, Any], fault: str) -> str:
    if fault in peers["not_tried"]:
        return f"not tried: {peers['not_tried'][fault]}"
    result = peers["faults"][fault]
    description = result["words"].replace("|", r"\|")
    return f"**{result['outcome']}** ({result['peer']}): {description}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    items = get_args(annotation)[:1] if get_origin(annotation) is tuple else ()  # a list of Annotated members
    options = [annotation, *get_args(annotation), *(inner for item in items for inner in get_args(item))]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _table(kind: type[BaseModel]) -> str:
    if not kind.model_fields:
        return "\nIt has no keys.\n"
    rows = [
        f"| `{key}` | {_default(field)} | {' '.join(field.description.split())}{_choices(field)} |"
        for key, field in kind.model_fields.items()
    ]
    return "\n| key | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _choices(field: Any) -> str:
    options = get_args(field.annotation)
    return f" One of {', '.join(f'`{o}`' for o in options)}." if options and all(isinstance(o, str) for o in options) else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default == ():
        return "none"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Choice):
        return f"`{value.name}`"
    if isinstance(value, tuple) and len(value) == 1:
        return f"`{value[0]}`"
    return "none" if value is None else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    METHODS.write_text(methods(), encoding="utf-8")
    PERFORMANCE.write_text(performance(), encoding="utf-8")
    PREFERENCE.write_text(preference(), encoding="utf-8")
    FAULTS.write_text(faults(), encoding="utf-8")
    TEMPLATES.write_text(templates(), encoding="utf-8")
    MODELS.write_text(models(), encoding="utf-8")
    GPU.write_text(gpu(), encoding="utf-8")
    SCALE.write_text(scale(), encoding="utf-8")
    MIGRATION.write_text(migration(), encoding="utf-8")
