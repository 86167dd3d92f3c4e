"""Runs compared: how far their losses are apart on the examples that they have in common, and what differs in how they were made."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from trimtab.data import READING
from trimtab.evaluate import paired_difference
from trimtab.evaluate.comparisons import holm, sign_flip_p
from trimtab.evaluate.example_losses import ExampleLosses, LossExample
from trimtab.evaluate.intervals import LEVEL, Interval
from trimtab.objectives import Objective
from trimtab.report import comparison_words as words
from trimtab.report.compared_run import ComparedRun, flattened, open_runs
from trimtab.report.page import Words

UNITS = {"answers": Words("a token", "每词元"), "pairs": Words("a pair", "每对"), "judged": Words("an answer", "每条回答")}
"""What a loss is the mean over, by what an objective trains on."""
BY_BYTE = Words("a byte of the answers", "回答的每字节")
OWN_KEYS = ("output", "resume")
"""Keys of a recipe that say nothing about what was trained."""
FACTS = (
    "data_digest", "base.source", "base.fingerprint", "peak_lr", "lr_formula", "steps", "trainable_parameters", "device",
    "threads", "versions",
)  # fmt: skip
"""What run.json knows beyond the recipe, and may be the reason of a difference."""


SAME = {"peak_lr": "train.lr", "base.source": "model.name"}
"""Facts that repeat a key of the recipe, if that is not `auto` or another name."""


@dataclass(frozen=True)
class Pair:
    """Two runs' best adapters on the validation examples that both have."""

    first: str
    second: str
    common: int = 0
    of: tuple[int, int] = (0, 0)
    """How many each of them has."""
    unit: Words = words.NOTHING
    value: float = 0.0
    """The second's loss minus the first's."""
    interval: Interval = (0.0, 0.0)
    p: float = 1.0
    adjusted: float = 1.0
    """p, adjusted for the number of comparisons."""
    identical: bool = False
    too_few: bool = False
    """Whether no difference on so few examples could be distinguished among so many comparisons."""
    refused: Words | None = None
    """Why their losses are not compared."""

    @property
    def distinguishable(self) -> bool:
        return self.refused is None and self.adjusted < LEVEL

    @property
    def said(self) -> Words:
        """The verdict."""
        names: dict[str, Any] = {"first": self.first, "second": self.second}
        if self.refused is not None:
            return words.filled(words.REFUSED, **names, why=self.refused)
        names |= {"examples": words.common(self.common, self.of), "unit": self.unit, "p": p_text(self.adjusted)}
        if self.identical:
            return words.filled(words.IDENTICAL, **names)
        if not self.distinguishable:
            names["verdict"] = words.TOO_FEW_TO_TELL if self.too_few else words.EVEN
            low, high = (f"{end:+.4f}" for end in self.interval)
            return words.filled(words.NOT_DISTINGUISHABLE, **names, value=f"{self.value:+.4f}", low=low, high=high)
        sign = -1 if self.value < 0 else 1
        low, high = (f"{end:.4f}" for end in sorted(sign * end for end in self.interval))
        names |= {"better": self.second, "worse": self.first} if sign < 0 else {"better": self.first, "worse": self.second}
        return words.filled(words.BETTER, **names, value=f"{abs(self.value):.4f}", low=low, high=high)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        texts: dict[str, Any] = {"unit": self.unit.en, "refused": self.refused and self.refused.en, "words": self.said.en}
        return {**asdict(self), **texts, "distinguishable": self.distinguishable}


@dataclass(frozen=True)
class Comparison:
    """Several runs, and what there is to say of each two of them."""

    runs: list[ComparedRun]
    pairs: list[Pair]
    settings: list[tuple[str, list[Any]]]
    """Keys of the recipes that differ, with each run's value."""
    facts: list[tuple[str, list[Any]]]
    """What else differs."""

    @property
    def ordered(self) -> list[Pair]:
        """The pairs that were compared, the clearest differences first."""
        tested = [pair for pair in self.pairs if pair.refused is None]
        return sorted(tested, key=lambda pair: (not pair.distinguishable, pair.adjusted))

    @property
    def refusals(self) -> list[Words]:
        """The pairs that were not compared, together with those that were not for the same reason."""
        reasons: dict[Words, list[str]] = {}
        for pair in self.pairs:
            if pair.refused is not None:
                reasons.setdefault(pair.refused, []).append(f"{pair.first} – {pair.second}")
        return [words.filled(words.REFUSED_PAIRS, pairs=", ".join(pairs), why=why) for why, pairs in reasons.items()]

    @property
    def notes(self) -> list[Words]:
        """What to know about the verdicts."""
        tested = [pair for pair in self.pairs if pair.refused is None]
        notes = [words.filled(words.ADJUSTED, count=f"{len(tested):,}")] if len(tested) > 1 else []
        few = min((pair.common for pair in tested if pair.too_few), default=None)
        notes += [words.filled(words.TOO_FEW, common=few, count=f"{len(tested):,}")] if few is not None else []
        return [*notes, *([words.BY_BYTES] if any(pair.unit == BY_BYTE for pair in tested) else [])]

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "runs": [run_facts(run) for run in self.runs],
            "comparisons": [pair.plain() for pair in self.pairs],
            "notes": [note.en for note in self.notes],
            "settings": [{"key": key, "values": values} for key, values in self.settings],
            "facts": [{"key": key, "values": values} for key, values in self.facts],
        }


def compare(folders: list[Path]) -> Comparison:
    """Compare the runs in these folders. Raises RecipeError or ArtifactError: see `open_runs`."""
    runs = open_runs(folders)
    settings = _differing([{k: v for k, v in run.recipe.items() if k not in OWN_KEYS} for run in runs])
    facts = _differing([_known(run) for run in runs])
    pairs = list(combinations(runs, 2))
    compared = [_compare(first, second, len(pairs)) for first, second in pairs]
    return Comparison(runs, _adjusted(compared), settings, facts)


def _adjusted(compared: list[Pair]) -> list[Pair]:
    """The pairs with p adjusted for how many were compared."""
    tested = [pair for pair in compared if pair.refused is None]
    adjusted = iter(holm([pair.p for pair in tested]))
    return [
        pair
        if pair.refused is not None
        else replace(pair, adjusted=next(adjusted), too_few=2.0 ** (1 - pair.common) * len(tested) >= LEVEL)
        for pair in compared
    ]


def run_facts(run: ComparedRun) -> dict[str, Any]:
    """A run by itself, as JSON data."""
    best, held = run.best, run.record.get("memory_held") or {}
    certificate = run.certificate or {}
    return {
        "run": run.name,
        "status": run.status,
        "base": run.record["base"]["source"],
        "method": run.record["method"],
        "objective": run.record["objective"],
        "examples": len(run.data.get("held_out") or []),
        "before": run.before,
        "best": best and {key: best.get(key) for key in ("step", "loss", "low", "high", "rows")},
        "steps": run.record["steps"],
        "tokens": run.record.get("tokens"),
        "seconds": run.record.get("seconds"),
        "memory": held.get("measured"),
        "validation": [[line["step"], line["loss"], line.get("low"), line.get("high")] for line in run.evaluations],
        "training": [[line["step"], line["loss"]] for line in run.training],
        "metrics": metrics(run),
        "forgetting": forgetting(run),
        "answers": certificate.get("answers"),
        "recipe_error": run.recipe_error,
    }


def metrics(run: ComparedRun) -> dict[str, Any]:
    """What the best adapter's answers to the sampled examples measure, with their number; empty if there are none."""
    sampled = run.sampled
    if sampled is None or not isinstance(sampled.get("answers"), list):
        return {}
    values = {
        key: value
        for key, value in sampled.items()
        if key not in ("kind", "step", "answers") and isinstance(value, float | int)
    }
    return {**values, "answers": len(sampled["answers"])}


def forgetting(run: ComparedRun) -> float | None:
    """By how much the certified adapter's loss on general text is higher than the base model's, in nats a token."""
    losses = (run.certificate or {}).get("losses") or {}
    try:
        return float(losses["adapter"]["general"] - losses["base"]["general"])
    except (KeyError, TypeError):
        return None


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _known(run: ComparedRun) -> dict[str, Any]:
    leaves = dict(flattened(run.record))
    found = {key: value for fact in FACTS for key, value in leaves.items() if key == fact or key.startswith(f"{fact}.")}
    return {key: value for key, value in found.items() if run.recipe.get(SAME.get(key, key)) != value}


def _differing(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The keys of which not all runs have the same value; None where a run lacks it. Of a method or an objective that only some have,
    its name says enough."""
    found = [(key, [run.get(key) for run in runs]) for key in dict.fromkeys(key for run in runs for key in run)]
    return [(key, values) for key, values in found if any(value != values[0] for value in values) and not _by_name(key, runs)]


def _by_name(key: str, runs: Sequence[dict[str, Any]]) -> bool:
    """Whether a key belongs to some runs' method or objective alone, and is the same in all of them."""
    section = key.partition(".")[0]
    having = [run[key] for run in runs if key in run]
    other = any(run.get(f"{section}.name") != runs[0].get(f"{section}.name") for run in runs)
    return (
        section in ("method", "objective") and other and len(having) < len(runs) and all(value == having[0] for value in having)
    )


def _compare(first: ComparedRun, second: ComparedRun, comparisons: int) -> Pair:
    pair = Pair(first.name, second.name)
    if problem := _not_comparable(first, second):
        return replace(pair, refused=problem)
    ours, theirs = first.losses, second.losses
    assert ours is not None, "else not comparable"
    assert theirs is not None
    by_text = first.fingerprint.get("tokenizer") != second.fingerprint.get("tokenizer")
    mine, other = (_by_key(run, losses, by_text) for run, losses in ((first, ours), (second, theirs)))
    common = [key for key in mine if key in other]
    sizes = (len(ours.examples), len(theirs.examples))
    if Objective.pick(first.record["objective"]).estimates_kl and not len(common) == sizes[0] == sizes[1]:
        return replace(pair, of=sizes, refused=words.filled(words.WHOLE_SET, name=first.objective))
    if len(common) < 2:
        none = words.NONE_COMMON if not common else words.ONE_COMMON
        return replace(pair, of=sizes, refused=words.filled(none, first=f"{sizes[0]:,}", second=f"{sizes[1]:,}"))
    a, b = ([losses.best[place] for key in common for place in (of[key],)] for losses, of in ((ours, mine), (theirs, other)))
    examples = [ours.examples[mine[key]] for key in common]
    counts = [float(each.size) if by_text else each.items for each in examples]
    value, interval = paired_difference(b, a, counts)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    unit = BY_BYTE if by_text else UNITS[Objective.pick(first.record["objective"]).data_kind]
    p = sign_flip_p(differences, comparisons)
    return Pair(first.name, second.name, len(common), sizes, unit, value, interval, p, identical=not any(differences))


def _not_comparable(first: ComparedRun, second: ComparedRun) -> Words | None:
    """Why two runs' losses can't be compared, before their examples are looked at; None if they can."""
    if first.objective != second.objective:
        return words.filled(words.OBJECTIVES, objectives=", ".join(sorted((first.objective, second.objective))))
    ours, theirs = (dict(run.record["objective"], reference=None) for run in (first, second))
    for key in ours:
        if ours[key] != theirs.get(key):
            return words.filled(words.SETTING, key=f"objective.{key}", first=ours[key], second=theirs.get(key))
    if _reference(first) != _reference(second):
        return words.REFERENCES
    for run in (first, second):
        if run.losses is None:
            return run.why_no_losses()
    if first.fingerprint.get("tokenizer") == second.fingerprint.get("tokenizer"):
        return None
    if first.objective != "sft":
        return words.filled(words.TOKENIZERS, name=first.objective)
    for key in (f"data.{name}" for name in READING):
        leaves = [{k: v for k, v in run.recipe.items() if k == key or k.startswith(f"{key}.")} for run in (first, second)]
        if leaves[0] != leaves[1]:
            return words.filled(words.READ_OTHERWISE, key=key)
    return None


def _reference(run: ComparedRun) -> Any:
    return (run.record.get("reference") or {}).get("identity")


def _by_key(run: ComparedRun, losses: ExampleLosses, by_text: bool) -> dict[tuple[str, ...], int]:
    """The place of each example by what it is recognized by; one that is there twice has two."""
    found, times = dict[tuple[str, ...], int](), Counter[tuple[str, ...]]()
    for place, example in enumerate(losses.examples):
        key = _text_key(run, example) if by_text else (example.digest,)
        if key is not None:
            found[*key, str(times[key])] = place
            times[key] += 1
    return found


def _text_key(run: ComparedRun, example: LossExample) -> tuple[str, ...] | None:
    """A line of a file of this content, and the text of it that is trained on; None if it is not known."""
    for name, digest in (run.data.get("files") or {}).items():
        if example.text is not None and example.where.startswith(f"{name}:"):
            return digest, example.where.removeprefix(f"{name}:"), example.text
    return None
