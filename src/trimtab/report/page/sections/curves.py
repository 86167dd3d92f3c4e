"""The curves of a run: losses, what the objective measures, learning rate and gradient norm."""

from collections.abc import Iterator

from trimtab.report.page import texts
from trimtab.report.page.curve import Mark, Series, curve
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html
from trimtab.report.page.run_files import RunFiles, band, measures, points, value_of
from trimtab.report.page.scale import Point, smoothed
from trimtab.report.page.words import Said, fill, number, say

SMOOTHED_FROM = 40
"""Steps from which a line of each step is noise, and its running mean is drawn."""


def curves(run: RunFiles) -> Html:
    """Each curve that the run has a value of."""
    drawn = [figure for figure in _figures(run) if figure]
    return section("curves", texts.CURVES, *(drawn or [html("<p>{words}</p>", words=say(texts.NO_CURVES))]))


def _figures(run: RunFiles) -> Iterator[Html]:
    sft = (run.record.get("objective") or {}).get("name") == "sft"
    yield curve("loss", texts.LOSS, [*_training(run, "loss"), *_validation(run)], about=texts.NATS if sft else "")
    names = dict.fromkeys([source for line in run.evaluations for source in line.get("sources", {})])
    yield curve("by-source", texts.BY_SOURCE, [_of_source(run, name) for name in names])
    for n, name in enumerate(dict.fromkeys([*measures(run.evaluations), *measures(run.train)])):
        validation = Series(texts.VALIDATION, points(run.evaluations, name))
        of_run = [*_training(run, name), *([validation] if validation.points else [])]
        yield curve(f"measure-{n}", _name(name), of_run, logarithmic=False)
    for n, name in enumerate(measures(run.samples)):
        yield curve(f"answers-{n}", _name(name), [Series(_name(name), points(run.samples, name))], logarithmic=False)
    yield curve("learning-rate", texts.LEARNING_RATE, [Series(texts.LEARNING_RATE, points(run.train, "lr"))], logarithmic=False)
    norms = _noisy(texts.GRADIENT_NORM, points(run.train, "grad_norm"))
    yield curve("gradient-norm", texts.GRADIENT_NORM, [norms], about=texts.BEFORE_CLIPPING)


def _training(run: RunFiles, name: str) -> list[Series]:
    found = points(run.train, name)
    return [_noisy(texts.TRAINING, found)] if found else []


def _noisy(name: Said, found: list[Point]) -> Series:
    """A line of each step, or its running mean with the line behind it."""
    finite = [(x, y) for x, y in found if abs(y) < float("inf")]
    if len(finite) < SMOOTHED_FROM:
        return Series(name, finite)
    return Series(fill(texts.SMOOTHED, name=name), smoothed(finite), raw=finite)


def _validation(run: RunFiles) -> list[Series]:
    if not run.evaluations:
        return []
    mark, best = None, run.best
    if best is not None:
        loss = value_of(best)
        mark = Mark(best["step"], loss, fill(texts.BEST, loss=number(loss), step=number(best["step"])))
    return [Series(texts.VALIDATION, points(run.evaluations), band(run.evaluations), mark=mark)]


def _of_source(run: RunFiles, name: str) -> Series:
    lines = [
        {**of_source, "step": line["step"]} for line in run.evaluations if (of_source := line.get("sources", {}).get(name))
    ]
    return Series(name, points(lines), band(lines))


def _name(measure: str) -> Said:
    return texts.MEASURES.get(measure, measure.replace("_", " "))
