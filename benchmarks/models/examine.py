"""One model, asked about from start to end: what Trimtab says of it, what it is, and what follows."""

import math
import re
import tempfile
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from models.configurations import Case, build
from models.measures import MEASURES, LeftOut
from models.references import LONGEST, problem_of
from models.subject import Subject

import trimtab
from trimtab.core.errors import TrimtabError

STATUSES = ("exact by hand", "exact", "refused", "crash", "WRONG", "unbuilt")
OURS = Path(trimtab.__file__).parent
Result = dict[str, Any]


def examine(case: Case, only: Collection[str] = ()) -> Result:
    """What came of a case: its status and the reason, every measure, and what LoRA adapts.

    Args:
        only: The measures to take; all of them unless given.
    """
    started = time.monotonic()
    result: Result = {"case": case.name, "class": case.model, "type": case.kind}
    try:
        model = build(case)
        if problem := problem_of(model):
            return result | {"status": "unbuilt", "reason": problem}
        subject = Subject(model)
    except Exception as error:
        return result | {"status": "unbuilt", "reason": _told(error)}
    result |= examine_model(subject, only)
    return result | {"seconds": round(time.monotonic() - started, 1)}


def examine_model(subject: Subject, only: Collection[str] = ()) -> Result:
    """The same of a model that is built."""
    measured: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        if only and name not in (*only, "check"):
            continue
        if measure.trains and "refused" in measured.get("check", {}):
            continue
        measured[name] = _taken(measure.of, subject)
    result: Result = {"measured": measured, "by_hand": {}}
    if "deviation" in measured["check"]:
        with suppress(Exception):  # that a pack crashes is measured
            result["by_hand"] = subject.parts_by_hand()
    if subject.limit < LONGEST:
        result["limit"] = subject.limit
    if math.isfinite(measured.get("lora", {}).get("deviation", math.inf)):
        result["lora"] = subject.facts()
    return result | dict(zip(("status", "reason"), _status(result), strict=True))


def _taken(of: Any, subject: Subject) -> dict[str, Any]:
    """A measure's deviation, or what it was refused with, the exception it ended with, or why it is left out."""
    try:
        return {"deviation": of(subject)}
    except LeftOut as error:
        return {"left out": _without_folders(str(error))}
    except TrimtabError as error:
        return {"refused": _without_folders(str(error))}
    except Exception as error:
        return {"crash": _told(error)}


def _status(result: Result) -> tuple[str, str]:
    """A case's status, and the reason."""
    measured = result["measured"]
    wrong = [
        f"{n}: off by {m['deviation']:.2g}" for n, m in measured.items() if m.get("deviation", 0.0) > MEASURES[n].tolerance
    ]
    if wrong:
        return "WRONG", "; ".join(wrong)
    if crashes := [f"{name}: {m['crash']}" for name, m in measured.items() if "crash" in m]:
        return "crash", "; ".join(crashes)
    for name in ("check", "fit", "tree"):
        if reason := measured.get(name, {}).get("refused"):
            return "refused", reason
    return "exact by hand" if any("norm" not in part for part in result["by_hand"]) else "exact", ""


def _told(error: BaseException) -> str:
    """An exception's kind, first line and place: the last line of Trimtab's that it passed, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(OURS)]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]])
    lines = str(error).strip().splitlines() or [""]
    message = " ".join(line.strip() for line in lines[:2])[:240]
    return f"{type(error).__name__}: {_without_folders(message)} ({', '.join(places)})"


def _without_folders(message: str) -> str:
    """A message without the names of temporary folders, which are different each time."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+(/\.writing-\w+(-\w+)?)?", "FOLDER", message)


def calm() -> None:
    """One thread, no warnings of Transformers: for a process that examines."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
