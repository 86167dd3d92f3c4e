"""What is wrong with an HTML page of ours, found without a browser. `make look` asks a browser."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

MOST_BYTES = 500_000
VOID = {"meta", "input", "br", "hr"}
"""Elements of ours without an end."""
TAGS = {
    "a", "body", "b", "circle", "code", "dd", "del", "desc", "details", "div", "dl", "dt", "em", "fieldset", "figcaption", "figure", "footer",
    "h1", "h2", "h3", "head", "header", "html", "input", "ins", "label", "legend", "li", "line", "main", "mark", "meta", "ol", "p", "path",
    "pre", "rect", "script", "section", "span", "style", "sub", "summary", "sup", "svg", "table", "tbody", "td", "text", "th", "thead", "title",
    "tr", "ul", "br", "nav", "caption", "strong",
}  # fmt: skip
ATTRIBUTES = {
    "aria-describedby", "aria-hidden", "aria-label", "aria-labelledby", "charset", "checked", "class", "content", "cx", "cy", "d", "dir", "dy",
    "for", "height", "href", "http-equiv", "id", "lang", "name", "open", "r", "role", "scope", "tabindex", "text-anchor", "type", "viewbox",
    "width", "x", "x1", "x2", "y", "y1", "y2", "preserveaspectratio",
}  # fmt: skip
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800-\udfff]")


class Page(HTMLParser):
    """A page's elements, and what is wrong with them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.languages: list[tuple[str, str]] = []
        """(class, text) of each piece in one language, in order."""
        self.depth = 0
        """Of the latest of them."""
        self.policy = ""
        self.contents: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()
        if self.open:
            self.problems.append(f"never ended: {self.open}")

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in TAGS:
            self.problems.append(f"an element that no page of ours has: {tag}")
        self.problems += [f"an attribute that no page of ours has: {tag} {name}" for name in values if name not in ATTRIBUTES]
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("for", "aria-labelledby", "aria-describedby"):
            self.references += (values.get(name) or "").split()
        if (link := values.get("href")) is not None:
            if not link.startswith("#"):
                self.problems.append(f"a link that leads out: {link}")
            self.references.append(link[1:])
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if values.get("class") in ("en", "zh"):
            self.languages.append((values["class"], ""))
            self.depth = len(self.open) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> within {self.open}")
        else:
            self.open.pop()

    def handle_data(self, text):
        if self.open and self.open[-1] in ("script", "style"):
            self.contents[self.open[-1]].append(text)
        if self.languages and len(self.open) >= self.depth:
            kind, before = self.languages[-1]
            self.languages[-1] = kind, before + text


def problems(text: str) -> list[str]:
    """What is wrong with a page."""
    page = Page(text)
    found = list(page.problems)
    found += [f"two elements with the id {name}" for name in sorted(set(page.ids)) if page.ids.count(name) > 1]
    found += [f"nothing has the id {name}" for name in sorted(set(page.references) - set(page.ids))]
    kinds = [kind for kind, _ in page.languages]
    if kinds[::2] != ["en"] * (len(kinds) // 2) or kinds[1::2] != ["zh"] * (len(kinds) // 2) or len(kinds) % 2:
        found.append("a text in one language without the other beside it")
    found += [f"an empty text in {kind}" for kind, piece in page.languages if not piece.strip()]
    for tag in ("script", "style"):
        digests = [b64encode(sha256(one.encode()).digest()).decode() for one in page.contents[tag]]
        if any(f"{tag}-src 'sha256-{digest}'" not in page.policy for digest in digests):
            found.append(f"the policy does not know the page's {tag}")
    if "default-src 'none'" not in page.policy:
        found.append("the policy lets something be loaded")
    if unseen := UNSEEN.search(text):
        found.append(f"an unseen character: {unseen[0]!r}")
    if re.search(r"url\(|@import", "".join(page.contents["style"])):
        found.append("the style loads something")
    if len(text.encode(errors="replace")) > MOST_BYTES:
        found.append(f"{len(text.encode()):,} bytes")
    return found
