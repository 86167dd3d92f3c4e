"""The commands that continue from here, and the whole recipe."""

import shlex
from collections.abc import Iterator

from trimtab.report.page import texts
from trimtab.report.page.frame import section
from trimtab.report.page.html import Html, html, joined
from trimtab.report.page.run_files import RunFiles
from trimtab.report.page.words import say


def commands(run: RunFiles) -> Html:
    rows = joined(
        html("<dt>{name}</dt><dd><code>{command}</code></dd>", name=say(texts.COMMAND_WORDS[name]), command=command)
        for name, command in _commands(run)
    )
    return section("commands", texts.COMMANDS, html('<dl class="facts">\n{rows}\n</dl>', rows=rows))


def _commands(run: RunFiles) -> Iterator[tuple[str, str]]:
    folder, recipe = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "recipe.yaml"))
    if run.status != "done":
        yield "resume", f"trimtab train {recipe}"
    if run.status == "done":
        yield "chat", f"trimtab chat {folder} --base"
        yield "eval", f"trimtab eval {folder} --base --show 5"
        force = "" if run.certificate and run.certificate["passed"] else " --force"
        yield "merge", f"trimtab merge {folder} my-model{force}"
    if run.certificate:
        yield "verify", f"trimtab verify {folder}"
    yield "repeat", f"trimtab train {recipe} output={shlex.quote(str(run.folder.with_name(f'{run.folder.name}-again')))}"
    yield "show", f"trimtab show {folder}"


def recipe(run: RunFiles) -> Html:
    if not run.recipe:
        return Html("")
    about = html('<p class="soft">{words}</p>', words=say(texts.ABOUT_RECIPE))
    details = html(
        "<details><summary>{show}</summary><pre>{recipe}</pre></details>", show=say(texts.SHOW_RECIPE), recipe=run.recipe
    )
    return section("recipe", texts.RECIPE, about, details)
