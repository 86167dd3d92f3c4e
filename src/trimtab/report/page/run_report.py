"""The report of a run: one page, from its files alone."""

import shlex
from datetime import datetime
from pathlib import Path

from trimtab.deploy import versions
from trimtab.report.page import texts
from trimtab.report.page.frame import frame
from trimtab.report.page.html import html, joined
from trimtab.report.page.run_files import RunFiles, read_run_files
from trimtab.report.page.sections.certificate import certificate
from trimtab.report.page.sections.commands import commands, recipe
from trimtab.report.page.sections.curves import curves
from trimtab.report.page.sections.data import data
from trimtab.report.page.sections.examples import examples
from trimtab.report.page.sections.facts import cost, trained
from trimtab.report.page.sections.verdict import verdict
from trimtab.report.page.words import fill, say

SECTIONS = (verdict, curves, examples, certificate, data, trained, cost, commands, recipe)
"""In the order of the page."""


def run_report(folder: Path) -> str:
    """The report of a run, finished or not. Raises ArtifactError if the folder is not that of a run."""
    run = read_run_files(folder)
    return frame(
        fill(texts.TITLE, run=folder.name),
        joined([*map(_unreadable, run.unreadable), *(of(run) for of in SECTIONS)]),
        _foot(run),
    )


def _unreadable(message: str) -> str:
    return html('<p class="problem">{words}</p>', words=say(texts.UNREADABLE, what=message))


def _foot(run: RunFiles) -> str:
    command = html("<code>{command}</code>", command=f"trimtab report {shlex.quote(str(run.folder))}")
    when = f"{datetime.now():%Y-%m-%d %H:%M}"
    return joined(
        [
            html("<p>{words}</p>", words=say(texts.WRITTEN, when=when, version=versions()["trimtab"], run=run.folder)),
            html("<p>{words}</p>", words=say(texts.AGAIN, command=command)),
            html("<p>{words}</p>", words=say(texts.RECORDED)),
        ]
    )
