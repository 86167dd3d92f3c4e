"""A command as one of several processes: one of them speaks, and they end together."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

from trimtab.core import streams
from trimtab.core.errors import ProcessLost, TrimtabError
from trimtab.core.processes import processes
from trimtab.launch.watch import End, First, Other

SETTINGS = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Of torch, which warns of host names and of connections that their end closes."""


def run_together(command: Callable[[], int], end_of: Callable[[BaseException], End | None]) -> int:
    """Carry a command out in this process, one of several; returns process 0's exit code. An error, or the loss of another process, ends
    this process.

    Args:
        end_of: The exit code of an error and what is said of it; None for its traceback.
    """
    debug, processes.watched = "--debug" in sys.argv, True
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    say = _voice()
    if processes.rank > 0 and not debug:
        _mute()
    watch = (First if processes.rank == 0 else Other)(processes, say, _leave)
    try:
        processes.connect()
        watch.start()
        processes.open()
        code = command()
        code = processes.told_by_first(lambda: code)
        watch.over()
        processes.close()
    except BaseException as error:
        end = None if debug and isinstance(error, TrimtabError | OSError) else end_of(error)
        watch.leave_with(end or End(1, "".join(traceback.format_exception(error)).rstrip()), _is_doubtful(error))
        raise
    return code


def _is_doubtful(error: BaseException) -> bool:
    """Whether it may be what the end of another process has led to: a launcher interrupts those that are left."""
    if isinstance(error, KeyboardInterrupt):
        return not processes.told_to_stop
    return isinstance(error, ProcessLost) or not isinstance(error, TrimtabError)


def _voice() -> Callable[[str], None]:
    """What writes to standard error, also while that is led elsewhere to silence a library."""
    number, encoding = os.dup(2), sys.stderr.encoding

    def say(text: str) -> None:
        stream = os.fdopen(number, "w", encoding=encoding, errors=streams.ASCII_FALLBACK, closefd=False)
        with contextlib.suppress(OSError), stream:  # of which nobody may read
            streams.write_message(stream, text)

    return say


def _mute() -> None:
    """Let whatever this process and its libraries say go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _leave(code: int) -> None:
    """End this process without what Python and torch do at the end: groups wait there for processes that have gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
