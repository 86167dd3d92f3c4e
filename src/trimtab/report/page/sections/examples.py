"""Answers to validation examples before and after training, beside the expected ones."""

from collections.abc import Iterator
from typing import Any

from trimtab.report.page import texts
from trimtab.report.page.difference import marked
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles
from trimtab.report.page.words import Said, fill, number, say

MOST_EXAMPLES = 12
MOST_CHARACTERS = 700
"""Of a text; of a longer one, its beginning and its end."""


def examples(run: RunFiles) -> Html:
    """The sampled answers; without any, those of the certificate; without those, nothing."""
    if run.answers is not None:
        return _sampled(run, run.answers)
    answers = (run.certificate or {}).get("answers", [])
    if not answers:
        return Html("")
    items = joined(
        html("<dt>{n}</dt><dd>{answer}</dd>", n=n + 1, answer=_ended(each, "text")) for n, each in enumerate(answers)
    )
    advice = say(texts.KEEP_SAMPLES) if (run.record.get("objective") or {}).get("name") == "sft" else ""
    about = html('<p class="soft">{words} {advice}</p>', words=say(texts.CERTIFIED_ANSWERS), advice=advice)
    return section("answers", texts.ANSWERS, about, html('<dl class="answers">{items}</dl>', items=items))


def _sampled(run: RunFiles, now: dict[str, Any]) -> Html:
    before = {each.get("where"): each for line in run.samples if line["step"] == 0 for each in line.get("answers", [])}
    answers = now.get("answers", [])[:MOST_EXAMPLES]
    marks = {
        "missing": fill(Html("<ins>{words}</ins>"), words=texts.MISSING),
        "extra": fill(Html("<del>{words}</del>"), words=texts.EXTRA),
    }
    about = say(texts.ABOUT_EXAMPLES, count=len(answers), step=number(now["step"]), **marks)
    shown = [_example(each, before.get(each.get("where")) if now["step"] else None) for each in answers]
    return section("answers", texts.EXAMPLES, html('<p class="soft">{about}</p>', about=about), *shown)


def _example(each: dict[str, Any], before: dict[str, Any] | None) -> Html:
    return html('<dl class="answers">{rows}</dl>', rows=joined(_rows(each, before)))


def _rows(each: dict[str, Any], before: dict[str, Any] | None) -> Iterator[Html]:
    expected, answer = (shortened(str(each.get(key, ""))) for key in ("expected", "answer"))
    missing, extra = marked(expected, answer)
    yield _row(
        texts.QUESTION,
        html('<span class="soft">{where}</span>', where=_place(each)),
        shortened(str(each.get("question", ""))),
        "question",
    )
    yield _row(texts.EXPECTED, None, missing)
    yield _row(texts.WITH_ADAPTER, _result(each), _ended({**each, "answer": extra}, "answer"))
    if before is not None:
        extra = marked(expected, shortened(str(before.get("answer", ""))))[1]
        yield _row(texts.BEFORE_TRAINING, _result(before), _ended({**before, "answer": extra}, "answer"))


def _row(name: Said, beside: Html | None, text: Any, style: str = "") -> Html:
    return html(
        '<dt class="{style}">{name}{beside}</dt><dd class="{style}" dir="auto">{text}</dd>',
        style=style, name=say(name), beside=html("<br>{beside}", beside=beside) if beside else "", text=text,
    )  # fmt: skip


def _place(each: dict[str, Any]) -> str:
    """The file and the line, without its folders."""
    return str(each.get("where", "")).rpartition("/")[2]


def _result(each: dict[str, Any]) -> Html | None:
    if "right" not in each:
        return None
    style, words = ("good", texts.RIGHT) if each["right"] else ("note", texts.WRONG)
    return html('<span class="{style}">{words}</span>', style=style, words=say(words))


def _ended(each: dict[str, Any], key: str) -> Html:
    """An answer, and why it ended if not by itself."""
    text = each.get(key) if isinstance(each.get(key), Html) else shortened(str(each.get(key, "")))
    reason = texts.ENDED.get(str(each.get("ended")))
    return html(
        "{text}{reason}",
        text=text or html('<span class="soft">{words}</span>', words=say(texts.NOTHING_EMPTY)),
        reason=html(' <span class="soft">{words}</span>', words=say(reason)) if reason else "",
    )


def shortened(text: str) -> str:
    """The text, or its beginning and end and how many characters are left out between them."""
    if len(text) <= MOST_CHARACTERS:
        return text
    head, tail = MOST_CHARACTERS * 3 // 4, MOST_CHARACTERS // 4
    return f"{text[:head]} […{number(len(text) - head - tail)}…] {text[-tail:]}"
