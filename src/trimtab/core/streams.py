"""Standard input, output and error: what they can write, that they may be closed, and that no text steers the terminal."""

import codecs
import contextlib
import errno
import io
import os
import re
import sys
from typing import Any

NARROW = "trimtab-narrow"
"""What is done with characters that an encoding does not have."""
_LIKE = {
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
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control codes but the ends of lines and the tab."""
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Of a reader that has left, a terminal that was closed, and a stream that was."""


def ready() -> None:
    """Let every text be written, whatever the encoding, and nowhere if a stream is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would take its place, and get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    codecs.register_error(NARROW, _narrow)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, NARROW), (sys.stderr, NARROW)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def visible(text: str) -> str:
    """The text with its control codes written out, as `cat -v` does: a terminal would obey them."""
    return _STEERING.sub(lambda found: _written(ord(found[0])), text)


def typed(text: str) -> str:
    """A word of the command line as a text: bytes that are none in its encoding are not, but as file names they are kept."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def complain(message: str) -> None:
    """Say something on standard error, if it is there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"trimtab: {visible(message)}\n")
        sys.stderr.flush()


class Lasting:
    """A stream that goes on as if nothing had happened when its reader is gone: who trains need not be watched."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.gone = stream, False

    def write(self, text: str) -> int:
        self._tried(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, act: Any) -> None:
        if self.gone:
            return
        try:
            act()
        except OSError as error:
            if error.errno not in GONE:
                raise
            self.gone = True
            complain("nobody reads standard output any more; the command goes on.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _written(code: int) -> str:
    return f"^{chr(code + 64)}" if code < 32 else "^?" if code == 127 else f"\\x{code:02x}"


def _narrow(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_LIKE.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lost), error.end
