"""What commands show, and while they show it."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from trimtab.core.files import to_json
from trimtab.core.streams import PipeTolerantStream, escape_controls

if TYPE_CHECKING:
    from rich.console import Console


def terminal(*, lasting: bool = False) -> "Console":
    """The console on standard output.

    Args:
        lasting: Continue when nobody reads any more.
    """
    from trimtab.commands._console import SafeConsole

    return SafeConsole(highlight=False, soft_wrap=True, file=cast(IO[str], PipeTolerantStream(sys.stdout)) if lasting else None)


def say(text: str, end: str = "\n") -> None:
    """Plain text on standard output, at once."""
    print(escape_controls(text), end=end, flush=True)  # noqa: T201


@contextmanager
def status(console: "Console") -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done within the block, at first that the command starts."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("[dim]starting …[/]") as line:
        yield lambda stage: line.update(f"[dim]{stage} …[/]")


def print_json(value: Any) -> None:
    """Characters as they are, where they can be written and do not steer the terminal."""
    narrow = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(to_json(value), indent=2, ensure_ascii=narrow, allow_nan=False)
    print(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))  # noqa: T201
