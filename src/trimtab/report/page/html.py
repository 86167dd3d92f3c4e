"""HTML into which nothing gets by accident: whatever fills a place in it is escaped, unless it is HTML already."""

import re
from html import escape
from typing import Any

from trimtab.core.streams import escape_controls

_UNSEEN = re.compile(
    "[\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)
"""Characters that can't be seen, or that turn the direction of what follows; surrogates, which no file can hold."""
_JOINER = "\u200d"
"""Between the parts of an emoji, and in some scripts within words: a text may have it."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def html(template: str, /, **values: Any) -> Html:
    """The template with its places filled: `html("<p>{text}</p>", text=text)`."""
    return Html(template.format(**{name: escaped(value) for name, value in values.items()}))


def joined(parts: Any, between: str = "\n") -> Html:
    return Html(between.join(escaped(part) for part in parts))


def escaped(value: Any) -> str:
    """HTML as it is; anything else as text, with unseen characters written out; None as nothing."""
    if isinstance(value, Html):
        return value
    return "" if value is None else escape(visible(str(value)))


def visible(text: str) -> str:
    """The text with control codes and other unseen characters written out, so that it reads as it is."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] == _JOINER else f"\\u{ord(found[0]):04x}", escape_controls(text))
