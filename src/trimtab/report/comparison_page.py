"""A comparison of runs as a page."""

from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.report import comparison_words as words
from trimtab.report.compared_run import ComparedRun
from trimtab.report.comparison import Comparison, forgetting, metrics
from trimtab.report.comparison_text import duration, grouped, groups, value_text
from trimtab.report.page import Html, Mark, Said, Series, Words, curve, frame, html, joined, number, say, section
from trimtab.report.page.scale import smoothed

MOST_ANSWERS = 8
"""Questions whose answers are shown side by side."""
LEAST_SMOOTHED = 40
"""Steps from which a mean over 5 % of them is one of several."""


def comparison_html(compared: Comparison) -> str:
    """The whole page."""
    runs = compared.runs
    parts = [
        section("verdicts", words.VERDICTS, *_verdicts(compared)),
        section("runs", words.RUNS, _runs(runs)),
        section("curves", words.CURVES, *_curves(runs)),
        *([section("answers", words.ANSWERS, *answers)] if (answers := list(_answers(runs))) else []),
        section("settings", words.SETTINGS, _differences(compared.settings, runs, words.SETTINGS)),
        section("facts", words.FACTS, _differences(compared.facts, runs, words.FACTS)),
    ]
    return frame(words.HEADING, joined(parts), words.FOOT)


def _verdicts(compared: Comparison) -> Iterator[Html]:
    yield html('<p class="about">{text}</p>', text=say(words.BY_EXAMPLES))
    for pair in compared.ordered:
        shape = '<p class="verdict {kind}">{text}</p>' if len(compared.pairs) == 1 else '<p class="{kind}">{text}</p>'
        yield html(shape, kind="good" if pair.distinguishable else "even", text=say("{said}", said=pair.said))
    for refused in compared.refusals:
        yield html('<p class="note">{text}</p>', text=say("{said}", said=refused))
    for note in compared.notes:
        yield html('<p class="soft">{text}</p>', text=say("{note}", note=note))


def _runs(runs: Sequence[ComparedRun]) -> Html:
    described, rows = [], []
    for run in runs:
        record, best = run.record, run.best
        held = (record.get("memory_held") or {}).get("measured")
        what = html(
            "{base}, {method}, {objective}",
            base=record["base"]["source"],
            method=record["method"]["name"],
            objective=run.objective,
        )
        status = say("{status}", status=words.STATUS.get(run.status, run.status))
        described.append(html("<dt>{name}</dt><dd>{status}<br>{what}</dd>", name=run.name, status=status, what=what))
        values: dict[str, Any] = {
            "run": run.label,
            "before": number(run.before) if run.before is not None else "–",
            "best": number(best["loss"]) if best else "–",
            "step": f"{best['step']:,} / {record['steps']:,}" if best else f"– / {record['steps']:,}",
            "tokens": f"{record['tokens']:,}" if record.get("tokens") else "–",
            "seconds": duration(record["seconds"]) if record.get("seconds") else "–",
            "memory": f"{held / 1e9:.2f} GB" if held else "–",
        }
        rows.append([values[name] for name in words.COLUMNS])
    table = _table(words.RUNS, list(words.COLUMNS.values()), rows, "numbers")
    return html('<dl class="facts">{described}</dl>{table}', described=joined(described), table=table)


def _table(label: Words, head: Sequence[Said], rows: Sequence[Sequence[Any]], kind: str = "") -> Html:
    """A table that can be moved sideways where it is too wide. The first cell of each row names it."""
    body = (
        html(
            '<tr><th scope="row">{first}</th>{cells}</tr>',
            first=row[0],
            cells=joined((html("<td>{c}</td>", c=c) for c in row[1:]), ""),
        )
        for row in rows
    )
    return html(
        '<div class="wide" tabindex="0" role="group" aria-label="{label}"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        "<tbody>{body}</tbody></table></div>",
        label=f"{label.en} · {label.zh}",
        kind=kind,
        head=joined((html('<th scope="col">{h}</th>', h=say(h)) for h in head), ""),
        body=joined(body),
    )


def _curves(runs: Sequence[ComparedRun]) -> Iterator[Html]:
    for place, (title, numbers) in enumerate(groups(runs).items()):
        validation, training = [], []
        for run in (runs[n] for n in numbers):
            points = [(line["step"], line["loss"]) for line in run.evaluations]
            band = [(line["step"], line["low"], line["high"]) for line in run.evaluations if line.get("low") is not None]
            best, named = run.best, words.filled(Words("{run}: best", "{run}：最佳"), run=_plain(run.label))
            mark = Mark(best["step"], best["loss"], named) if best is not None else None
            validation.append(Series(_plain(run.label), points, band if len(numbers) < 4 else (), mark=mark))
            raw = [(line["step"], float(line["loss"])) for line in run.training]
            training.append(Series(_plain(run.label), smoothed(raw)))
        yield curve(f"validation-{place}", words.filled(words.VALIDATION, what=_plain(title)), validation)
        means = words.MEANS if max(len(runs[n].training) for n in numbers) >= LEAST_SMOOTHED else ""
        yield curve(f"training-{place}", words.filled(words.TRAINING, what=_plain(title)), training, about=means)


def _plain(name: str) -> str:
    """A name in which nothing looks like a place to be filled."""
    return name.replace("{", "{{").replace("}", "}}")


def _answers(runs: Sequence[ComparedRun]) -> Iterator[Html]:
    sampled = [(run, values) for run in runs if (values := metrics(run))]
    names = [name for name in dict.fromkeys(name for _, values in sampled for name in values) if name != "answers"]
    if len(sampled) > 1:
        rows = [
            [run.name, *(number(values[name]) if name in values else "–" for name in ("answers", *names))]
            for run, values in sampled
        ]
        yield html("<h3>{text}</h3>", text=say(words.SAMPLED))
        yield _table(words.SAMPLED, [words.COLUMNS["run"], words.NUMBER, *(name.replace("_", " ") for name in names)], rows)
        yield from _side_by_side([run for run, _ in sampled])
    certified = [(run, run.certificate) for run in runs if run.certificate is not None]
    if len(certified) > 1:
        rows = []
        for run, certificate in certified:
            ends, forgotten = [answer["ended"] for answer in certificate["answers"]], forgetting(run)
            rows.append(
                [run.name, f"{ends.count('stopped')} / {len(ends)}", f"{forgotten:+.4f}" if forgotten is not None else "–"]
            )
        yield html("<h3>{text}</h3>", text=say(words.CERTIFIED))
        yield _table(words.CERTIFIED, [words.COLUMNS["run"], words.STOPPED, words.FORGOTTEN], rows)


def _side_by_side(runs: Sequence[ComparedRun]) -> Iterator[Html]:
    """What each run's best adapter answers to the questions that all of them were asked."""
    asked = [{(each["question"], each["expected"]): each["answer"] for each in (run.sampled or {})["answers"]} for run in runs]
    for question, expected in list(asked[0])[:MOST_ANSWERS]:
        if all((question, expected) in of_run for of_run in asked):
            told = [
                html(
                    '<dt class="question">{name}</dt><dd class="question">{text}</dd>', name=say(words.QUESTION), text=question
                )
            ]
            told += [html("<dt>{name}</dt><dd>{text}</dd>", name=say(words.EXPECTED), text=expected)]
            for run, of_run in zip(runs, asked, strict=True):
                told.append(html("<dt>{name}</dt><dd>{text}</dd>", name=run.label, text=of_run[question, expected]))
            yield html('<dl class="answers">{told}</dl>', told=joined(told))


def _differences(differing: Sequence[tuple[str, list[Any]]], runs: Sequence[ComparedRun], label: Words) -> Html:
    if not differing:
        return html("<p>{text}</p>", text=say(words.NO_DIFFERENCE))
    rows = [
        [html("<code>{key}</code>", key=key), value_text(value), ", ".join(run.label for run in having)]
        for key, values in differing
        for value, having in grouped(values, runs)
    ]
    return _table(label, [words.KEY, words.VALUE, words.IN], rows)
