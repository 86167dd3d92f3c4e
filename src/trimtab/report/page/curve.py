"""A curve as inline SVG, with what it shows in a sentence and as a table beside it."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.scale import (
    Band,
    Point,
    Scale,
    fitting,
    spread,
    thinned,
    thinned_band,
    tick_text,
    value_at,
)
from trimtab.report.page.words import Said, Words, both, fill, number, say

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 280, 72, 14, 12, 44
COLORS, DASHES = 6, 4
"""Series beyond them repeat the colors, and their dashes tell them apart."""
MOST_DOTS = 60
"""Points up to which each is shown as a dot that says its values."""
MOST_ROWS = 40
"""Of the table."""
STEP = Words("step", "步")
SHOWN_AS_TABLE = Words("The numbers", "数据表")
EACH = Words("each step", "逐步")
MOST_OF_A_NAME = 60
INTERVAL = Words("{name}: 95 % interval", "{name}：95 % 置信区间")
RANGE = Words("{low} to {high}", "{low} ~ {high}")
SUMMARY = Words(
    "{name}: {first} at {x} {start}, {last} at {x} {end}; lowest {low} at {x} {lowest}, highest {high} at {x} {highest}.",
    "{name}：第 {start} {x}为 {first}，第 {end} {x}为 {last}；最低 {low}（第 {lowest} {x}），最高 {high}（第 {highest} {x}）。",
)
ONE_POINT = Words("{name}: {first} at {x} {start}.", "{name}：第 {start} {x}为 {first}。")
LOGARITHMIC = Words("logarithmic scale", "对数坐标")


class Mark(NamedTuple):
    """A point with a ring around it."""

    x: float
    y: float
    words: Words


class Series(NamedTuple):
    """One line of a drawing. Points whose value is NaN or Inf are gaps. The xs rise."""

    name: Said
    points: Sequence[Point]
    band: Sequence[Band] = ()
    """An interval around it: x, low and high."""
    raw: Sequence[Point] = ()
    """What it is the mean of, drawn thin behind it."""
    mark: Mark | None = None


def curve(
    key: str, caption: Said, series: Sequence[Series], *, x: Words = STEP, logarithmic: bool | None = None, about: Said = ""
) -> Html:
    """A figure of several lines; nothing if no series has a finite value.

    Args:
        key: Names the figure: unique on the page, a word of ASCII letters, digits and hyphens.
        x: What the horizontal axis counts.
        logarithmic: Whether the vertical axis is; None where the values decide.
        about: Stands below the drawing.
    """
    series = [cleaned for one in series if (cleaned := _finite(one)).points]
    if not series:
        return Html("")
    values = [y for one in series for _, y in (*one.points, *one.raw)]
    values += [edge for one in series for _, *edges in one.band for edge in edges]
    xs = [place for one in series for place, _ in (*one.points, *one.raw)]
    across = Scale(min(xs), max(max(xs), min(xs) + 1), LEFT, WIDTH - RIGHT)
    up = fitting(values, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    sentences = [_summary(one, x) for one in series]
    notes = [about] if about else []
    notes += [LOGARITHMIC] if up.logarithmic else []
    return html(
        '<figure id="{key}"><figcaption id="{key}-name">{caption}{notes}</figcaption>\n'
        '<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}-name" aria-describedby="{key}-is">\n'
        "<title>{title}</title><desc>{description}</desc>\n{axes}\n{lines}\n</svg>\n{legend}\n"
        '<p class="soft" id="{key}-is">{sentences}</p>\n{table}\n</figure>',
        key=key,
        caption=say(caption),
        notes=html(' <span class="soft">({notes})</span>', notes=joined(map(say, notes), "; ")) if notes else "",
        width=WIDTH,
        height=HEIGHT,
        title=both(caption),
        description=Html(" ".join(both(sentence) for sentence in sentences)),
        axes=joined(_axes(across, up, x, whole=all(place == int(place) for place in xs))),
        lines=joined(part for n, one in enumerate(series) for part in _drawn(one, n, across, up)),
        legend=_legend(series),
        sentences=joined((say(sentence) for sentence in sentences), "<br>"),
        table=_table(series, x),
    )


def _finite(one: Series) -> Series:
    """Without what can't be drawn, and with a name that fits."""
    name = one.name
    if isinstance(name, str) and len(name) > MOST_OF_A_NAME:
        name = f"{name[: MOST_OF_A_NAME // 2]}…{name[-MOST_OF_A_NAME // 2 :]}"
    points, raw = (tuple(p for p in points if math.isfinite(p[1])) for points in (one.points, one.raw))
    return one._replace(
        name=name, points=points, raw=raw, band=tuple(b for b in one.band if math.isfinite(b[1]) and math.isfinite(b[2]))
    )


def _axes(across: Scale, up: Scale, x: Words, whole: bool) -> Iterator[Html]:
    for tick in up.ticks(6):
        yield html(
            '<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            '<text x="{before}" y="{y}" dy=".35em" text-anchor="end">{text}</text>',
            left=LEFT, right=WIDTH - RIGHT, before=LEFT - 8, y=f"{up(tick):.1f}", text=tick_text(tick),
        )  # fmt: skip
    for tick in across.ticks(6):
        if whole and tick != int(tick):
            continue
        place = across(tick)
        yield html(
            '<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>',
            x=f"{place:.1f}", y=HEIGHT - BOTTOM + 20, anchor="end" if place > WIDTH - 40 else "middle", text=tick_text(tick),
        )  # fmt: skip
    for language, text in fill(x)._asdict().items():
        yield html(
            '<text class="{language}" x="{x}" y="{y}" text-anchor="end">{text}</text>',
            language=language, x=WIDTH - RIGHT, y=HEIGHT - 4, text=text,
        )  # fmt: skip


def _drawn(one: Series, number_of: int, across: Scale, up: Scale) -> Iterator[Html]:
    style = _style(number_of)
    if one.band:
        band = thinned_band(one.band)
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        yield html('<path class="band {style}" d="{path}Z"/>', style=style, path=_path(edge, across, up))
    if one.raw:
        yield html('<path class="raw {style}" d="{path}"/>', style=style, path=_path(thinned(one.raw), across, up))
    yield html('<path class="{style}" d="{path}"/>', style=style, path=_path(thinned(one.points), across, up))
    if len(one.points) <= MOST_DOTS and not one.raw:
        for x, y in one.points:
            yield _dot("dot", style, 2.6, (x, y), across, up, number(y))
    if one.mark is not None and math.isfinite(one.mark.y):
        yield _dot("mark", style, 6.0, one.mark[:2], across, up, both(one.mark.words))


def _dot(kind: str, style: str, radius: float, point: Point, across: Scale, up: Scale, text: str) -> Html:
    x, y = point
    return html(
        '<circle class="{kind} {style}" cx="{cx}" cy="{cy}" r="{radius}"><title>{x}: {text}</title></circle>',
        kind=kind, style=style.split()[0], cx=f"{across(x):.1f}", cy=f"{up(y):.1f}", radius=radius, x=f"{x:,.6g}", text=text,
    )  # fmt: skip


def _style(number_of: int) -> str:
    return f"c{number_of % COLORS + 1} d{number_of % DASHES + 1}"


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return "M" + "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


def _legend(series: Sequence[Series]) -> Html:
    """What each line is; nothing if the caption says it."""
    entries: list[tuple[Html, Html]] = []
    for n, one in enumerate(series):
        style = _style(n)
        entries.append((html('<path class="{style}" d="M0,4H24"/>', style=style), say("{name}", name=one.name)))
        if one.raw:
            entries.append((html('<path class="raw {style}" d="M0,4H24"/>', style=style), say(EACH)))
        if one.band:
            entries.append((html('<path class="band {style}" d="M0,0H24V8H0Z"/>', style=style), say(INTERVAL, name=one.name)))
        if one.mark is not None:
            ring = html('<circle class="mark {style}" cx="12" cy="4" r="3.4"/>', style=style.split()[0])
            entries.append((ring, say(one.mark.words)))
    if len(entries) == 1:
        return Html("")
    items = (
        html('<li><svg class="curve" viewBox="0 0 24 8" aria-hidden="true">{drawn}</svg>{name}</li>', drawn=drawn, name=name)
        for drawn, name in entries
    )
    return html('<ul class="legend">{items}</ul>', items=joined(items, ""))


def _summary(one: Series, x: Words) -> Words:
    points = one.points
    (start, first), (end, last) = points[0], points[-1]
    lowest, low = min(points, key=lambda point: point[1])
    highest, high = max(points, key=lambda point: point[1])
    places = {"start": start, "end": end, "lowest": lowest, "highest": highest}
    values = {"first": first, "last": last, "low": low, "high": high}
    texts = {key: f"{place:,.6g}" for key, place in places.items()} | {key: number(value) for key, value in values.items()}
    return fill(SUMMARY if len(points) > 1 else ONE_POINT, name=one.name, x=x, **texts)


def _table(series: Sequence[Series], x: Words) -> Html:
    few = sorted({place for one in series if len(one.points) <= MOST_DOTS for place, _ in one.points})
    rows = spread(sorted({place for one in series for place, _ in one.points}), few, MOST_ROWS)
    head = Html("".join(f'<th scope="col">{say("{name}", name=one.name)}</th>' for one in series))
    body = (
        html(
            '<tr><th scope="row">{x}</th>{cells}</tr>',
            x=f"{place:,.6g}", cells=Html("".join(f"<td>{_cell(one, place)}</td>" for one in series)),
        )
        for place in rows
    )  # fmt: skip
    return html(
        '<details><summary>{summary}</summary><div class="wide" tabindex="0" role="group" aria-label="{label}"><table class="numbers">'
        '<thead><tr><th scope="col">{x}</th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></details>',
        summary=say(SHOWN_AS_TABLE), label=both(SHOWN_AS_TABLE), x=say(x), head=head, body=joined(body),
    )  # fmt: skip


def _cell(one: Series, place: float) -> Html | str:
    value = value_at(one.points, place)
    if value is None:
        return ""
    interval = next((edges for x, *edges in one.band if x == place), None)
    if interval is None:
        return number(value)
    low, high = map(number, interval)
    return html("{value} ({range})", value=number(value), range=say(RANGE, low=low, high=high))
