"""A run's report: honest about every run, written again and again, and never in the run's way."""

import re

import pytest
from pages import Page, problems
from test_keys import plain_recipe, work  # noqa: F401 (a fixture)

from trimtab.report import RunObserver
from trimtab.run import report_page
from trimtab.run.script import run_recipe

SAMPLES = {"eval": {"samples": 2, "max_new_tokens": 6}, "train.evaluate_every": 2}


def read(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert problems(text) == []
    return text


def words(text, language="en"):
    """What a page says in one language."""
    text = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(piece for kind, piece in Page(text).languages if kind == language)


@pytest.fixture(scope="module")
def done(work, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "done"
    run_recipe(plain_recipe(work, output=str(folder), **SAMPLES))
    return folder


def test_a_run_ends_with_its_report(done):
    text = read(done)
    assert "Validation loss" in words(text)
    assert "验证集损失" in words(text, "zh")


class Interrupt(RunObserver):
    """Interrupts a run after its fourth step, or lets it fail there."""

    def __init__(self, error):
        self.error = error

    def logged(self, kind, step, values):
        if kind == "train" and step == 4:
            raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "Interrupted after step 4"), (OSError("<b>no</b> luck"), "ended by an error after step 4")],
)
def test_a_run_that_does_not_end_has_an_honest_page(work, tmp_path, error, said):  # noqa: F811
    with pytest.raises(type(error)):
        run_recipe(plain_recipe(work, output=str(tmp_path / "run"), **SAMPLES), Interrupt(error))
    text = read(tmp_path / "run")
    assert said in words(text)
    assert f"trimtab train {tmp_path}/run/recipe.yaml" in text
    assert ("&lt;b&gt;no&lt;/b&gt; luck" in text) == isinstance(error, OSError)


def test_a_page_that_fails_stops_nothing_and_is_told_once(work, tmp_path, monkeypatch):  # noqa: F811
    told = []

    class Told(RunObserver):
        def on_notice(self, message):
            told.append(message)

    monkeypatch.setattr(report_page, "run_report", lambda _: 1 / 0)
    run = run_recipe(plain_recipe(work, output=str(tmp_path / "run"), **SAMPLES), Told())
    assert run.record["status"] == "done"
    about = [message for message in told if "report.html" in message]
    assert len(about) == 1
    assert "division by zero" in about[0]
    assert f"trimtab report {tmp_path}/run" in about[0]
    assert not (tmp_path / "run" / "report.html").exists()
