"""Runs compared: on the examples that they share, with verdicts that hold for all of them together, and nothing that was changed."""

import hashlib
import io
import json
import math
import random
import shutil
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from pages import problems
from rich.console import Console
from worlds import make_model, work_in_copy, write_rows

from trimtab import cli
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.data.example import TokenRow
from trimtab.deploy import load_model
from trimtab.evaluate import evaluation_rows, score_loss
from trimtab.evaluate.comparisons import holm, sign_flip_p
from trimtab.evaluate.example_losses import read_losses
from trimtab.report.comparison import compare, run_facts
from trimtab.report.comparison_page import comparison_html
from trimtab.report.comparison_text import comparison_page
from trimtab.report.text_plot import Curve, plot
from trimtab.run.evaluation import held_out_examples_of
from trimtab.run.losses import LossRecord
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe
from trimtab.testing import tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 16, seed: 0}
method: {rank: 4}
train: {epochs: 2, rows_per_step: 8, lr: 2e-2, evaluate_every: 2}
output: run
certify: false
"""
DRAW = random.Random(0)
ROWS = [{"prompt": f"Is {n} even?", "completion": ("yes " if n % 2 == 0 else "no ") * DRAW.randint(1, 3)} for n in range(60)]
PAIRS = [{"prompt": f"Is {n} a number?", "chosen": "yes", "rejected": "no, it is not"} for n in range(24)]
DPO = ("data.train=pairs.jsonl", "data.eval=8", "objective=dpo", "train.lr=1e-3")


def train(output, *words):
    return run_recipe(Recipe.read(Path("r.yaml"), [f"output={output}", *words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    transformers.utils.logging.disable_progress_bar()
    make_model(folder / "tiny", 0)
    base = tiny_base()
    base.model.save_pretrained(folder / "bytes")
    base.tokenizer.save_pretrained(folder / "bytes")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("runs/a", "train.lr=1e-4")
        train("runs/b")
        train("runs/again", "train.lr=1e-4")
        train("runs/split", "data.seed=1")
        train("runs/bytes", "model=bytes")
        train("runs/none", "data.eval=0")
        train("runs/dpo", *DPO)
        train("runs/dpo2", *DPO, "train.seed=1")
        train("runs/beta", *DPO, "objective.beta=0.5")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    return work_in_copy(made, tmp_path, monkeypatch)


def runs(*names):
    return [Path("runs", name) for name in names]


def pair(*names):
    (found,) = compare(runs(*names)).pairs
    return found


def shown(compared, width=80, encoding="utf-8"):
    """What the terminal shows, as lines."""
    console = Console(
        width=width,
        soft_wrap=True,
        force_terminal=False,
        color_system=None,
        record=True,
        file=io.TextIOWrapper(io.BytesIO(), encoding=encoding),
    )
    for part in comparison_page(compared):
        console.print(part)
    return console.export_text().splitlines()


# What a run keeps


@pytest.mark.parametrize("name", ["b", "bytes"])
def test_each_example_has_its_own_loss_before_training_and_of_the_best_adapter(name, here):
    run, kept = Path("runs", name), read_losses(Path("runs", name))
    examples = held_out_examples_of(run)[0]
    target = load_model(str(run))
    rows = {row.where: row for row in evaluation_rows(target.base, examples)}
    assert len(kept.examples) == 16
    for losses, off in ((kept.best, False), (kept.before, True)):
        with target.adapter.disabled() if off else nullcontext():
            for each, loss in zip(kept.examples, losses, strict=True):
                row = rows[each.where]
                alone = score_loss(target.base, [row])
                assert math.isclose(alone.sums[0], loss, rel_tol=1e-4, abs_tol=1e-5)
                assert each.tokens == each.items == len(row.target_indices)
    assert max(abs(a - b) for a, b in zip(kept.before, kept.best, strict=True)) > 0.1, "the two are not the same"
    record = json.loads((run / "run.json").read_text())
    tokens = sum(each.tokens for each in kept.examples)
    assert math.isclose(sum(kept.best) / tokens, record["best"]["eval_loss"], rel_tol=1e-9)
    assert kept.step == record["best"]["step"]


def test_the_losses_are_those_of_the_best_adapter_rather_than_of_the_last(here):
    wrong = [{**row, "completion": "no " if row["completion"].startswith("yes") else "yes "} for row in ROWS[:16]]
    write_rows(Path("wrong.jsonl"), wrong)  # the more is learned, the less likely these answers are
    train("late", "data.eval=wrong.jsonl", "train.epochs=6")
    record, kept = json.loads(Path("late/run.json").read_text()), read_losses(Path("late"))
    assert record["best"]["step"] < record["last"]["step"]
    assert record["best"]["eval_loss"] < record["last"]["eval_loss"] - 0.01
    assert math.isclose(sum(kept.best) / sum(each.items for each in kept.examples), record["best"]["eval_loss"], rel_tol=1e-9)


def test_a_better_evaluation_that_was_not_saved_any_more_is_not_the_best(here):
    (before,) = compare(runs("a", "b")).runs[:1]
    with open(Path("runs/a/metrics.jsonl"), "a") as log:
        log.write(json.dumps({"kind": "eval", "step": 999, "loss": 0.0, "low": 0.0, "high": 0.0, "rows": 16}) + "\n")
    (after,) = compare(runs("a", "b")).runs[:1]
    assert after.evaluations[-1]["step"] == 999
    assert after.best == before.best


def test_of_a_pair_both_answers_decide_what_it_is(here):
    kept = read_losses(Path("runs/dpo"))
    assert len(kept.examples) == 8
    assert {each.items for each in kept.examples} == {1.0}
    assert {each.text for each in kept.examples} == {None}, "losses of pairs mean nothing for another tokenizer"
    assert all(abs(loss - math.log(2)) < 1e-4 for loss in kept.before)
    changed = [{**row, "rejected": "never"} for row in PAIRS]
    write_rows(Path("pairs.jsonl"), changed)
    train("changed", *DPO)
    assert {each.digest for each in kept.examples}.isdisjoint(each.digest for each in read_losses(Path("changed")).examples)


def test_weights_decide_what_a_loss_is_divided_by():
    base = tiny_base()
    ids = base.tokenizer("Is 2 even? yes")["input_ids"]
    prepared = SimpleNamespace(base=base, data=SimpleNamespace(eval=[]))
    for weights, items, has_text in ((None, 3, True), ([0.5, 0.5, 1.0], 2.0, False)):
        prepared.data.eval = [TokenRow(ids, [11, 12, 13], "rows.jsonl:1", weights=weights)]
        (example,) = LossRecord(prepared).examples
        assert (example.tokens, example.items, example.text is not None) == (3, items, has_text)


def test_without_validation_examples_there_are_none(here):
    assert read_losses(Path("runs/none")) is None
    assert "runs/none held out no examples (data.eval: 0)" in pair("a", "none").refused.en


# Verdicts


def test_the_better_run_is_named_with_an_interval_and_the_order_flips_the_sign(here):
    found, other = pair("a", "b"), pair("b", "a")
    assert found.value < -0.1
    assert found.interval[0] <= found.value <= found.interval[1] < 0
    assert (other.value, other.p) == (-found.value, found.p)
    assert all(math.isclose(-a, b, abs_tol=0.02) for a, b in zip(reversed(other.interval), found.interval, strict=True))
    a, b = (read_losses(run) for run in runs("a", "b"))
    by_hand = (sum(b.best) - sum(a.best)) / sum(each.items for each in a.examples)
    assert math.isclose(found.value, by_hand, rel_tol=1e-9)
    assert found.said.en.startswith(f"runs/b is better than runs/a by {-by_hand:.4f} nats a token (95 % interval ")
    assert found.said.en.endswith("16 common examples, p < 0.001).")
    assert other.said.en.split("(")[0] == found.said.en.split("(")[0]
    assert found.said.zh.startswith("runs/b 优于 runs/a")


def test_runs_of_the_same_recipe_and_seed_are_no_different(here):
    found = pair("a", "again")
    assert found.identical
    assert (found.value, found.p, found.interval) == (0.0, 1.0, (0.0, 0.0))
    assert found.said.en == "runs/a and runs/again: no difference: identical losses on 16 common examples."
    compared = compare(runs("a", "again"))
    assert (compared.settings, compared.facts) == ([], [])
    assert "what differs in the recipes: nothing" in "\n".join(shown(compared))


def test_a_difference_within_noise_is_not_distinguishable(here):
    path = Path("runs/again/losses.json")
    noisy = json.loads(path.read_text())
    noisy["best"] = [loss + (0.5 if n % 2 else -0.5) for n, loss in enumerate(noisy["best"])]
    write_digest(path, noisy)
    found = pair("a", "again")
    assert not found.distinguishable
    assert "runs/again and runs/a are not distinguishable: " in found.said.en


def write_digest(path, content):
    """As a manifest whose digest is right."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**rest, "digest": digest}, indent=2, ensure_ascii=False) + "\n")


def test_only_common_examples_are_compared_and_their_number_is_said(here):
    a, split = (read_losses(run) for run in runs("a", "split"))
    common = {each.digest for each in a.examples} & {each.digest for each in split.examples}
    assert 2 <= len(common) < 16
    found = pair("a", "split")
    assert (found.common, found.of) == (len(common), (16, 16))
    assert f"{len(common)} common examples of 16" in found.said.en
    losses = {each.digest: (loss, each.items) for each, loss in zip(split.examples, split.best, strict=True)}
    of_a = {each.digest: loss for each, loss in zip(a.examples, a.best, strict=True)}
    by_hand = sum(losses[d][0] - of_a[d] for d in common) / sum(losses[d][1] for d in common)
    assert math.isclose(found.value, by_hand, rel_tol=1e-9)


def test_examples_that_are_there_twice_are_compared_each_once(here):
    write_rows(Path("rows.jsonl"), [{"prompt": f"Is {n // 3} even?", "completion": "yes"} for n in range(60)])
    train("one", "data.duplicates=keep", "train.epochs=1")
    train("two", "data.duplicates=keep", "train.epochs=1", "train.lr=1e-4")
    kept = read_losses(Path("one")).examples
    assert len({each.digest for each in kept}) < len(kept) == 16
    (found,) = compare([Path("one"), Path("two")]).pairs
    assert found.common == 16


def test_runs_without_common_examples_are_refused_with_what_to_do(here):
    write_rows(Path("rows.jsonl"), [{"prompt": f"Odd: {n}?", "completion": "yes"} for n in range(60)])
    train("elsewhere", "train.epochs=1")
    (found,) = compare([Path("runs/a"), Path("elsewhere")]).pairs
    assert "no validation example in common (of 16 and 16): hold out the same ones" in found.refused.en
    assert "are not compared by loss" in found.said.en


def test_losses_of_other_objectives_are_not_compared_and_the_rest_is_shown(here):
    compared = compare(runs("a", "dpo"))
    assert "their objectives differ (dpo, sft)" in compared.pairs[0].refused.en
    lines = shown(compared)
    assert "validation loss, sft (* several)" not in lines, "their losses share no axis"
    assert {"validation loss, sft", "validation loss, dpo"} <= set(lines)
    assert ["objective.name", ["sft", "dpo"]] in [list(item) for item in compared.settings]
    assert not pair("dpo", "dpo2").refused
    assert pair("dpo", "dpo2").unit.en == "a pair"
    assert "objective.beta differs (0.1 and 0.5)" in pair("dpo", "beta").refused.en


def test_losses_that_share_an_estimate_are_compared_on_the_same_set_alone(here):
    kto = ("data.train=pairs.jsonl", "objective=kto", "train.lr=1e-3", "train.epochs=1")
    for name, seed in (("kto", 0), ("again", 0), ("other", 1)):
        train(name, *kto, "data.eval=8", f"data.seed={seed}", f"train.seed={seed + (name == 'again')}")
    same, other, _ = compare([Path("kto"), Path("again"), Path("other")]).pairs
    assert (same.refused, same.unit.en, same.common) == (None, "an answer", same.of[0])
    assert other.refused.en.startswith("kto estimates a divergence on all validation examples together")


def test_bases_with_other_tokenizers_are_compared_by_the_bytes_of_the_answers(here):
    found = pair("b", "bytes")
    assert found.unit.en == "a byte of the answers"
    assert found.common == 16
    b, other = (read_losses(run) for run in runs("b", "bytes"))
    texts = {
        where: row["completion"].strip()
        for where, row in zip((str(Path("rows.jsonl").absolute()) + f":{n}" for n in range(1, 61)), ROWS, strict=True)
    }
    made_in = {each.where.rpartition(":")[2]: each for each in b.examples}
    assert {each.size for each in made_in.values()} == {
        len(text) for where, text in texts.items() if where.rpartition(":")[2] in made_in
    }
    by_hand = (sum(other.best) - sum(b.best)) / sum(each.size for each in b.examples)
    assert math.isclose(found.value, by_hand, rel_tol=1e-9)
    assert "nats a byte of the answers" in found.said.en
    assert any("its own chat template" in note.en for note in compare(runs("b", "bytes")).notes)
    lines = "\n".join(shown(compare(runs("b", "bytes"))))
    assert lines.count("validation loss, sft, in tokens of") == 2


def test_other_tokenizers_are_refused_where_the_questions_differ_too(here):
    train("system", "data.system=Answer.", "train.epochs=1")
    (found,) = compare([Path("system"), Path("runs/bytes")]).pairs
    assert "different tokenizers, and data.system differs as well" in found.refused.en
    (same,) = compare([Path("system"), Path("runs/a")]).pairs
    assert "no validation example in common" in same.refused.en


# What was changed or is missing


def damage(path, how):
    text = path.read_text()
    if how == "a number":
        value = json.loads(text)["best"][0]
        path.write_text(text.replace(str(value), str(value - 1.0), 1))
    else:
        path.write_text(text[: len(text) // 2])


@pytest.mark.parametrize(("how", "said"), [("a number", "changed since it was saved"), ("half", "not valid JSON")])
def test_losses_that_were_changed_are_refused_by_name(how, said, here):
    damage(Path("runs/b/losses.json"), how)
    with pytest.raises(ArtifactError, match=f"runs/b/losses.json: {said}"):
        compare(runs("a", "b"))


def test_losses_that_fit_no_run_are_refused_though_their_digest_is_right(here):
    path = Path("runs/b/losses.json")
    content = json.loads(path.read_text())
    write_digest(path, {**content, "best": content["best"][:-1]})
    with pytest.raises(
        ArtifactError, match=r"runs/b/losses\.json: does not hold the losses of a run \(not one loss an example\)"
    ):
        compare(runs("a", "b"))


def test_what_is_read_of_a_certified_run_is_what_was_certified(here):
    train("certified", "train.epochs=1", "certify=true", "train.lr=1e-1", "train.max_steps=6")
    assert compare([Path("certified"), *runs("a")]).runs[0].certificate["passed"]
    for name in ("losses.json", "metrics.jsonl", "recipe.yaml", "run.json", "data.json"):
        path = Path("certified", name)
        content = path.read_text()
        path.write_text(content + "\n")
        with pytest.raises(ArtifactError, match=f"certified/{name}: is missing, or changed since it was certified"):
            compare([Path("certified"), *runs("a")])
        path.write_text(content)
    Path("certified/losses.json").unlink()
    with pytest.raises(ArtifactError, match=r"certified/losses\.json: is missing"):
        compare([Path("certified"), *runs("a")])


def test_a_run_of_an_earlier_version_is_shown_without_a_verdict(here):
    Path("runs/b/losses.json").unlink()
    compared = compare(runs("a", "b"))
    assert (
        "an earlier version of Trimtab made it. `trimtab eval runs/b` measures its loss again" in compared.pairs[0].refused.en
    )
    assert ("train.lr", [1e-4, 2e-2]) in compared.settings
    assert any("⠒" in line or "⠤" in line for line in shown(compared))


@pytest.mark.parametrize(("names", "error", "said"), [
    (["runs/a"], RecipeError, "two runs or more"),
    (["runs/a", "runs/../runs/a"], RecipeError, "is the same run as runs/a"),
    (["runs/a", "tiny"], RecipeError, "tiny is no run folder"),
    (["runs/a", "nowhere"], RecipeError, "nowhere: no such folder"),
])  # fmt: skip
def test_what_can_not_be_compared_is_refused(names, error, said, here):
    with pytest.raises(error, match=said):
        compare([Path(name) for name in names])


@pytest.mark.parametrize("content", ["[]", "{}", '{"status": "done"', '{"status": "done", "base": 3}'])
def test_a_damaged_record_is_refused_by_name(content, here):
    Path("runs/b/run.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"runs/b/run\.json"):
        compare(runs("a", "b"))


# Statistics


def test_p_counts_the_signs_that_make_as_large_a_sum():
    values = [0.5, -0.2, 0.9, 0.4, 0.3]
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=5)]
    assert math.isclose(sign_flip_p(values), sum(total >= sum(values) - 1e-12 for total in sums) / 32)
    assert sign_flip_p([0.3] * 5) == 2 / 32, "the least that five examples allow"
    assert sign_flip_p([0.0] * 20) == 1.0
    many = [random.Random(n).gauss(0.1, 1) for n in range(400)]
    z = abs(sum(many)) / math.sqrt(sum(v * v for v in many))
    assert math.isclose(sign_flip_p(many), math.erfc(z / math.sqrt(2)), abs_tol=0.015)


def test_adjusted_p_are_holms():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_of_equal_models_few_sets_of_comparisons_name_a_better_one():
    draw, wrong, unadjusted = random.Random(1), 0, 0
    for _ in range(60):
        models = [[draw.gauss(0, 1) for _ in range(10)] for _ in range(4)]
        ps = [sign_flip_p([x - y for x, y in zip(a, b, strict=True)]) for n, a in enumerate(models) for b in models[:n]]
        wrong += min(holm(ps)) < 0.05
        unadjusted += min(ps) < 0.05
    assert wrong <= 7 < unadjusted


def test_many_comparisons_can_still_tell_a_difference():
    assert holm([sign_flip_p([1.0] * 50, 400)] * 400)[0] < 0.05


def test_too_few_examples_are_said_to_be(here):
    for name in ("a", "b"):
        path = Path("runs", name, "losses.json")
        content = json.loads(path.read_text())
        write_digest(path, {**content, **{key: content[key][:4] for key in ("examples", "before", "best")}})
    compared = compare(runs("a", "b"))
    assert not compared.pairs[0].distinguishable
    assert "runs/b and runs/a are not distinguishable by so few examples: " in compared.pairs[0].said.en
    assert [note.en for note in compared.notes] == [
        "Examples are few: on 4 of them, 1 comparisons could not tell even the largest difference from chance. Hold out more "
        "(data.eval), or compare fewer runs at a time."
    ]


# What is shown


def test_five_runs_at_once_say_what_differs_and_how_many_comparisons_there_are(here):
    compared = compare(runs("a", "b", "again", "split", "dpo"))
    assert len(compared.pairs) == 10
    assert [note.en.split(":")[0] for note in compared.notes] == ["6 comparisons", "Examples are few"]
    settings = dict(compared.settings)
    assert settings["train.lr"] == [1e-4, 2e-2, 1e-4, 2e-2, 1e-3]
    assert settings["data.seed"] == [0, 0, 0, 1, 0]
    assert not {"output", "model.name", "train.epochs"} & settings.keys()
    assert "data_digest" in dict(compared.facts)
    for width in (80, 120):
        lines = shown(compared, width)
        rows = [line for line in lines if "│" in line or "└" in line]
        assert rows
        assert max(map(len, rows)) <= width
        assert max(map(len, rows)) > width - 4, "it is as wide as the terminal"


def test_the_command_prints_writes_a_page_and_json(here, capsys):
    assert cli.main(["compare", "runs/a", "runs/b", "--html", "page.html"]) == 0
    said = capsys.readouterr().out
    assert "runs/b is better than runs/a by" in said
    page = Path("page.html").read_text()
    assert problems(page) == []
    assert "runs/b 优于 runs/a" in page
    assert cli.main(["compare", "runs/a", "runs/b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == ["runs/a", "runs/b"]
    assert found["comparisons"][0]["distinguishable"] is True
    assert found["runs"][0]["validation"][0][0] == 0
    assert {"key": "train.lr", "values": [1e-4, 2e-2]} in found["settings"]
    damage(Path("runs/b/losses.json"), "half")
    assert cli.main(["compare", "runs/a", "runs/b"]) == ArtifactError.exit_code
    assert "runs/b/losses.json" in capsys.readouterr().err


def test_answers_to_the_same_questions_stand_side_by_side(here):
    for name, rate in (("one", 2e-2), ("two", 1e-4)):
        train(name, f"train.lr={rate}", "train.epochs=1", "eval.samples=2")
    compared = compare([Path("one"), Path("two")])
    first = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines() if '"samples"' in line]
    asked = next(line for line in first if line["step"] == compared.runs[0].best["step"])["answers"]
    assert [run_facts(run)["metrics"]["answers"] for run in compared.runs] == [2, 2]
    page = comparison_html(compared)
    assert problems(page) == []
    assert all(page.count(f'<dd class="question">{each["question"]}</dd>') == 1 for each in asked)
    assert page.count('<dl class="answers">') == 2
    lines = shown(compared)
    assert any(line.split()[:2] == ["one", "2"] for line in lines)
    assert "answers" not in [*map(str.strip, shown(compare(runs("a", "b"))))], "they have none"


def test_names_can_not_break_the_page_or_the_terminal(here):
    evil = Path("runs/{x}<script>alert(1)<b>[red]")
    shutil.move("runs/b", evil)
    compared = compare([Path("runs/a"), evil])
    page = comparison_html(compared)
    assert problems(page) == []
    assert "<script>alert" not in page
    assert "runs/{x}&lt;script&gt;alert(1)&lt;b&gt;[red] is better than runs/a" in page
    assert any("runs/{x}<script>alert(1)<b>[red] is better" in line for line in shown(compared))


def curve(*ys, letter="A"):
    return Curve(letter, "red", [(float(n), y) for n, y in enumerate(ys)])


def test_a_plot_stays_within_its_width_and_its_encoding():
    for width, ascii_only in product((40, 80, 119), (True, False)):
        lines = plot([curve(3.0, 2.0, 1.0), curve(3.0, 2.5, 2.6, letter="B")], width, ascii_only=ascii_only)
        assert {len(line.plain) for line in lines} == {width}
        text = "\n".join(line.plain for line in lines)
        assert text.isascii() is ascii_only
        assert (text.count("A"), text.count("B"), text.count("*")) == (2, 2, 1)


def test_a_plot_shows_where_the_values_are():
    lines = [line.plain for line in plot([curve(3.0, 2.0, 1.0)], 43, ascii_only=True)]
    assert lines[0].startswith("3.00 |A")
    assert lines[12].startswith("1.00 |")
    assert lines[12].endswith("A")
    assert lines[6].startswith("2.00 |")
    assert lines[6].index("A") == 24
    assert lines[-1].split() == ["0", "step", "2"]


@pytest.mark.parametrize("ys", [(1.0,), (2.0, 2.0), (1.0, math.nan, 2.0), (0.0, 1e9), (1e-7, 2e-7), tuple(range(5000))])
def test_a_plot_of_odd_values_is_drawn(ys):
    lines = plot([curve(*ys)], 80, ascii_only=False)
    assert len(lines) == 15
    assert max(len(line.plain) for line in lines) <= 80


def test_nothing_is_drawn_of_nothing():
    assert plot([curve(), curve(math.nan)], 80, ascii_only=False) == []
