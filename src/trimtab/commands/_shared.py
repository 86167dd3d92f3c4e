"""What commands have in common."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from trimtab.core.files import as_json
from trimtab.core.streams import Lasting, visible

if TYPE_CHECKING:
    from rich.console import Console


def terminal(*, lasting: bool = False) -> "Console":
    """Where things are shown.

    Args:
        lasting: Go on when nobody reads any more.
    """
    from trimtab.commands._door import Door

    return Door(highlight=False, soft_wrap=True, file=cast(IO[str], Lasting(sys.stdout)) if lasting else None)


def say(text: str, end: str = "\n") -> None:
    """Plain text on standard output, at once."""
    print(visible(text), end=end, flush=True)  # noqa: T201


@contextmanager
def doing(console: "Console") -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done within, at first that the command starts."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("[dim]starting …[/]") as status:
        yield lambda what: status.update(f"[dim]{what} …[/]")


def print_json(value: Any) -> None:
    """Characters as they are, where they can be written and do not steer the terminal."""
    narrow = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(as_json(value), indent=2, ensure_ascii=narrow, allow_nan=False)
    print(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))  # noqa: T201
