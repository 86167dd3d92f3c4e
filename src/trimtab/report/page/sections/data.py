"""What was trained on: where every example went, and what the checks before the first step have found."""

from typing import Any

from trimtab.report.page import texts
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles
from trimtab.report.page.sections.certificate import finding
from trimtab.report.page.words import Words, both, number, say

MOST_REASONS = 20
COUNTS: dict[str, Words] = {
    "refused": texts.REJECTED,
    "dropped": texts.TOO_LONG,
    "duplicates": texts.DUPLICATES,
    "held_out_too": texts.HELD_OUT_TOO,
}
"""Why examples are not used, by the keys of data.json."""


def data(run: RunFiles) -> Html:
    """The account of the data; nothing if data.json is missing."""
    if not run.data:
        return Html("")
    sources = [source for source in run.data.get("sources", []) if isinstance(source, dict)]
    return section("data", texts.DATA, _about(run), _table(sources), _rejected(sources), _checks(run), _digest(run))


def _about(run: RunFiles) -> Html:
    held_out, used = run.data.get("held_out", []), sum(source.get("used", 0) for source in run.data.get("sources", []))
    tokens = run.record.get("learned_tokens")
    if tokens is None:
        return Html("")
    values = {"train": number(used - len(held_out)), "tokens": number(tokens), "held_out": number(len(held_out))}
    return html("<p>{words}</p>", words=say(texts.ABOUT_DATA, **values))


def _table(sources: list[dict[str, Any]]) -> Html:
    """A line for each source; columns of reasons that occur."""
    columns = {key: words for key, words in COUNTS.items() if key == "refused" or any(source.get(key) for source in sources)}
    heads = [texts.SOURCE, texts.READ, texts.USED, *columns.values()]
    rows = []
    for source in sources:
        name = f"{source['name']} ({source.get('source')})" if source.get("name") else source.get("source")
        counts = [source.get("rows", 0), source.get("used", 0), *(len(source.get(key, [])) for key in columns)]
        cells = Html("".join(f"<td>{number(count)}</td>" for count in counts))
        rows.append(html('<tr><th scope="row">{name}</th>{cells}</tr>', name=name, cells=cells))
    return html(
        '<div class="wide" tabindex="0" role="group" aria-label="{label}"><table class="numbers sources"><thead><tr>{heads}</tr></thead>'
        "<tbody>{rows}</tbody></table></div>",
        label=both(texts.SOURCE), heads=Html("".join(f'<th scope="col">{say(head)}</th>' for head in heads)), rows=joined(rows),
    )  # fmt: skip


def _rejected(sources: list[dict[str, Any]]) -> Html:
    refused = [one for source in sources for one in source.get("refused", []) if isinstance(one, dict)]
    if not refused:
        return Html("")
    items = joined(
        html('<li lang="en">{where}: {reason}</li>', where=one.get("where"), reason=str(one.get("reason"))[:500])
        for one in refused[:MOST_REASONS]
    )
    left = len(refused) - MOST_REASONS
    more = html("<p>{words}</p>", words=say(texts.AND_MORE, count=number(left), file="data.json")) if left > 0 else ""
    return html("<h3>{head}</h3><ul>{items}</ul>{more}", head=say(texts.REASONS), items=items, more=more)


def _checks(run: RunFiles) -> Html:
    proof = [one for one in run.data.get("proof", []) if isinstance(one, dict)]
    if not proof:
        return Html("")
    lines = joined(finding(one["status"], one["name"], texts.FINDINGS.get(one["name"]), one["words"]) for one in proof)
    return html("<h3>{head}</h3>\n{lines}", head=say(texts.CHECKS), lines=lines)


def _digest(run: RunFiles) -> Html:
    digest = html("<code>{digest}</code>", digest=str(run.data.get("digest", ""))[:16] + "…")
    return html('<p class="soft">{words}</p>', words=say(texts.DIGEST, digest=digest))
