"""Write what the documents say about the code from the code: python docs/make_pages.py. A test holds them to it.

docs/recipe.md comes from the recipe's own declarations, the tree in README.md from the files' first lines, the tables in
docs/methods.md from the methods and from docs/methods.json, which benchmarks/methods.py measures, and those in
docs/performance.md from docs/measured, which `trimtab bench` and the scripts in benchmarks fill; those in
docs/preference.md from docs/preference.json, which benchmarks/preference.py measures; docs/faults.md from tests/fault_catalogue.py
and from docs/measured/peer_faults.json, which benchmarks/peer_faults measures.
"""

import ast
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import transformers
from pydantic import BaseModel

from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.report.methods import methods_facts
from trimtab.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "recipe.md", ROOT / "README.md"
METHODS, MEASURED = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.json"
PERFORMANCE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "measured"
FAULTS = ROOT / "docs" / "faults.md"
TEMPLATES = ROOT / "docs" / "templates.md"
PREFERENCE, COMPARED = ROOT / "docs" / "preference.md", ROOT / "docs" / "preference.json"
FLOORS = (
    ("words and pages", ("cli.py", "commands", "__main__.py", "__init__.py")),
    ("the Python door; and against others", ("api.py", "bench")),
    ("one run, top to bottom", ("run",)),
    ("proof, and what is shown", ("certify", "report")),
    ("the loop, and scores", ("train", "evaluate")),
    ("one short file each; adapters on disk, merge, exports", ("objectives", "deploy")),
    ("what is computed", ("engine",)),
    ("neighbours that do not import each other", ("base", "methods", "data", "artifacts")),
    ("the ground", ("core",)),
)
HEAD = """# The recipe

Everything that decides a run's result, in one YAML file; a copy with every default written out is kept in the run, and repeats it. Unknown keys,
wrong types and values out of range are refused. On the command line, `trimtab train RECIPE.yaml section.key=value …` overrides any key.
Relative paths start where the command runs. This page is written from the code by `docs/make_pages.py`.

"""


def tree() -> str:
    """src/trimtab, the highest floor first, a line a file."""
    source, lines = ROOT / "src" / "trimtab", []
    for number, (what, names) in reversed(list(enumerate(reversed(FLOORS)))):
        lines.append(f"{number}  {what}")
        for name in names:
            files = [source / name] if name.endswith(".py") else sorted((source / name).rglob("*.py"))
            for file in files:
                if file.name == "__init__.py" and file.parent != source:
                    continue
                summary = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")
                lines.append(f"   {file.relative_to(source).as_posix():22} {summary}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def readme() -> str:
    """README.md with the tree as it is now."""
    return _filled(README.read_text(encoding="utf-8"), "tree", tree())


def methods() -> str:
    """docs/methods.md with its tables as they are now."""
    page = METHODS.read_text(encoding="utf-8")
    for name, table in (("methods", methods_table()), ("measured", measured_table()), ("search", search_table())):
        page = _filled(page, name, table)
    return page


def _filled(page: str, name: str, content: str) -> str:
    """A page with other content between two marks."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->\n")
    return f"{before}<!-- {name} -->\n{content}<!-- end of {name} -->\n{after}"


def methods_table() -> str:
    """Each method on a model of SmolLM2-135M's shape."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    lines = [
        "| method | | parameters | merges | positions | starts as the base | stages | PEFT |",
        "|---|---|--:|---|--:|---|---|---|",
    ]
    for one in methods_facts(model):
        said = f"{one['parameters']:,}" if one["parameters"] is not None else one["refused"].rstrip(".")
        marks = ["yes" if one[key] else "no" for key in ("mergeable", "identity_at_init")]
        stages = ", ".join(one["objectives"])
        lines.append(
            f"| `{one['name']}` | {one['summary']} | {said} | {marks[0]} | {one['positions'] or '–'} | {marks[1]} | {stages} "
            f"| {one['peft'] or '–'} |"
        )
    return "\n".join(lines) + "\n"


def measured_table() -> str:
    """What benchmarks/methods.py measured: cost, then each task, a line a method."""
    measured = sorted(_measured("measured").items())
    lines = ["**Cost**\n", "| method | parameters | learning rate | tokens/s | peak memory |", "|---|--:|--:|--:|--:|"]
    for word, tasks in measured:
        if "error" not in tasks.get("demo", {"error": ""}) and "error" not in tasks.get("speed", {"error": ""}):
            one = tasks["demo"] | tasks["speed"]
            cost = f"{one['tokens_per_s']:.0f} | {one['peak_gb']:.2f} GB"
            lines.append(f"| `{word}` | {one['parameters']:,} | {one['lr']:g} | {cost} |")
    for task, title in (("demo", "The demo's task"), ("nl2cmd", "nl2cmd")):
        lines += [
            f"\n**{title}**\n",
            "| method | held-out loss | test loss | exact match | ended by itself |",
            "|---|--:|---|---|--:|",
        ]
        lines += [_line(word, tasks[task]) for word, tasks in measured if task in tasks]
    return "\n".join(lines) + "\n\n"


def search_table() -> str:
    """The held-out loss after half an epoch of the demo's task, for each learning rate that was tried."""
    lines = ["| method | learning rate: held-out loss |", "|---|---|"]
    for word, tried in sorted(_measured("search").items()):
        losses = {rate: one.get("held_out_loss") for rate, one in sorted(tried.items(), key=lambda pair: float(pair[0]))}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        shown = [
            f"{rate}: {'diverged' if loss is None else f'**{loss:.3f}**' if loss == best else f'{loss:.3f}'}"
            for rate, loss in losses.items()
        ]
        lines.append(f"| `{word}` | {' · '.join(shown)} |")
    return "\n".join(lines) + "\n"


def performance() -> str:
    """docs/performance.md with its tables as they are now."""
    text = PERFORMANCE.read_text(encoding="utf-8")
    tables = {"all-linear": bench_table("all-linear"), "q-v": bench_table("q-v"), "ablation": ablation_table()}
    tables |= {"startup": startup_table(), "guards": guards_table(), "memory": memory_table(), "waiting": waiting_table()}
    for name, table in (tables | {what: scaling_table(what) for what in SCALES}).items():
        text = _filled(text, name, table)
    return text


def bench_table(targets: str) -> str:
    """What `trimtab bench --output docs/measured/TARGETS` measured: medians."""
    results = RESULTS / targets / "results.json"
    if not results.exists():
        return "Not measured yet.\n"
    lines = [
        "| | tokens/s | peak memory | of the floor | Trimtab is | in memory | losses apart |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in json.loads(results.read_text(encoding="utf-8")):
        start = f"| {one['trainer']} | {one['tokens_per_s']:.0f} | {one['peak_rss_gb']:.2f} GB | {one['gemm_floor_fraction']:.0%} | "
        pairs = ", ".join(f"{pair:.2f}" for pair in one["pairs"])
        apart = "–" if one["loss_distance"] is None else f"{one['loss_distance']:.0e}"
        other = f"{one['trimtab_is_faster']:.2f}x ({pairs}) | {one['trimtab_memory']:.2f} | {apart} |"
        lines.append(start + ("| | |" if one["trainer"] == "trimtab" else other))
    return "\n".join(lines) + "\n"


def ablation_table() -> str:
    """What benchmarks/ablation.py measured."""
    tricks = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))["tricks"]
    lines = ["| trick | without it | the step takes | gradients apart |", "|---|---|--:|--:|"]
    for name, one in sorted(tricks.items(), key=lambda pair: -pair[1]["gain"]):
        lines.append(f"| {name} | {one['without']} | {one['gain']:.2f}x | {one['gradients_apart']:.0e} |")
    return "\n".join(lines) + "\n"


def memory_table() -> str:
    """What benchmarks/memory.py measured: a line a run, and how far off the plans were, whichever way."""
    runs = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))
    lines = ["| run | planned | held | off | of what it grew by |", "|---|--:|--:|--:|--:|"]
    whole, growth = [], []
    for name, one in runs.items():
        planned, held = one["before"] + one["planned"], one["before"] + one["grew"]
        whole.append(planned / held - 1)
        growth.append(one["planned"] / one["grew"] - 1)
        lines.append(f"| {name} | {planned / 1e6:,.0f} MB | {held / 1e6:,.0f} MB | {whole[-1]:+.1%} | {growth[-1]:+.1%} |")
    for word, of in (("median", median), ("worst", max)):
        off = " | ".join(f"{of(map(abs, some)):.1%}" for some in (whole, growth))
        lines.append(f"| **{word} of {len(runs)}, either way** | | | {off} |")
    return "\n".join(lines) + "\n"


def startup_table() -> str:
    """What benchmarks/startup.py measured: seconds."""
    runs = json.loads((RESULTS / "startup.json").read_text(encoding="utf-8"))
    parts = [name for name in runs["warm"] if name != "in all"]
    lines = [f"| | in all | {' | '.join(parts)} |", f"|---|--:|{'--:|' * len(parts)}"]
    for name, one in runs.items():
        lines.append(f"| {name} | {one['in all']:.1f} | " + " | ".join(f"{one[part]:.1f}" for part in parts) + " |")
    return "\n".join(lines) + "\n"


def guards_table() -> str:
    """What benchmarks/guards.py measured."""
    run = json.loads((RESULTS / "guards.json").read_text(encoding="utf-8"))
    lines = ["| guard | times | seconds | of the run |", "|---|--:|--:|--:|"]
    for name, one in run["guards"].items():
        lines.append(f"| {name} | {one['times']} | {one['seconds']:.2f} | {one['seconds'] / run['seconds']:.2%} |")
    spent = sum(one["seconds"] for one in run["guards"].values())
    lines.append(
        f"| **in all**, of {run['steps']} steps in {run['seconds']:.0f} s | | {spent:.2f} | {spent / run['seconds']:.2%} |"
    )
    for name, one in run["besides"].items():
        lines.append(f"| besides, {name} | {one['times']} | {one['seconds']:.2f} | {one['seconds'] / run['seconds']:.2%} |")
    return "\n".join(lines) + "\n"


def waiting_table() -> str:
    """What benchmarks/waiting.py measured: medians, of its rounds' ratios too, with the least and the most."""
    lines = ["| | threads wait | training | decoding | training beside spinning | load average |", "|---|---|--:|--:|--:|--:|"]
    for place, ways in json.loads((RESULTS / "waiting.json").read_text(encoding="utf-8")).items():
        for way, one in ways.items():
            pairs = zip(one["runs"], ways["spinning"]["runs"], strict=True)
            beside = sorted(mine["training"] / spinning["training"] for mine, spinning in pairs)
            share = "" if way == "spinning" else f"{median(beside):.2f}x ({beside[0]:.2f} to {beside[-1]:.2f})"
            speeds = f"{one['training']:.0f} tokens/s | {one['decoding']:.2g} tokens/s"
            lines.append(f"| {place} | {way} | {speeds} | {share} | {one['load']:.1f} |")
    return "\n".join(lines) + "\n"


SCALES = {
    "lengths": ("tokens in a row", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "packs": ("tokens at a time", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "ranks": ("rank", {"tokens_per_s": "{:.0f} tokens/s", "peak_gb": "{:.2f} GB"}),
    "rows": (
        "rows",
        {"tokens": "{:,} tokens", "seconds": "{:.1f} s", "grew_gb": "{:.2f} GB more", "again_s": "{:.1f} s again"},
    ),
    "bookkeeping": (
        "rows",
        {
            "tokens": "{:,} tokens",
            "packing_s": "{:.2f} s to pack",
            "evaluation_s": "{:.2f} s to evaluate",
            "reference_s": "{:.2f} s to compare",
            "again_s": "{:.2f} s again",
        },
    ),
}
"""What benchmarks/scaling.py measures, and how to say it."""


def scaling_table(what: str) -> str:
    word, shapes = SCALES[what]
    lines = [f"| {word} |{' |' * len(shapes)}", "|--:|" + "--:|" * len(shapes)]
    for value, one in json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8")).get(what, {}).items():
        lines.append(
            f"| {int(value):,} | "
            + " | ".join(shape.format(one[key]) if key in one else "–" for key, shape in shapes.items())
            + " |"
        )
    return "\n".join(lines) + "\n"


def preference() -> str:
    """docs/preference.md with its tables as they are now."""
    text = PREFERENCE.read_text(encoding="utf-8")
    measured = json.loads(COMPARED.read_text(encoding="utf-8")) if COMPARED.exists() else {}
    for name, kind, table in (("families", "measured", families_table), ("rates", "rates", rates_table)):
        text = _filled(text, name, table(measured[kind]) if kind in measured else "Not measured yet.\n")
    return text


def families_table(measured: dict[str, Any]) -> str:
    """What benchmarks/preference.py measured: after each stage, by method; its seeds side by side."""
    lines = [
        "| method | after | right line preferred | right line written | divergence | loss on prose |",
        "|---|---|--:|--:|--:|--:|",
    ]
    prose = {one["sft"]["base_prose_loss"] for seeds in measured.values() for one in seeds.values() if "error" not in one}
    lines += [f"| none | | – | – | – | {loss:.3f} |" for loss in sorted(prose)[:1]]
    for method, seeds in measured.items():
        for stage in ("sft", "dpo", "kto"):
            ran = [one[stage] for _, one in sorted(seeds.items()) if "error" not in one]
            cells = [
                " / ".join(shape.format(one[key]) if key in one else "–" for one in ran)
                for key, shape in (
                    ("accuracy", "{:.0%}"), ("exact_match", "{:.0%}"), ("divergence", "{:.3f}"), ("prose_loss", "{:.3f}")
                )
            ]  # fmt: skip
            lines.append(f"| `{method}` | {stage.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_table(rates: dict[str, Any]) -> str:
    """What each share of the learning rate for SFT gave: lines written right, pairs told apart, loss on prose."""
    lines = [
        "| objective | method | share of SFT's learning rate: right line written, preferred; loss on prose |",
        "|---|---|---|",
    ]
    for objective, methods_ in sorted(rates.items()):
        for method, tried in methods_.items():
            shown = " · ".join(
                f"{share}: {one['exact_match']:.0%}, {one['accuracy']:.0%}; {one['prose_loss']:.2f}"
                for share, one in tried.items()
                if share not in ("sft", "error")
            )
            lines.append(f"| `{objective}` | `{method}` | {shown} |")
    return "\n".join(lines) + "\n"


def _measured(kind: str) -> dict[str, Any]:
    return json.loads(MEASURED.read_text(encoding="utf-8")).get(kind, {}) if MEASURED.exists() else {}


def _line(word: str, one: dict[str, Any]) -> str:
    if "error" in one:
        return f"| `{word}` | {one['error']} | | | |"
    low, high = one["loss_interval"]
    least, most = one["exact_match_interval"]
    return (
        f"| `{word}` | {one['held_out_loss']:.4f} | {one['loss']:.4f} ({low:.4f} to {high:.4f}) "
        f"| {one['exact_match']:.1%} ({least:.1%} to {most:.1%}) | {one['stopped']:.0%} |"
    )


def page() -> str:
    """The whole of docs/recipe.md."""
    plain = {key: field for key, field in Recipe.model_fields.items() if _model_of(field.annotation) is None}
    rows = [f"| `{key}` | {_default(field)} | {field.description} |\n" for key, field in plain.items()]
    parts = [HEAD, "| key | default | |\n|---|---|---|\n", *rows]
    for key, field in Recipe.model_fields.items():
        kind = _model_of(field.annotation)
        if kind is None:
            continue
        parts.append(f"\n## {key}\n\n{field.description}\n")
        if kind in (Method, Objective):
            for name in kind.names():
                member = kind.member(name)
                summary = (member.__doc__ or "").strip().splitlines()[0]
                parts.append(f"\n### `{key}: {{name: {name}}}`\n\n{summary}\n{_table(member)}")
        else:
            parts.append(_table(kind))
    return "".join(parts)


CHAPTERS = {
    "A": "Loss and optimizer steps", "B": "Examples, tokens, labels", "C": "Saving, loading, resuming", "D": "Merging and combining",
    "E": "Inference", "F": "Code and dependencies",
}  # fmt: skip


FAULTS_HEAD = """# Silent failures

What is known to go wrong silently in fine-tuning, and how Trimtab prevents it. *Impossible*: tests prove that it does not happen. *Refused*:
an error says what to do. *Repaired*: it is corrected and reported. *Shown*: it is measured and reported. Written by `make docs` from
`tests/fault_catalogue.py`, which names the tests of each line.

The last column has the results of the same faults with the peers, provoked as a user would meet them, on a random model of two layers: *silent*
is wrong without any message, *warned* is wrong with a warning that concerns it, *refused* is any error, *right* is that it does not happen.
`python benchmarks/peer_faults` measures them again; its files describe how.

"""
PEER_FAULTS = RESULTS / "peer_faults.json"
PEER_NAMES = {"peft": "PEFT", "transformers": "Transformers", "trl": "TRL"}


def faults() -> str:
    """The whole of docs/faults.md, from the catalogue beside the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fault_catalogue import FAULTS as KNOWN
    from fault_catalogue import MISSING

    counts = {
        word: sum(fault.outcome == word for fault in KNOWN.values()) for word in ("impossible", "refused", "repaired", "shown")
    }
    totals = ", ".join(f"{count} {word}" for word, count in counts.items())
    left = "; ".join(f"{key}, {why}" for key, why in MISSING.items())
    peers = json.loads(PEER_FAULTS.read_text(encoding="utf-8"))
    parts = [FAULTS_HEAD, f"{totals}; none silent. Not tested yet: {left}.\n\n{_peer_totals(peers)}\n"]
    for chapter, title in CHAPTERS.items():
        lines = [
            f"| {key} | {one.what} | {one.outcome} | {one.how} | {_on_a_peer(peers, key)} |"
            for key, one in KNOWN.items()
            if key[0] == chapter
        ]
        head = f"| | what goes wrong | here | | {', '.join(PEER_NAMES.values())} |\n|---|---|---|---|---|\n"
        parts.append(f"\n## {title}\n\n{head}" + "\n".join(lines) + "\n")
    return "".join(parts)


_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


def templates() -> str:
    """docs/templates.md with its tables, from what the tests hold real templates to."""
    sys.path.insert(0, str(ROOT / "tests"))
    from chat_templates import EMBEDDED, SCENARIOS, TAUGHT

    every = {**TAUGHT, "smollm2-135m-instruct": EMBEDDED}
    firsts = {name: [one.runs(scenario)[0] for scenario in SCENARIOS] for name, one in every.items()}
    reasons = list(dict.fromkeys(run[1:] for runs in firsts.values() for run in runs if run[0] == "!"))
    right = [f"| template | {' | '.join(SCENARIOS)} |", f"|---|{'---|' * len(SCENARIOS)}"]
    right += [
        f"| {name} | {' | '.join(_MARKS[reasons.index(run[1:])] if run[0] == '!' else 'right' for run in runs)} |"
        for name, runs in firsts.items()
    ]
    right += ["", *(f"{mark} refused: “{reason}”  " for mark, reason in zip(_MARKS, reasons, strict=False))]
    taught = ["| template | the prompt ends with | an answer {A} is trained on as | with reasoning {R} |", "|---|---|---|---|"]
    for name, one in every.items():
        reasoned = "–" if one.reasoned[0] == "!" else _code(one.reasoned)
        taught.append(f"| {name} | {_code(one.opens)} | {_code(one.answer)} | {reasoned} |")
    page = _filled(TEMPLATES.read_text(encoding="utf-8"), "right", "\n".join(right) + "\n")
    return _filled(page, "taught", "\n".join(taught) + "\n")


def _code(text: str) -> str:
    """A text with its line ends, in a table."""
    return f"`{text}`".replace("\n", "⏎").replace("|", r"\|")


def _peer_totals(peers: dict[str, Any]) -> str:
    outcomes = [one["outcome"] for one in peers["faults"].values()]
    *names, last = (f"{PEER_NAMES[peer]} {version}" for peer, version in peers["versions"].items())
    return (
        f"Of {len(outcomes)} faults tried on {', '.join(names)} and {last}, {outcomes.count('silent')} pass silently, "
        f"{outcomes.count('warned')} with a warning, {outcomes.count('refused')} are refused, {outcomes.count('right')} do not happen."
    )


def _on_a_peer(peers: dict[str, Any], fault: str) -> str:
    if fault in peers["not_tried"]:
        return f"not tried: {peers['not_tried'][fault]}"
    result = peers["faults"][fault]
    words = result["words"].replace("|", r"\|")
    return f"**{result['outcome']}** ({result['peer']}): {words}"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _table(kind: type[BaseModel]) -> str:
    if not kind.model_fields:
        return "\nIt has no keys.\n"
    rows = [
        f"| `{key}` | {_default(field)} | {field.description}{_choices(field)} |" for key, field in kind.model_fields.items()
    ]
    return "\n| key | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _choices(field: Any) -> str:
    options = get_args(field.annotation)
    return f" One of {', '.join(f'`{o}`' for o in options)}." if options and all(isinstance(o, str) for o in options) else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
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
