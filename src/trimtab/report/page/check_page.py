"""The page of `trimtab check --html`: the checks before training, and the tokenized examples with their target tokens marked."""

from collections.abc import Sequence
from typing import Any

from trimtab.data import Finding
from trimtab.report.checks import histogram, place_of, verdict
from trimtab.report.page import texts
from trimtab.report.page.frame import frame, section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.sections.certificate import finding
from trimtab.report.page.words import Words, fill, number, say

BAR = '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect width="{width}" height="10"/></svg>'


def checks_page(findings: Sequence[Finding], rows: Sequence[dict[str, Any]], about: Sequence[str], recipe: str) -> str:
    """One self-contained HTML page.

    Args:
        about: What was checked: the recipe's file, the model, the date.
        recipe: The whole recipe, as YAML.
    """
    status, _ = verdict(findings)
    body = [
        html('<p class="about">{about}</p>', about=" · ".join(about)),
        html('<p class="verdict {status}">{words}</p>', status=status, words=say(_sentence(findings, status))),
        section("checks", texts.CHECKS, *(finding(f.status, f.name, texts.FINDINGS.get(f.name), f.message) for f in findings)),
        _histogram(findings),
        section("examples", texts.TOKENIZED, html("<p>{words}</p>", words=say(texts.ABOUT_MARKS)), *map(_example, rows)),
        section("recipe", texts.RECIPE, html('<pre class="recipe">{recipe}</pre>', recipe=recipe)),
    ]
    return frame(texts.DATA_CHECK, joined(body))


def _sentence(findings: Sequence[Finding], status: str) -> Words:
    names = [finding.name for finding in findings if finding.status == status]
    return fill(texts.VERDICTS[status], count=len(names), names=", ".join(dict.fromkeys(names)))


def _histogram(findings: Sequence[Finding]) -> Html:
    bars = joined(
        html(
            '<tr><th scope="row">{low}–{high}</th><td>{count}</td><td>{bar}</td></tr>',
            low=number(low), high=number(2 * low - 1), count=number(count), bar=html(BAR, width=f"{max(1, 100 * share):.1f}"),
        )
        for low, count, share in histogram(findings)
    )  # fmt: skip
    heads = joined((html('<th scope="col">{words}</th>', words=say(words)) for words in (texts.TARGET_TOKENS, texts.READ)), "")
    table = html(
        '<table class="numbers"><thead><tr>{heads}<td></td></tr></thead><tbody>{bars}</tbody></table>', heads=heads, bars=bars
    )
    return section("lengths", texts.TARGETS_EACH, table) if bars else Html("")


def _example(row: dict[str, Any]) -> Html:
    """Its text, in which target tokens are marked, with their weight in the loss if it isn't 1."""
    parts = "".join(_part(part) for part in row["parts"])
    return html("<h3>{place}</h3><pre>{parts}</pre>", place=place_of(row), parts=Html(parts))


def _part(part: dict[str, Any]) -> Html:
    if not part["learned"]:
        return html("{text}", text=part["text"])
    if part["weight"] == 1:
        return html("<mark>{text}</mark>", text=part["text"])
    return html('<mark class="weighted"><sup>×{weight}</sup>{text}</mark>', weight=f"{part['weight']:.4g}", text=part["text"])
