"""The results of a comparison as a table and as a chart."""

from typing import Any
from xml.sax.saxutils import escape as escape_xml

from rich import box
from rich.markup import escape
from rich.table import Table


def comparison_table(results: list[dict[str, Any]], title: str) -> Table:
    """A line for each trainer: medians; how many times as fast Trimtab is, in which part of the memory; how far the losses are apart."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("tok/s", "rows/min", "GB", "floor", "faster", "memory", "losses"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        is_trimtab = result["trainer"] == "trimtab"
        distance = "–" if is_trimtab or result["loss_distance"] is None else f"{result['loss_distance']:.0e}"
        table.add_row(
            escape(result["trainer"]),
            f"{result['tokens_per_s']:.1f}",
            f"{result['rows_per_min']:.1f}",
            f"{result['peak_rss_gb']:.2f}",
            "–" if result["gemm_floor_fraction"] is None else f"{result['gemm_floor_fraction']:.0%}",
            "" if is_trimtab else f"{result['trimtab_is_faster']:.2f}x",
            "" if is_trimtab else f"{result['trimtab_memory']:.2f}",
            distance,
        )
    return table


BAR, GAP, LEFT, WIDE = 22, 10, 190, 360


def comparison_chart(results: list[dict[str, Any]], title: str) -> str:
    """Speed and memory as bars: an SVG picture."""
    rows = len(results)
    height = 60 + rows * (BAR + GAP)
    halves = [("tokens/s", "tokens_per_s", "{:.0f}"), ("peak memory, GB", "peak_rss_gb", "{:.2f}")]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + 2 * (WIDE + 80)}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape_xml(title)}</text>',
    ]
    for row, result in enumerate(results):
        y = 50 + row * (BAR + GAP)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end">{escape_xml(result["trainer"])}</text>')
    for half, (label, key, shape) in enumerate(halves):
        left, most = LEFT + half * (WIDE + 80), max(result[key] for result in results)
        parts.append(f'<text x="{left}" y="42" fill="#555">{label}</text>')
        for row, result in enumerate(results):
            y, width = 50 + row * (BAR + GAP), max(1.0, WIDE * result[key] / most)
            colour = "#1f6feb" if result["trainer"] == "trimtab" else "#9aa4af"
            parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{left + width + 6:.1f}" y="{y + 16}">{shape.format(result[key])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
