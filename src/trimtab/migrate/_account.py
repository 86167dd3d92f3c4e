"""What became of each setting of a converted file, as text."""

import json
from collections.abc import Iterable
from typing import Any

from trimtab.migrate._settings import Outcome, Setting

TITLES: dict[Outcome, str] = {
    "key": "Converted",
    "derived": "Derived here, or needs no key",
    "missing": "Not there, and why",
    "unknown": "Unknown: not converted",
    "unset": "Not set, or switched off, as here",
}


def account(settings: Iterable[Setting]) -> str:
    """All settings by what became of them."""
    listed = list(settings)
    parts = []
    for outcome, title in TITLES.items():
        if found := [setting for setting in listed if setting.outcome == outcome]:
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in _lines(outcome, found))]))
    return "\n\n".join(parts)


def _lines(outcome: Outcome, found: list[Setting]) -> list[str]:
    if outcome == "unset":
        return [", ".join(dict.fromkeys(setting.name for setting in found))]
    if outcome == "key":
        lines = [
            f"{f'{s.name}: {_short(s.value)}' if s.value is not None else s.name} → {s.key}: {_short(s.here)}" for s in found
        ]
        return [f"{line}{f' ({s.said})' if s.said else ''}" for line, s in zip(lines, found, strict=True)]
    by_reason: dict[str, list[str]] = {}
    for setting in found:
        shown = setting.name if outcome == "derived" else f"{setting.name}: {_short(setting.value)}"
        by_reason.setdefault(setting.said, []).append(shown)
    return [f"{', '.join(dict.fromkeys(names))}: {said}" for said, names in by_reason.items()]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
