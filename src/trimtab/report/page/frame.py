"""The frame of every page: self-contained, in two languages, for any width, light and dark, and on paper.

The switch between the languages is CSS alone. The one small script chooses the browser's language, and tells it which one is read.
The page's own policy lets nothing else run, and nothing be loaded.
"""

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from trimtab.report.page.html import Html, html
from trimtab.report.page.words import Said, both, say

CSS = Html((files("trimtab.report.page") / "page.css").read_text(encoding="utf-8"))
SCRIPT = Html("""
const choice = { en: document.getElementById("english"), "zh-Hans": document.getElementById("chinese") };
const tell = () => { document.documentElement.lang = choice.en.checked ? "en" : "zh-Hans"; };
if (navigator.language.startsWith("zh")) choice["zh-Hans"].checked = true;
for (const input of Object.values(choice)) input.addEventListener("change", tell);
tell();
""")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<fieldset class="language"><legend class="unseen">Language · 语言</legend>
<input type="radio" name="language" id="english" checked><label for="english" lang="en">English</label>
<input type="radio" name="language" id="chinese"><label for="chinese" lang="zh-Hans">中文</label>
</fieldset>
</header>
<main>
{body}
</main>
<footer>{foot}</footer>
<script>{script}</script>
</body>
</html>
"""


def frame(heading: Said, body: Html, foot: Said | Html = "") -> str:
    """A whole page.

    Args:
        foot: What stands below it, small.
    """
    policy = (
        f"default-src 'none'; style-src '{_digest(CSS)}'; script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    return html(
        PAGE, policy=Html(policy), title=both(heading), css=CSS, heading=say(heading), body=body, foot=say(foot), script=SCRIPT
    )


def section(key: str, heading: Said, *content: Html) -> Html:
    """A part of a page, to which `#key` leads."""
    inner = Html("\n".join(content))
    return html(
        '<section id="{key}" aria-labelledby="{key}-head">\n<h2 id="{key}-head">{heading}</h2>\n{inner}\n</section>',
        key=key,
        heading=say(heading),
        inner=inner,
    )


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
