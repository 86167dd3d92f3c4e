"""Pages for people: one HTML file each, that needs nothing else."""

from trimtab.report.page.curve import Mark, Series, curve
from trimtab.report.page.frame import frame, section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.words import Said, Words, both, fill, number, say

__all__ = [
    "Html",
    "Mark",
    "Said",
    "Series",
    "Words",
    "both",
    "curve",
    "fill",
    "frame",
    "html",
    "joined",
    "number",
    "say",
    "section",
]
