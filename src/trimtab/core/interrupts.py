"""Ctrl-C and its like: the first ends the command, what is being written is written to its end, and more of them change nothing."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, `kill`, and the end of a terminal or of an SSH connection."""
AT_ONCE = 3.0
"""Seconds in which further ones are impatience: the first is being obeyed."""


@contextmanager
def as_keyboard_interrupt(*, to_the_end: bool) -> Iterator[Callable[[], bool]]:
    """Within the block each of these signals raises KeyboardInterrupt, but for those that come at once after another.

    One that is ignored (under nohup, say) stays so.

    Args:
        to_the_end: The process ends after the block, so they are ignored from then on, instead of as they were before.

    Yields:
        A function that says whether one came.
    """
    obeyed = -math.inf

    def obey(*_: Any) -> None:
        nonlocal obeyed
        if time.monotonic() - obeyed < AT_ONCE:
            return
        obeyed = time.monotonic()
        raise KeyboardInterrupt

    before = _replaced({number: obey for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)})
    try:
        yield lambda: obeyed > -math.inf
    finally:
        _replaced(dict.fromkeys(before, signal.SIG_IGN) if to_the_end else before)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """An interruption of this block comes at its end. Handlers are replaced rather than signals blocked: a signal that the main
    thread blocks is given to one of torch's, and acts all the same."""
    came: list[int] = []
    before = _replaced(
        {number: lambda number, _: came.append(number) for number in SIGNALS if callable(signal.getsignal(number))}
    )
    try:
        yield
    finally:
        _replaced(before)
    for number in came[:1]:
        signal.raise_signal(number)


def _replaced(handlers: dict[int, Any]) -> dict[int, Callable[..., Any]]:
    """Install handlers; those that were there before. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[misc]
