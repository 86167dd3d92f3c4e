"""Interrupt signals: the first one ends the command, repeated ones are ignored, and a write in progress is completed."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, `kill`, and a closed terminal or SSH connection."""
INTERRUPTED = 130
"""The exit code of what a signal ends."""
REPEAT_WINDOW = 3.0
"""Seconds after a signal in which further ones are ignored: the first is being handled."""


@contextmanager
def signals_as_keyboard_interrupt(*, ignored_afterwards: bool) -> Iterator[Callable[[], bool]]:
    """Within the block, each signal raises KeyboardInterrupt, unless it repeats another within `REPEAT_WINDOW`.

    A signal that is already ignored (under nohup, for example) stays ignored.

    Args:
        ignored_afterwards: Ignore signals after the block, because the process ends, instead of restoring their handlers.

    Yields:
        A function that tells whether a signal arrived.
    """
    handled = -math.inf

    def handle(*_: Any) -> None:
        nonlocal handled
        if time.monotonic() - handled < REPEAT_WINDOW:
            return
        handled = time.monotonic()
        raise KeyboardInterrupt

    before = _install({number: handle for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)})
    try:
        yield lambda: handled > -math.inf
    finally:
        _install(dict.fromkeys(before, signal.SIG_IGN) if ignored_afterwards else before)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defer signals to the end of the block. Handlers are replaced rather than signals blocked: a signal that the main thread
    blocks is delivered to one of torch's threads instead."""
    pending: list[int] = []
    before = _install(
        {number: lambda number, _: pending.append(number) for number in SIGNALS if callable(signal.getsignal(number))}
    )
    try:
        yield
    finally:
        _install(before)
    for number in pending[:1]:
        signal.raise_signal(number)


@contextmanager
def default_signals() -> Iterator[None]:
    """Within the block, a signal that would raise KeyboardInterrupt ends the process."""
    before = _install({number: signal.SIG_DFL for number in SIGNALS if callable(signal.getsignal(number))})
    try:
        yield
    finally:
        _install(before)


@contextmanager
def noting_interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Within the block, a signal that would raise KeyboardInterrupt calls `note` instead."""
    before = _install({number: lambda *_: note() for number in SIGNALS if callable(signal.getsignal(number))})
    try:
        yield
    finally:
        _install(before)


def _install(handlers: dict[int, Any]) -> dict[int, Callable[..., Any]]:
    """Install handlers, and return the previous ones. In other threads than the main one, where Python forbids it, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[misc]
