"""What was trained, where, and what that took."""

from collections.abc import Iterable, Iterator
from typing import Any

from trimtab.report.page import texts
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles
from trimtab.report.page.words import Said, Words, fill, number, say

Fact = tuple[Said, Any]


def trained(run: RunFiles) -> Html:
    """Base model, method, objective, steps, device and versions."""
    return section("trained", texts.TRAINED, _listed(_trained(run.record)))


def cost(run: RunFiles) -> Html:
    """Time, memory and tokens; nothing before they are known."""
    facts = list(_cost(run.record))
    return section("cost", texts.COST, _listed(facts)) if facts else Html("")


def _listed(facts: Iterable[Fact]) -> Html:
    rows = joined(
        html("<dt>{name}</dt><dd>{value}</dd>", name=say(name), value=say(value) if isinstance(value, Words) else value)
        for name, value in facts
        if value not in (None, "")
    )
    return html('<dl class="facts">\n{rows}\n</dl>', rows=rows)


def _trained(record: dict[str, Any]) -> Iterator[Fact]:
    base, method, objective = (record.get(key) or {} for key in ("base", "method", "objective"))
    frozen, ours = record.get("base_parameters"), record.get("trainable_parameters")
    yield texts.BASE_MODEL, base.get("source")
    yield texts.FINGERPRINT, _code(str((base.get("fingerprint") or {}).get("weights", ""))[:16])
    yield texts.METHOD, _settings(method)
    if frozen and ours is not None:
        share = f"{ours / frozen:.2%}".removesuffix("%")
        yield texts.TRAINABLE, fill(texts.TRAINED_PARAMETERS, trained=number(ours), frozen=number(frozen), share=share)
    yield texts.MODULES, _plain(method.get("targets"))
    yield texts.FROZEN_MODULES, record.get("left_frozen")
    yield texts.VIRTUAL, record.get("positions") or None
    yield texts.OBJECTIVE, _settings(objective)
    if reference := record.get("reference"):
        yield texts.REFERENCE, texts.REFERENCES.get(reference.get("kind"), str(reference.get("kind")))
    if start := record.get("start"):
        yield texts.STARTED_FROM, start.get("folder")
    if "steps" in record:
        rows, epochs = (f"{record.get(key, 0):.4g}" for key in ("rows_per_step", "epochs"))
        yield texts.STEPS, fill(texts.STEPS_TEXT, steps=number(record["steps"]), rows=rows, epochs=epochs)
    if "peak_lr" in record:
        formula = record.get("lr_formula")
        rate = number(record["peak_lr"])
        yield texts.LEARNING_RATE, fill(texts.RATE_TEXT, rate=rate, formula=texts.GIVEN if formula == "given" else str(formula))
    if best := record.get("best"):
        yield texts.ADAPTER_STEP, fill(texts.ADAPTER_TEXT, step=number(best["step"]), folder=best["folder"])
    yield texts.DEVICE, record.get("device")
    yield texts.THREADS, record.get("threads")
    yield texts.STARTED, str(record.get("moment", "")).partition(".")[0].replace("T", " ")
    yield texts.VERSIONS, ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


def _cost(record: dict[str, Any]) -> Iterator[Fact]:
    seconds, tokens, computed = (record.get(key) for key in ("seconds", "tokens", "computed_tokens"))
    if seconds:
        yield texts.TIME, fill(texts.TIME_TEXT, time=_duration(seconds), rate=number(round((tokens or 0) / seconds)))
    if held := record.get("memory_held"):
        sizes = {key: f"{held[key] / 1e9:.2f}" for key in ("measured", "planned", "before") if key in held}
        if len(sizes) == 3:
            yield texts.MEMORY_HELD, fill(texts.MEMORY_TEXT, **sizes)
    if memory := record.get("memory"):
        yield texts.PLAN, html('<span lang="en">{memory}</span>', memory=memory)
    if tokens:
        yield texts.TOKENS_GIVEN, number(tokens)
    if tokens and computed:
        words = fill(texts.PROCESSED_TEXT, count=number(computed), share=f"{100 * computed / tokens:.0f}")
        yield texts.TOKENS_PROCESSED, words


def _duration(seconds: float) -> Words:
    if seconds < 90:
        return fill(texts.SECONDS, n=f"{seconds:.0f}")
    return fill(texts.MINUTES, n=f"{seconds / 60:.0f}") if seconds < 5400 else fill(texts.HOURS, n=f"{seconds / 3600:.1f}")


def _settings(chosen: dict[str, Any]) -> str:
    """A method or an objective with its settings; empty ones are left out."""
    settings = (f"{key} {text}" for key, value in chosen.items() if key not in ("name", "targets") and (text := _plain(value)))
    return f"{chosen.get('name', '')}: {', '.join(settings)}".removesuffix(": ")


def _plain(value: Any) -> str:
    if value in (None, [], {}):
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _code(text: str) -> Html | str:
    return html("<code>{text}…</code>", text=text) if text else ""
