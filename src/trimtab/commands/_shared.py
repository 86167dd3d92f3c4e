"""What commands have in common."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@contextmanager
def doing(console: "Console") -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is being done within, at first that the command starts."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("[dim]starting …[/]") as status:
        yield lambda what: status.update(f"[dim]{what} …[/]")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
