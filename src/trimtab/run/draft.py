"""A commented recipe that trains on some data, from nothing but the data."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.base import Base, ModelConfig, locate_model
from trimtab.core import files, yaml12
from trimtab.core.errors import DataError, listing
from trimtab.data import DataConfig, Example, Kind, SourceReport, load_data, load_examples
from trimtab.data.example import Text, parts_of
from trimtab.data.formats import COMPLETIONS, PROMPTS, read_examples
from trimtab.data.preference_formats import FORMATS
from trimtab.data.read import read_rows, splits
from trimtab.data.source import Source
from trimtab.run.recipe import Recipe

LABELS = ("label", "label_text", "category", "class", "sentiment", "intent", "topic")
"""What people call the class of a text."""
CONTEXTS = ("context", "passage", "document", "article", "schema")
"""What people call a text that a question is about."""
FIRST = 50
"""Rows on which readings are tried."""
TRAINING, VALIDATION, TESTS = (
    ("train", "training"),
    ("valid", "validation", "val", "dev", "eval", "evaluation"),
    ("test", "testing"),
)
OBJECTIVES: dict[Kind, str] = {"pairs": "dpo", "judged": "kto", "answers": "sft"}
SPARE = (
    "text",
    "label",
    "kto_tag",
    "enable_thinking",
    "history",
    "input",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "output",
)
"""Known columns that may stand beside the format's own, likeliest first."""
SHOWN = 300
"""Characters of a text of the first example that are shown."""


@dataclass
class Draft:
    """What was found, and the recipe for it."""

    found: list[str] = field(default_factory=list)
    """What is in the data, a line each."""
    example: list[str] = field(default_factory=list)
    """The first example as it is read, a line each turn."""
    recipe: str = ""


@dataclass
class Reading:
    """How rows are read as examples, and why so."""

    kind: Kind
    keys: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def draft(path: str, model: str, output: str) -> Draft:
    """A recipe that trains on this data.

    Raises:
        DataError: It can't be read, or nothing says what in it is to be trained on.
    """
    train, held_out, tests = _parts(path)
    rows = [row for row in islice(read_rows(_source(train)), FIRST) if isinstance(row[1], dict)]
    reading = _reading(path, train, rows)
    examples, report = load_examples(train, kind=reading.kind, **reading.keys)
    count = len(examples) + len(report.rejected)
    drafted = Draft([f"{count:,} examples with the columns {', '.join(_columns(rows))}"], [*_shown(examples[0])])
    objective = OBJECTIVES[reading.kind]
    drafted.found.append(f"read as {_named(examples)}: objective {objective}")
    if report.ignored_columns:
        drafted.found.append(f"columns that are not read: {', '.join(sorted(report.ignored_columns))}")
    if reading.reason:
        drafted.found.append(f"inferred: {reading.reason}")
    lines, notes = _measured(train, model, reading, report)
    drafted.found += [*_contents(examples), *notes]
    held = _held_out(held_out, len(examples), reading.kind)
    drafted.found.append(held[1])
    data = [("train", train, f"{count:,} examples"), ("eval", *held), *_reading_lines(reading), *lines]
    drafted.recipe = _yaml(path, model, data, objective, output, tests, drafted.example)
    Recipe.parse(yaml12.load(drafted.recipe, "the drafted recipe"))
    return drafted


def _source(path: str) -> Source:
    return Source(path=path)


def _parts(path: str) -> tuple[str, Any, str | None]:
    """The source of training examples, that of validation examples, and that of tests; None where there is none."""
    file = files.expand_user(path)
    if (file / "dataset_dict.json").is_file():
        names = files.read_json(file / "dataset_dict.json")["splits"]
        of = {name: {"path": path, "split": name} for name in names}
        return path, _first(VALIDATION, {n: {"validation": one} for n, one in of.items()}), None
    found = splits(path)
    train = _first(TRAINING, found)
    if found and train is None:
        raise DataError(f"data: {path} has the splits {', '.join(found)}, and none for training. Name the files to train on.")
    return train or path, _first(VALIDATION, found), _first(TESTS, found)


def _first(names: tuple[str, ...], found: dict[str, Any]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _columns(rows: list[Any]) -> list[str]:
    return list(dict.fromkeys(str(name) for _, row in rows for name in row))


def _reading(path: str, train: str, rows: list[Any]) -> Reading:
    """The first reading by which rows can be used, the plainest first."""
    for reading in _readings(rows):
        if _works(reading, train):
            return reading
    _, report = load_examples(train)
    columns = ", ".join(_columns(rows)) or "none"
    raise DataError(
        f"data: {path}: nothing says what in it is to be trained on. It has the columns {columns}; the first reason:\n"
        f"{listing([f'{where}: {why}' for where, why in report.rejected[:1]])}\n"
        'Write a recipe that says it: data.columns, or data.prompt="… {column} …" and data.completion="{column}".'
    )


def _works(reading: Reading, train: str) -> bool:
    """Whether most of the first rows can be used so."""
    report, config = SourceReport((train,)), DataConfig(train=(train,), **reading.keys)
    rows, formats = islice(read_rows(_source(train)), FIRST), FORMATS[reading.kind]
    used = sum(1 for _ in read_examples(rows, config.columns, report, formats, config.ignore, config.templates))
    return used > len(report.rejected)


def _readings(rows: list[Any]) -> Iterator[Reading]:
    names = _columns(rows)
    kinds: list[Kind] = ["pairs", "judged", "answers"]
    yield from (Reading(kind) for kind in kinds)
    low = {name.strip().lower(): name for name in names}
    if {"chosen", "rejected"} <= low.keys() and (prompt := _first(PROMPTS, low)):
        yield Reading("pairs", {"columns": {"prompt": prompt}}, f"{prompt} is the prompt, by its name")
    label = _first(LABELS, low)
    if "text" in low and label:
        classes = {"prompt": f"{{{low['text']}}}", "completion": f"{{{label}}}"}
        yield Reading("answers", classes, f"{low['text']} is the prompt and {label} the answer, by their names")
    for spare in (name for name in SPARE if name in low):
        reason = f"the column {low[spare]} is ignored, because examples of this format have no such column"
        yield from (Reading(kind, {"ignore": (low[spare],)}, reason) for kind in kinds)
    prompt, completion = _first(PROMPTS, low), _first(COMPLETIONS, low)
    why = "by their names"
    texts = [name for name in names if all(isinstance(row.get(name), str) and row[name].strip() for _, row in rows)]
    if (prompt is None or completion is None) and len(texts) == 2:
        prompt, completion = texts
        why = "the only columns that hold texts, in their order"
    if prompt and completion:
        reason = f"{prompt} is the prompt and {completion} the completion, {why}"
        if context := _first(CONTEXTS, low):
            with_context = {"prompt": f"{{{prompt}}}\n\n{{{context}}}", "completion": f"{{{completion}}}"}
            yield Reading("answers", with_context, f"{reason}; {context} belongs to the prompt")
        columns = {"columns": {"prompt": prompt, "completion": completion}}
        yield from (Reading(kind, columns, reason) for kind in kinds[1:])


def _named(examples: list[Example]) -> str:
    first = examples[0]
    if isinstance(first, Text):
        return "plain texts, every token of which is trained on"
    turns = max(len(part.messages) for example in examples for part in parts_of(example) if not isinstance(part, Text))
    names = {"Preference": "pairs of a chosen and a rejected answer", "Judged": "answers judged good or bad"}
    return names.get(type(first).__name__, f"conversations of up to {turns:,} messages")


def _contents(examples: list[Example]) -> Iterator[str]:
    """What else is in conversations."""
    talks = [part for example in examples for part in parts_of(example)[:1] if not isinstance(part, Text)]
    counts = {
        "have a system message": sum(any(m["role"] == "system" for m in talk.messages) for talk in talks),
        "describe tools": sum(bool(talk.tools) for talk in talks),
        "hold reasoning": sum(
            any(m.get("reasoning_content") or m.get("thinking") or "</think>" in m["content"] for m in talk.messages)
            for talk in talks
        ),
        "set switches of the chat template": sum(bool(talk.switches) for talk in talks),
    }
    yield from (f"{count:,} of {len(talks):,} {what}" for what, count in counts.items() if count)


Line = tuple[str, Any, str]
"""A key, its value, and why."""


def _measured(train: str, model: str, reading: Reading, report: SourceReport) -> tuple[list[Line], list[str]]:
    """What the tokens say, if the model is at hand: keys for it, and notes."""
    lines: list[Line] = []
    notes, rejected = [], report.rejected
    if locate_model(model) is None:
        notes.append(f"tokens: not counted, because {model} would be fetched from the hub; trimtab check counts them")
    else:
        base = Base.load(ModelConfig(name=model))
        config = DataConfig(train=(train,), eval=0.0, bad_rows="skip", **reading.keys)
        data = load_data(config, base, base.context_length, 0, reading.kind)
        rejected = data.reports[0].rejected
        lengths = [len(row.ids) for row in data.train]
        notes.append(
            f"{sum(lengths):,} tokens of {model}; the longest example has {max(lengths):,}, the context {base.context_length or 0:,}"
        )
        seen = len({(tuple(row.ids), row.side) for row in data.train})
        if seen < len(data.train) and reading.kind == "answers":
            lines.append(("duplicates", "remove", f"exact repetitions of an earlier example: {len(data.train) - seen:,}"))
            notes.append(f"exact repetitions of an earlier example, which are removed: {len(data.train) - seen:,}")
    if rejected:
        where, why = rejected[0]
        lines.append(("bad_rows", "skip", f"examples that can't be used: {len(rejected):,}; the first: {where}: {why}"))
        notes.append(f"examples that can't be used, which are left out: {len(rejected):,}; the first: {where}: {why}")
    return lines, notes


def _held_out(source: Any, count: int, kind: Kind) -> tuple[Any, str]:
    """The value of data.eval, and why."""
    if source is not None:
        return source, "the validation examples beside it"
    if count < 2:
        return 0, "none: a single example leaves nothing to validate on"
    if kind == "judged" and count < 30:
        return 2, "that many are held out as validation examples, because there is no file of them and KTO compares two prompts"
    share = 0.05 if count >= 400 else 0.1
    return share, f"{share:.0%} of them are held out as validation examples, because there is no file of them"


def _reading_lines(reading: Reading) -> Iterator[Line]:
    for key, value in reading.keys.items():
        yield key, list(value) if isinstance(value, tuple) else value, f"inferred: {reading.reason}"


def _shown(example: Example) -> Iterator[str]:
    """An example's texts, a line each turn, shortened."""
    for part, name in zip(parts_of(example), ("chosen", "rejected"), strict=False):
        several = len(parts_of(example)) > 1
        turns = (
            [("text", part.text)]
            if isinstance(part, Text)
            else [(m["role"], m["content"] or "(calls a tool)") for m in part.messages]
        )
        for role, text in turns[-1:] if several and name == "rejected" else turns:
            label = name if several and role == "assistant" else role
            line = " ".join(text.split())
            yield f"{label}: {line[:SHOWN]}{'…' if len(line) > SHOWN else ''}"


def _value(value: Any) -> str:
    """A value in YAML, on one line."""
    if isinstance(value, str):
        return value if yaml12.is_text(value) and not set(value) & set(",[]{}#:&*") else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(inner)}' for key, inner in value.items())}}}"
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list) else str(value)


def _yaml(path: str, model: str, data: list[Line], objective: str, output: str, tests: str | None, example: list[str]) -> str:
    reasons = {"sft": "supervised fine-tuning on the answers", "dpo": "from pairs of answers", "kto": "from judged answers"}
    sections: list[Line] = [
        ("model", model, "the base model: a folder, a hub name or a GGUF file"),
        ("data", None, ""),
        *((f"  {key}", value, why) for key, value, why in data),
        ("method", {"name": "lora", "rank": 16}, "the adapter; `trimtab methods` lists the others"),
        ("objective", objective, reasons[objective]),
        (
            "train",
            {"epochs": "auto", "lr": "auto"},
            "auto: 2 to 4 epochs by the number of examples; the method's learning rate",
        ),
        ("output", output, "the run's folder"),
    ]
    text = f"# Written by `trimtab init {' '.join(path.split())}`. Every key: docs/recipe.md\n"
    for key, value, why in sections:
        written = f"{key}:" if value is None else f"{key}: {_value(value)}"
        text += f"{written:<40}  # {' '.join(why.split())}\n" if why else f"{written}\n"
    if tests is not None:
        text += f"\n# Neither trained nor validated on, for the end: trimtab eval {output} --base --data '{tests}'\n"
    return text + "\n# The first example, as it is read:\n" + "".join(f"#   {line}\n" for line in example)


def default_name(path: str) -> str:
    """A name for the recipe and its run, after the data."""
    stem = Path(path.partition("*")[0].rstrip("/")).name.partition(".")[0].partition(":")[0]
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in stem).strip("-") or "recipe"
