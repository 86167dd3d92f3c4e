"""What a page says, in English and in Chinese; the reader chooses."""

import re
from typing import Any, NamedTuple

from trimtab.report.page.html import Html, escaped, html


class Words(NamedTuple):
    """The same in both languages, with the same places for values: `Words("{count} steps", "{count} 步")`."""

    en: str
    zh: str


Said = Words | str
"""What a page says: words, or a name that is the same in both languages."""


def fill(words: Said, /, **values: Any) -> Words:
    """The words with their places filled, as HTML. A value that is itself words fills each language with its own."""
    if isinstance(words, str):
        words = Words(words, words)
    if not values:
        return Words(*(Html(escaped(text)) for text in words))
    languages = range(len(Words._fields))
    chosen = [{name: value[n] if isinstance(value, Words) else value for name, value in values.items()} for n in languages]
    return Words(*(html(escaped(words[n]), **chosen[n]) for n in languages))


def say(words: Said, /, **values: Any) -> Html:
    """The words in both languages, of which the page shows one."""
    if isinstance(words, str) and not values:
        return Html(escaped(words))
    filled = fill(words, **values)
    return html('<span class="en" lang="en">{en}</span><span class="zh" lang="zh-Hans">{zh}</span>', **filled._asdict())


def both(words: Said, /, **values: Any) -> Html:
    """The words in both languages beside each other, where no switch reaches: titles of the browser's window and of drawings."""
    if isinstance(words, str) and not values:
        return Html(escaped(words))
    filled = fill(words, **values)
    return html("{en} · {zh}", **filled._asdict())


def number(value: float, digits: int = 4) -> str:
    """With so many significant digits, thousands separated: 12,345 or 0.01734."""
    whole = 10**digits <= abs(value) < 1e9 or isinstance(value, int)
    text = f"{value:,.0f}" if whole else re.sub(r"e([+-])0*", r"e\1", f"{value:.{digits}g}")
    return text.replace("-", "−").replace("e+", "e")
