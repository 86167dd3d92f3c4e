"""Looks at pages as people do, in a browser: wide and narrow, light and dark, in both languages, on paper. `make look` runs it.

    python tests/look.py FOLDER PAGE.html ...

Writes a picture of each view into the folder. Fails on a script error, on anything that is wider than the window, and on what axe-core finds
against accessibility: its rules of WCAG A and AA, and its best practices.
"""

import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (400, 1200)
SCHEMES = ("light", "dark")
LANGUAGES = {"en-US": "en", "zh-CN": "zh-Hans"}


def problems(page: Page) -> list[str]:
    """What is wrong with the page as it is shown."""
    found = []
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0:
        found.append(f"is {wide} pixels wider than the window")
    for violation in Axe().run(page).response["violations"]:
        nodes = "; ".join(node["html"][:120] + " " + node.get("failureSummary", "")[:200] for node in violation["nodes"][:3])
        found.append(f"axe: {violation['id']} ({len(violation['nodes'])}): {nodes}")
    return found


def look(browser: Browser, path: Path, pictures: Path) -> list[str]:
    """Every view of a page; what is wrong with them."""
    found = []
    for width, scheme, (locale, language) in itertools.product(WIDTHS, SCHEMES, LANGUAGES.items()):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, locale=locale)
        page, view = context.new_page(), f"{path.parent.name}-{path.stem}-{width}-{scheme}-{language}"
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error, said=said: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request, said=said: said.append(f"asks for {request.url}") if not request.url.startswith("file:") else None,
        )
        page.goto(path.absolute().as_uri())
        if page.evaluate("document.documentElement.lang") != language:
            said.append(f"a browser in {locale} is shown another language")
        page.screenshot(path=pictures / f"{view}.png", full_page=True)
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        said += problems(page)
        page.locator(f"label[for={'english' if language != 'en' else 'chinese'}]").click()
        if page.evaluate("document.documentElement.lang") == language:
            said.append("the language does not change")
        found += [f"{view}: {each}" for each in said]
        context.close()
    context = browser.new_context(java_script_enabled=False, locale="zh-CN")
    page = context.new_page()
    page.goto(path.absolute().as_uri())
    if page.locator("h1 .en").is_visible() == page.locator("h1 .zh").is_visible():
        found.append(f"{path}: without scripts, not one language is shown")
    page.pdf(path=pictures / f"{path.parent.name}-{path.stem}.pdf")
    context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    found = []
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for path in arguments.pages:
            of_page = look(browser, path, arguments.pictures)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {len(of_page)} problems")
            found += of_page
        browser.close()
    print(*found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
