"""Curves as text: lines of dots, on which letters say whose they are; in plain ASCII where the encoding has no braille."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.text import Text

HEIGHT = 13
"""Lines of the plot itself."""
LEAST_WIDTH, MOST_WIDTH = 40, 120
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")
MOST_LETTERS = 6
"""On a curve, about."""
SHARED = "*"
"""A place where letters of several curves would stand."""
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a character, the bits of its dots: four lines of two."""

Point = tuple[float, float]


class Curve(NamedTuple):
    """A line of a plot."""

    letter: str
    color: str
    points: Sequence[Point]
    """With rising xs."""


class Cell(NamedTuple):
    """A character of the plot."""

    text: str
    style: str


def letter_of(number: int) -> str:
    return LETTERS[number % len(LETTERS)]


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]


def plot(curves: Sequence[Curve], width: int, *, ascii_only: bool, x: str = "step") -> list[Text]:
    """The lines of a plot of so many columns, axes included; none if no curve has a finite point."""
    curves = [curve._replace(points=[point for point in curve.points if math.isfinite(point[1])]) for curve in curves]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return []
    width = min(MOST_WIDTH, max(LEAST_WIDTH, width))
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    labels = [_label(high - (high - low) * line / (HEIGHT - 1), high - low) for line in range(HEIGHT)]
    margin = max(map(len, labels)) + 1
    columns = width - margin - 1
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    grid = _Grid(columns, (left, max(right, left + 1)), (low, high), ascii_only)
    for curve in curves:
        grid.draw(curve)
    axis, corner, rule = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    lines = []
    for number, row in enumerate(grid.rows()):
        label = labels[number] if number % 3 == 0 else ""
        line = Text(f"{label:>{margin - 1}} {axis}", style="dim")
        for cell in row:
            line.append(cell.text, style=cell.style or None)
        lines.append(line)
    first, last = f"{left:,.6g}", f"{x} {right:,.6g}"
    under = first + " " * max(1, columns - len(first) - len(last)) + last
    return [*lines, Text(f"{'':{margin}}{corner}{rule * columns}", style="dim"), Text(f"{'':{margin + 1}}{under}", style="dim")]


def _label(value: float, span: float) -> str:
    return f"{value:,.{min(6, max(0, 2 - math.floor(math.log10(span))))}f}"


class _Grid:
    """The characters of a plot, of two by four dots each (one, in ASCII)."""

    def __init__(self, columns: int, xs: tuple[float, float], ys: tuple[float, float], ascii_only: bool) -> None:
        self.columns, self.xs, self.ys, self.ascii_only = columns, xs, ys, ascii_only
        self.across, self.down = (1, 1) if ascii_only else (2, 4)
        self.dots: dict[tuple[int, int], tuple[int, str]] = {}
        """By line and column, the bits and the color of the curve that came last."""
        self.letters: dict[tuple[int, int], Cell] = {}

    def draw(self, curve: Curve) -> None:
        """Draw a curve over those that are there."""
        places = [self._place(point) for point in curve.points]
        for start, end in zip(places, places[1:] or places, strict=False):
            for column, row in _line(start, end):
                self._dot(column, row, curve.color)
        every = max(1, -(-len(places) // MOST_LETTERS))
        lowest = min(range(len(places)), key=lambda n: curve.points[n][1], default=0)
        for number, (column, row) in enumerate(places):
            if number % every == 0 or number in (lowest, len(places) - 1):
                key = row // self.down, column // self.across
                other = self.letters.get(key)
                shared = other is not None and other.text != curve.letter
                self.letters[key] = Cell(SHARED, "bold") if shared else Cell(curve.letter, f"bold {curve.color}")

    def rows(self) -> Iterator[list[Cell]]:
        for row in range(HEIGHT):
            yield [self._cell(row, column) for column in range(self.columns)]

    def _cell(self, row: int, column: int) -> Cell:
        if letter := self.letters.get((row, column)):
            return letter
        bits, color = self.dots.get((row, column), (0, ""))
        return Cell(" " if not bits else "." if self.ascii_only else chr(0x2800 + bits), color)

    def _dot(self, column: int, row: int, color: str) -> None:
        key = row // self.down, column // self.across
        bit = 1 if self.ascii_only else _BRAILLE[row % 4][column % 2]
        self.dots[key] = self.dots.get(key, (0, ""))[0] | bit, color

    def _place(self, point: Point) -> tuple[int, int]:
        """The column and row of dots."""
        shares = ((value - low) / (high - low) for value, (low, high) in zip(point, (self.xs, self.ys), strict=True))
        across, up = shares
        return round(across * (self.columns * self.across - 1)), round((1 - up) * (HEIGHT * self.down - 1))


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots between two."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for n in range(steps + 1):
        yield round(start[0] + (end[0] - start[0]) * n / steps), round(start[1] + (end[1] - start[1]) * n / steps)
