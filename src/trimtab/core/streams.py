"""Standard input, output and error: encodings, closed streams, and terminal control codes in texts."""

import codecs
import contextlib
import errno
import io
import os
import re
import sys
from typing import IO, Any

ASCII_FALLBACK = "trimtab-ascii"
"""The error handler for characters that an encoding does not have."""
_SIMILAR = {
    "…": "...",
    "–": "-",
    "—": "-",
    "·": "-",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
}
_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control codes except line feed and tab."""
DISCONNECTED = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a pipe without a reader, a closed terminal, and a closed stream."""


def configure() -> None:
    """Let every text be written in any encoding, and to the null device if a stream is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened takes its number, and receives what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    codecs.register_error(ASCII_FALLBACK, _replace_unencodable)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, ASCII_FALLBACK), (sys.stderr, ASCII_FALLBACK)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def escape_controls(text: str) -> str:
    """The text with control codes escaped, as by `cat -v`: a terminal would execute them."""
    return _CONTROL_CODES.sub(lambda match: _escaped(ord(match[0])), text)


def replace_surrogates(text: str) -> str:
    """A command-line argument as valid Unicode: bytes invalid in its encoding arrive as surrogates, which file names keep."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def write_stderr(message: str) -> None:
    """Write a message to standard error, if it is open."""
    write_message(sys.stderr, message)


def write_message(stream: IO[str], message: str) -> None:
    """Write a message to a stream, if it is open."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"trimtab: {escape_controls(message)}\n")
        stream.flush()


class PipeTolerantStream:
    """A stream that discards its output once the reader has disconnected, so that training continues."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.disconnected = stream, False

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, operation: Any) -> None:
        if self.disconnected:
            return
        try:
            operation()
        except OSError as error:
            if error.errno not in DISCONNECTED:
                raise
            self.disconnected = True
            write_stderr("standard output is closed; the command continues.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _escaped(code: int) -> str:
    return f"^{chr(code + 64)}" if code < 32 else "^?" if code == 127 else f"\\x{code:02x}"


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_SIMILAR.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end
