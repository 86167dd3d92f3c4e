"""The certificate's tests: what each proves, and what it has found."""

from trimtab.report.page import texts
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles
from trimtab.report.page.words import say


def certificate(run: RunFiles) -> Html:
    """A line for each test; nothing of a run that has not ended."""
    if run.certificate is None:
        if run.status != "done":
            return Html("")
        reason = say(texts.NOT_ASKED) if "certify: false" in run.recipe else ""
        words = html("<p>{none} {reason}</p>", none=say(texts.NO_CERTIFICATE), reason=reason)
        return section("certificate", texts.CERTIFICATE, words)
    tests = run.certificate["tests"]
    advice = [
        html("<p>{words}</p>", words=say(texts.WHAT_TO_DO, advice=texts.ADVICE_WORDS[test["name"]]))
        for test in tests
        if test["status"] == "failed" and test["name"] in texts.ADVICE_WORDS
    ]
    about = html('<p class="soft">{words}</p>', words=say(texts.ABOUT_CERTIFICATE))
    lines = joined(finding(test["status"], test["name"], texts.TESTS.get(test["name"]), test["words"]) for test in tests)
    return section("certificate", texts.CERTIFICATE, about, lines, *advice)


def finding(status: str, name: str, explained: texts.Words | None, words: str) -> Html:
    """A test or a check: its result, its name, what it is about, and its message as it was recorded."""
    explanation = html("<p>{words}</p>", words=say(explained)) if explained is not None else ""
    return html(
        '<div class="finding"><span class="{status}">{result}</span><b>{name}</b>'
        '<div class="words">{explanation}<p class="soft" lang="en">{words}</p></div></div>',
        status=status, result=say(texts.STATUS.get(status, status)), name=name, explanation=explanation, words=words,
    )  # fmt: skip
