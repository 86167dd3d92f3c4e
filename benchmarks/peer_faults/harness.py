"""How a fault is tried on a peer, and its outcome: refused, warned, silent or right."""

import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LOGGERS = ("", "transformers", "peft", "trl", "accelerate", "datasets")
LONGEST = 170
"""Characters of a message that are kept."""


class Found(NamedTuple):
    """What came of a fault."""

    wrong: bool
    words: str


class Trial(NamedTuple):
    """A fault as a user would meet it, on a peer."""

    fault: str
    peer: str
    about: str
    """What a warning says that is about this fault; others do not count."""
    run: Callable[[Path], Found]


class Refused(Exception):
    """The peer does not do what it was asked to do, and says so."""


TRIALS: dict[str, Trial] = {}
HEARD: list[str] = []
"""What the peers have said since the trial began."""


def trial(fault: str, peer: str, about: str) -> Callable[[Callable[[Path], Found]], Callable[[Path], Found]]:
    """Keep a function as the trial of a fault. It is given an empty folder."""

    def keep(run: Callable[[Path], Found]) -> Callable[[Path], Found]:
        assert fault not in TRIALS, fault
        TRIALS[fault] = Trial(fault, peer, about, run)
        return run

    return keep


def judge(one: Trial, folder: Path) -> dict[str, str]:
    """The outcome of a trial, and its words. Whatever fails outside of `injected` is an error of ours, and is raised."""
    HEARD.clear()
    try:
        found = one.run(folder)
    except Refused as refused:
        return {"peer": one.peer, "outcome": "refused", "words": str(refused)}
    said = next((text for text in HEARD if re.search(one.about, text, flags=re.IGNORECASE)), None)
    if found.wrong and said is not None:
        return {"peer": one.peer, "outcome": "warned", "words": found.words, "said": _brief(said)}
    return {"peer": one.peer, "outcome": "silent" if found.wrong else "right", "words": found.words}


@contextmanager
def injected(note: str = "") -> Iterator[None]:
    """What the user does with the peer: its errors in here are refusals, and its warnings are heard.

    Args:
        note: What is to be known besides the message, if it is refused.
    """
    with _listening():
        try:
            yield
        except Exception as error:
            if _is_ours(error):
                raise
            raise Refused(_first_line(error) + note) from error


def refusal(call: Callable[[], object]) -> str | None:
    """What a peer refuses this with; None if it does it."""
    try:
        with injected():
            call()
    except Refused as refused:
        return str(refused)
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether an error comes from a line of these trials, not from one of the peer's."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename).parent == HERE


def _first_line(error: BaseException) -> str:
    return _brief(str(error)) or type(error).__name__


def _brief(said: str) -> str:
    """The first line of a message, without colours and this machine's folders."""
    line = next(iter(re.sub(r"\x1b\[[\d;]*m", "", said).strip().splitlines()), "")
    line = line.replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), ".").strip()
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rsplit(' ', 1)[0]} …"


class _Ear(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        HEARD.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[None]:
    """Keep what a user would be told: warnings, what is logged as one or worse, and what is written to stderr."""
    ear, loggers, stderr = _Ear(logging.WARNING), [logging.getLogger(name) for name in LOGGERS], os.dup(2)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        for logger in loggers:
            logger.addHandler(ear)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(ear)
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            HEARD.extend([*(str(warning.message) for warning in caught), *file.read().splitlines()])
