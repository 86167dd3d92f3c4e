"""The console through which everything is shown: no text of a file or a model can steer the terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status

from trimtab.core.streams import escape_controls


class SafeConsole(Console):
    """Rich's console. What it writes to steer the terminal is its own; control codes in texts are written out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        raise

    def status(self, status: RenderableType, *, spinner: str = "", **more: Any) -> Status:
        """With a spinner that the encoding has."""
        return super().status(status, spinner=spinner or ("line" if self.options.ascii_only else "dots"), **more)
