"""What commands have in common."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@contextmanager
def starting(console: "Console") -> Iterator[None]:
    """Says that the command is at work, while it imports the heavy libraries without looking for garbage."""
    from trimtab.startup import without_collector

    with console.status("[dim]starting …[/]") if console.is_terminal else nullcontext(), without_collector():
        yield


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
