"""A run's report: honest about every run, written again and again, and never in the run's way."""

import json
import re
import string
from pathlib import Path

import pytest
from made_runs import HOSTILE, made_up
from pages import MOST_BYTES, Page, problems
from test_keys import plain_recipe, work  # noqa: F401 (a fixture)

from trimtab import cli
from trimtab.artifacts.run_folder import read_certificate
from trimtab.artifacts.run_status import ADVICE
from trimtab.core import files
from trimtab.core.errors import StorageError
from trimtab.report import RunObserver
from trimtab.report.page import Words, texts
from trimtab.report.page.difference import MOST, marked
from trimtab.report.page.run_files import measures
from trimtab.report.page.run_report import run_report
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
    assert re.search(r"Validation loss (fell|rose) from [\d.]+ to [\d.]+ .*; the adapter is not certified\.", words(text))
    assert "适配器没有证书" in words(text, "zh")
    assert "Exact match of 2 sampled answers" in words(text)
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    answers = next(line for line in lines if line["kind"] == "samples")["answers"]
    assert answers
    assert all(each["question"] in text for each in answers)
    assert "24 training" not in words(text)
    assert "20 training examples" in words(text)
    assert (done / "recipe.yaml").read_text() in text.replace("&#x27;", "'")
    assert "certify: false" in words(text)


def test_it_is_made_again_from_the_files_alone(done, tmp_path):
    text = read(done)
    again = run_report(done)
    assert again.replace(re.search(r"Written .*? by", again)[0], re.search(r"Written .*? by", text)[0])[:3000] == text[:3000]
    for name in ("data.json", "metrics.jsonl", "recipe.yaml"):  # as a run of an older version may lack them
        kept = (done / name).read_bytes()
        (done / name).unlink()
        assert problems(run_report(done)) == []
        (done / name).write_bytes(b"\xff\x00{]")
        assert problems(run_report(done)) == []
        (done / name).write_bytes(kept)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text('{"status": "running"}')
    assert "Training: step 0 of 0" in words(run_report(tmp_path / "bare"))


def test_it_is_written_at_the_first_step_and_at_every_evaluation(work, tmp_path, monkeypatch):  # noqa: F811
    pages = []
    monkeypatch.setattr(report_page, "run_report", lambda folder: pages.append(run_report(folder)) or pages[-1])
    monkeypatch.setattr(report_page, "QUICK", 60.0)
    run_recipe(plain_recipe(work, output=str(tmp_path / "run"), **SAMPLES))
    steps = [re.search(r"Training: step (\d) of 5", words(page)) for page in pages]
    assert [found and found[1] for found in steps] == ["1", "2", "2", "2", "2", "4", "4", "5", "5", None]
    assert "Validation loss" in words(pages[-2])
    assert all(problems(page) == [] for page in pages)


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


@pytest.mark.parametrize(("seconds", "written"), [(0.04, 50), (4.0, 5)])
def test_pages_of_a_long_run_take_a_hundredth_of_its_time(seconds, written, tmp_path, monkeypatch):
    now, pages = [0.0], []

    def make(_):
        now[0] += seconds
        pages.append(now[0])
        return "a page"

    monkeypatch.setattr(report_page, "run_report", make)
    monkeypatch.setattr(report_page.time, "perf_counter", lambda: now[0])
    page = report_page.ReportPage(tmp_path, lambda _: None)
    for step in range(1, 51):
        now[0] += 40.0
        page.logged("train", step, {})
        page.logged("eval", step, {})
    assert abs(len(pages) - written) <= 2
    before = len(pages)
    page.on_finish({}, tmp_path)
    assert len(pages) == before + 1, "the last one is always written"


def test_what_cannot_be_written_says_where_it_can(tmp_path, capsys):
    folder = made_up(tmp_path / "run")
    (folder / "report.html").mkdir()
    assert cli.main(["report", str(folder)]) == StorageError.exit_code
    assert "`--output FILE` writes it elsewhere" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()


def test_a_run_that_starts_from_an_adapter_is_compared_with_that_one(tmp_path):
    """The certificate compares with the base model: it would call an adapter better that training has made worse."""
    folder = made_up(tmp_path / "run", start={"folder": "runs/before/adapter"})
    lines = [{"kind": "eval", "step": 0, "loss": 0.05, "rows": 3}, {"kind": "eval", "step": 100, "loss": 0.1, "rows": 3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Validation loss rose from 0.05 to 0.1 (difference 0.05, 3 examples)" in words(run_report(folder)).replace("+", "")
    examples = [{"items": 10.0}] * 3
    files.write_json(
        folder / "losses.json", {"examples": examples, "before": [0.5, 0.4, 0.6], "best": [1.0, 0.9, 1.1], "step": 100}
    )
    said = words(run_report(folder)).replace("+", "")
    assert "Validation loss rose from 0.05 to 0.1 (difference 0.05, 95\u00a0% interval 0.05 to 0.05, 3 examples)" in said


def test_thousands_of_steps_are_a_small_page(tmp_path):
    text = run_report(made_up(tmp_path / "run", steps=5000, every=100))
    assert problems(text) == []
    assert len(text) < MOST_BYTES / 2
    assert (
        "Validation loss fell from 2.43 to 0.0359 (difference −2.394, 95\u00a0% interval −2.471 to −2.225, 60 examples)"
        in words(text)
    )
    assert "the certificate passed" in words(text)
    assert "验证集损失从 2.43 降至 0.0359" in words(text, "zh")
    assert "Steps that were skipped" in words(text)
    assert {"Learning rate", "Gradient norm, smoothed", "Validation loss by source"} <= set(
        re.findall(r'lang="en">([^<]*)<', text)
    )
    drawn = re.search(r'<path class="raw c1 d1" d="M([^"]*)"', text)[1]
    assert min(float(point.partition(",")[2]) for point in drawn.split("L")) < 40, "the spike of one step is drawn"


def test_hostile_texts_stay_texts(tmp_path):
    innocent, hostile = (run_report(made_up(tmp_path / name, text=text)) for name, text in (("a", "x"), ("b", HOSTILE)))
    assert problems(hostile) == []
    tags = [re.findall(r"<(?!/?(?:ins|del)\b)/?[a-z][a-z0-9]*", text) for text in (innocent, hostile)]
    assert tags[0] == tags[1]
    assert "&lt;script&gt;alert(1)" in hostile
    assert r"\u202egnp.exe\u202c" in hostile
    assert len(hostile) < MOST_BYTES


def test_rejected_examples_are_listed_with_their_reasons(tmp_path):
    text = run_report(made_up(tmp_path / "run"))
    assert text.count(": the answer is empty</li>") == 20
    assert "… and 5 more, in data.json." in words(text)
    assert "540 training examples with 70,400 target tokens; 60 validation examples." in words(text)


def test_a_certificate_that_failed_is_the_verdict_and_has_advice(tmp_path):
    folder = made_up(tmp_path / "run")
    certificate = {key: value for key, value in read_certificate(folder).items() if key not in ("format", "digest")}
    certificate["tests"][1] |= {"status": "failed"}
    files.write_manifest(folder / "certificate.json", 2, certificate | {"passed": False})
    text = run_report(folder)
    assert "the certificate did NOT pass (stops)" in words(text)
    assert f"What to do: {ADVICE['stops']}" in words(text)
    assert "--force" in text
    assert '<p class="verdict problem">' in text
    (folder / "certificate.json").write_text((folder / "certificate.json").read_text().replace("did", "has"))
    (folder / "certificate.json").write_text((folder / "certificate.json").read_text() + " ")
    text = run_report(folder)
    assert "its certificate can&#x27;t be used" in text
    assert "changed since it was saved" in text


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ([0.1, 0.05, 0.2], "rose from"),
        ([-0.1, -0.3, 0.2], "did not change beyond noise"),
        (None, "fell from 2.43 to 0.0359 (difference"),
    ],
)
def test_a_loss_that_did_not_fall_is_not_called_fallen(tmp_path, difference, said):
    """Without an interval, as in certificates of earlier versions, the losses alone speak."""
    folder = made_up(tmp_path / "run")
    certificate = {key: value for key, value in read_certificate(folder).items() if key not in ("format", "digest")}
    certificate["tests"][2] |= {"difference": difference}
    files.write_manifest(folder / "certificate.json", 2, certificate)
    (sentence,) = re.findall(r"Validation loss [^;]*; the certificate", words(run_report(folder)))
    assert sentence.startswith(f"Validation loss {said}")
    assert ("interval" in sentence) == (difference is not None)


def test_examples_that_got_worse_are_counted(tmp_path):
    folder = made_up(tmp_path / "run")
    assert "a higher one" not in words(run_report(folder))
    files.write_json(
        folder / "losses.json", {"examples": [{}] * 3, "before": [2.0, 1.0, 3.0], "best": [1.0, 1.5, 2.0], "step": 100}
    )
    assert "Of 3 validation examples, 2 have a lower loss with the adapter than before training, and 1 a higher one." in words(
        run_report(folder)
    )


@pytest.mark.parametrize(("objective", "advised"), [("sft", True), ("dpo", False)])
def test_without_samples_the_certificates_answers_are_shown(tmp_path, objective, advised):
    folder = made_up(tmp_path / "run", objective={"name": objective})
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"samples"' not in line))
    said = words(run_report(folder))
    assert "Answers that the certificate" in said
    assert "before and after" not in said
    assert ("eval.samples" in said) == advised


def test_a_preference_run_shows_what_its_objective_measures(work, tmp_path):  # noqa: F811
    changes = {"data.train": str(work / "pairs.jsonl"), "objective": "dpo", "train.evaluate_every": 3}
    run_recipe(plain_recipe(work, output=str(tmp_path / "run"), **changes))
    text = read(tmp_path / "run")
    for name in ("Reward accuracy", "Reward margin", "Reward of chosen answers", "Validation loss (dpo)"):
        assert name in words(text), name
    assert "nats a token" not in words(text)


def test_differences_are_marked_word_by_word():
    expected, answer = marked("7 | coffee cups | Naples", "7 | tea cups | Naples.")
    assert expected == "7 | <ins>coffee</ins> cups | Naples"
    assert answer == "7 | <del>tea</del> cups | Naples<del>.</del>"
    assert marked("同样的回答", "同样地回答") == ("同样<ins>的</ins>回答", "同样<del>地</del>回答")
    assert marked("a <b>", "a <b>") == ("a &lt;b&gt;", "a &lt;b&gt;")
    assert marked("yes", "I can't say") == ("<ins>yes</ins>", "<del>I can&#x27;t say</del>")
    assert marked("", "x") == ("", "<del>x</del>")
    assert marked("x " * MOST, "y " * MOST) == ("x " * MOST, "y " * MOST), "too long to compare"


def all_texts():
    for name, value in vars(texts).items():
        if isinstance(value, Words):
            yield name, value
        elif isinstance(value, dict) and name.isupper():
            yield from ((f"{name}.{key}", one) for key, one in value.items() if isinstance(one, Words))


def test_every_text_is_there_in_both_languages():
    found = dict(all_texts())
    assert len(found) > 120
    for name, (english, chinese) in found.items():
        places = [sorted(place for _, place, _, _ in string.Formatter().parse(text) if place) for text in (english, chinese)]
        assert places[0] == places[1], name
        assert re.search("[\u4e00-\u9fff]", chinese) or not re.search("[a-z]", re.sub("{.*?}", "", english)), name
        assert english.strip(), name
        assert not re.search("[\u4e00-\u9fff]", english), name
        assert not re.search(r"[,;:?](?!//)", chinese.replace("certify: false", "")), (
            f"{name}: punctuation of the other language"
        )


def test_every_text_is_used():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in Path(texts.__file__).parent.rglob("*.py") if path.name != "texts.py"
    )
    names = {name.partition(".")[0] for name, _ in all_texts()}
    own = Path(texts.__file__).read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"texts.{name}" not in sources and len(re.findall(rf"\b{name}\b", own)) < 2] == []


def test_what_runs_can_say_is_explained():
    from trimtab.data import checks
    from trimtab.run import preflight

    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (checks, preflight))
    named = set(re.findall(r'Finding\(\s*"([a-z ]+)"', source))
    assert len(named) > 10
    assert named <= texts.FINDINGS.keys()
    source = (Path(checks.__file__).parents[1] / "certify" / "certificate.py").read_text(encoding="utf-8")
    tests = set(re.findall(r'Test\(\s*"([a-z]+)", "(?:passed|noted|failed)"', source))
    assert len(tests) > 5
    assert tests - {"files", "certificate"} <= texts.TESTS.keys()
    assert texts.ADVICE_WORDS.keys() == ADVICE.keys()


def test_how_long_a_step_took_and_waited_is_no_curve():
    line = {"kind": "train", "step": 1, "loss": 1.0, "took": 0.5, "waited": 0.1, "accuracy": 1.0}
    assert list(measures([line])) == ["accuracy"]
