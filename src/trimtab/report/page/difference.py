"""Two texts side by side, with their differences marked word by word."""

import re
from difflib import SequenceMatcher

from trimtab.report.page.html import Html, escaped, html

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|\s+|[^\w\s]")
"""A word, a Chinese or Japanese character, spaces, or a sign."""
MOST = 400
"""Words of a text that are compared: comparing takes their square."""
ALIKE = 0.4
"""The similarity below which nothing in common is worth showing."""


def marked(expected: str, answer: str) -> tuple[Html, Html]:
    """The expected text with what is missing from the answer marked, and the answer with what it says instead."""
    ours, theirs = WORD.findall(expected), WORD.findall(answer)
    if expected == answer or len(ours) > MOST or len(theirs) > MOST:
        return Html(escaped(expected)), Html(escaped(answer))
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    common = matcher.get_matching_blocks() if matcher.ratio() >= ALIKE else []
    kept = [
        (a, b, size) for a, b, size in common if not "".join(ours[a : a + size]).isspace()
    ]  # spaces between changes are no match
    return _marked("ins", ours, [(a, size) for a, _, size in kept]), _marked("del", theirs, [(b, size) for _, b, size in kept])


def _marked(tag: str, words: list[str], common: list[tuple[int, int]]) -> Html:
    """The text with all but what is common marked."""
    found, place = "", 0
    for start, size in [*common, (len(words), 0)]:
        if different := "".join(words[place:start]):
            found += html("<{tag}>{text}</{tag}>", tag=tag, text=different)
        found += escaped("".join(words[start : start + size]))
        place = start + size
    return Html(found)
