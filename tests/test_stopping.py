"""Evaluating, saving and stopping: each by its own interval, resumed to the last bit, and from any checkpoint that is kept."""

import json
import shutil
from pathlib import Path

import pytest
from test_resume import Ends, Killed, assert_same, ended, result, run
from worlds import ROWS, make_model, work_in_copy, write_rows

from trimtab.artifacts import saved_states
from trimtab.core.errors import ArtifactError, RecipeError, StorageError
from trimtab.evaluate import Loss
from trimtab.report import RunObserver
from trimtab.run import validation
from trimtab.run.early_stopping import Standing

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 6}
method: {rank: 2, dropout: 0.2}
train: {epochs: 2, rows_per_step: 4, lr: 2e-2, evaluate_every: 2, save_every: 5, keep: 3}
output: run
certify: false
"""
STEPS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    make_model(folder / "tiny", 0)
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("whole")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    return work_in_copy(made, tmp_path, monkeypatch)


def checkpoints(output):
    return [int(path.name.removeprefix("step-")) for path in sorted(Path(output, "checkpoints").iterdir())]


def states(output):
    return [int(path.name.removeprefix("step-")) for path in reversed(saved_states(Path(output, "states")))]


def evaluated(output):
    return [(line["step"], line["loss"]) for line in result(output)[1] if line["kind"] == "eval"]


# Intervals


def test_evaluations_and_checkpoints_have_their_own_intervals_and_the_best_is_saved_whatever_they_are(here):
    after = [step for step, _ in evaluated("whole")]
    assert after == [0, 2, 4, 6, 8, 10, 12]
    losses = dict(evaluated("whole"))
    best = min((loss, step) for step, loss in losses.items())[1]
    bests = [step for step in after[1:] if losses[step] == min(losses[s] for s in after[1:] if s <= step)]
    saved = sorted({5, 10, 12, *bests})
    assert checkpoints("whole") == sorted({best, *saved[-3:]})
    assert json.loads(Path("whole/run.json").read_text())["best"]["step"] == best


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("moment", [("stepped", 1), ("evaluated", 0), ("evaluated", 2), ("stepped", 5), ("stepped", 6), ("evaluated", 6),
                                    ("stepped", 7), ("evaluated", 10), ("evaluated", 12)])  # fmt: skip
def test_it_resumes_as_if_it_had_not_ended_between_any_two_of_them(moment, how, here):
    ended("cut", *moment, how=how)
    run("cut")
    assert_same("cut", "whole")


def test_an_evaluation_that_was_made_is_saved_with_the_step_when_it_is_interrupted_and_not_made_again(here, monkeypatch):
    """A worse one than before, after a step at which no checkpoint is due."""
    losses = {0: 9.0, 2: 1.0, 4: 5.0}
    monkeypatch.setattr(validation, "score_loss", _scores(losses))
    ended("cut", "evaluated", 4, how=KeyboardInterrupt)
    assert states("cut") == [2, 4]
    assert json.loads(Path("cut/run.json").read_text())["last"]["eval_loss"] == 5.0
    losses |= {6: 4.0, 8: 3.0, 10: 2.0, 12: 2.0}
    run("cut")
    assert [step for step, _ in evaluated("cut")] == [0, 2, 4, 6, 8, 10, 12]


def _scores(losses):
    """Stands for `score_loss`: the losses of a run by the step, each taken once, of rows that agree."""

    def score(base, rows, pack_tokens, objective):
        loss = losses.pop(min(losses))
        rows = len(rows)
        return Loss(loss, (loss, loss), rows, rows, {}, [loss] * rows, [1.0] * rows, [-1.0] * 9, places=list(range(rows)))

    return score


# Early stopping


def test_noise_is_no_improvement_and_small_ones_add_up():
    def loss(*sums):
        return Loss(sum(sums) / len(sums), (0, 0), 4, 4, sums=list(sums), counts=[1] * len(sums))

    first = Standing(2, 1.0, [1.0] * 4)
    noisy = first.after(4, loss(0.2, 1.6, 1.5, 0.3), 0.0)
    assert (noisy.step, noisy.waited) == (2, 1), "the mean is lower, and the rows disagree"
    small = first.after(4, loss(0.99, 0.98, 0.99, 0.98), 0.0)
    assert (small.step, small.waited) == (4, 0), "little, and all rows agree"
    assert first.after(4, loss(0.99, 0.98, 0.99, 0.98), 0.1).waited == 1
    added = first.after(4, loss(0.95, 0.95, 0.95, 0.95), 0.1).after(6, loss(0.8, 0.8, 0.8, 0.8), 0.1)
    assert (added.step, added.waited) == (6, 0), "it is compared with the last that counted, not with the one before"
    assert "it is distinguishably worse" in first.after(4, loss(1.2, 1.3, 1.2, 1.3), 0.0).reason(4, 1.0)
    assert "it can't be told from no difference" in noisy.reason(4, 0.9)
    assert "it is too little" in first.after(4, loss(0.99, 0.98, 0.99, 0.98), 0.1).reason(4, 0.98)


SHOWN = {0: 9.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 1.9, 10: 2.2, 12: 1.0}


def test_it_stops_when_so_many_evaluations_in_a_row_have_not_improved(here, monkeypatch):
    monkeypatch.setattr(validation, "score_loss", _scores(dict(SHOWN)))
    run("patient", "train.patience=2")
    assert [step for step, _ in evaluated("patient")][-1] == 12, "8 has improved on 4, if by little"
    monkeypatch.setattr(validation, "score_loss", _scores(dict(SHOWN)))
    told = []
    watch = RunObserver()
    watch.on_finish = lambda record, folder: told.append(record)
    run("stopped", "train.patience=2", "train.min_improvement=0.2", watch=watch)
    _, log, record = result("stopped")
    assert max(line["step"] for line in log) == 8
    assert record["stopped"] == (
        "stopped early after step 8: no improvement of the validation loss beyond noise in 2 evaluations since step 4, where it was 2.0000. "
        "Its difference now is -0.1000 (95 % interval -0.1000 to -0.1000): it is too little. The best was 1.9000."
    )
    assert told[0]["stopped"] == record["stopped"]
    assert (record["status"], record["best"]["step"], record["last"]["step"], record["steps"]) == ("done", 8, 8, STEPS)
    assert json.loads(Path("whole/run.json").read_text())["stopped"] is None


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize(
    "moment", [("stepped", 3), ("evaluated", 4), ("stepped", 5), ("evaluated", 6), ("stepped", 7), ("evaluated", 8)]
)
def test_what_it_has_waited_for_is_resumed_too(moment, how, here):
    """By real losses, with an improvement asked for that only the first evaluations make."""
    words = ["train.patience=2", "train.min_improvement=0.5"]
    run("stopped", *words)
    assert max(line["step"] for line in result("stopped")[1]) == 8
    ended("cut", *moment, *words, how=how)
    run("cut", *words)
    assert_same("cut", "stopped")


def test_a_run_that_has_stopped_takes_no_step_when_it_is_resumed_to_be_finished(here, monkeypatch):
    from trimtab.run import script

    words = ["train.patience=2", "train.min_improvement=0.5"]
    run("stopped", *words)
    with monkeypatch.context() as patch:
        patch.setattr(script, "copy_adapter", _killed)
        with pytest.raises(Killed):
            run("cut", *words)
    monkeypatch.setattr(script, "train", None)
    run("cut", *words)
    assert_same("cut", "stopped")


def _killed(*_):
    raise Killed


# Going back


def test_it_goes_back_to_a_checkpoint_that_is_kept_and_ends_as_if_it_had_not(here):
    ended("cut", "stepped", 11)
    kept = states("cut")
    assert len(kept) == 3
    assert kept[-1] == 10
    for step in kept:
        shutil.copytree("cut", f"from-{step}")
        watch = Ends("never", 0)
        run(f"from-{step}", f"resume={step}", watch=watch)
        assert any(f"after step {step} of {STEPS}" in note for note in watch.notes)
        assert (f"going back to step {step}: what was logged and saved after it is removed" in watch.notes) is (step != 10)
        assert_same(f"from-{step}", "whole")
        assert "resume: auto\n" in Path(f"from-{step}/recipe.yaml").read_text()


def test_what_comes_after_is_removed_only_when_it_goes_on(here):
    ended("cut", "stepped", 11)
    before = {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file() and path.name != "lock"}
    first, *_ = states("cut")
    with pytest.raises(RecipeError, match="of another recipe"):
        run("cut", f"resume={first}", "train.lr=1e-3")
    with pytest.raises(RecipeError) as refused:
        run("cut", "resume=7")
    kept = ", ".join(map(str, states("cut")))
    assert (
        str(refused.value)
        == f"resume: cut has no checkpoint after step 7: there are those after steps {kept}. Give one of these, or auto."
    )
    assert before == {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(KeyboardInterrupt, match="the same command with resume=auto resumes from there"):
        run("cut", f"resume={first}", watch=Ends("stepped", first + 1, KeyboardInterrupt))
    assert states("cut")[-1] == first + 1
    assert max(line["step"] for line in map(json.loads, Path("cut/metrics.jsonl").read_text().splitlines())) == first + 1
    damaged = saved_states(Path("cut/states"))[0] / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        run("cut", f"resume={first + 1}")


def test_there_must_be_something_to_go_back_to(here):
    with pytest.raises(RecipeError, match=r"resume: new holds no run to resume from step 4\. Leave resume out to begin one\."):
        run("new", "resume=4")
    assert not Path("new").exists()
    ended("cut", "stepped", 1)
    with pytest.raises(RecipeError, match="there is none yet"):
        run("cut", "resume=4")
    with pytest.raises(StorageError) as refused:
        run("whole", "resume=10")
    assert "to train its adapter further, begin a run from it (start=whole)" in str(refused.value)


def test_a_run_may_start_from_any_checkpoint_of_another(here):
    first, *_ = checkpoints("whole")
    run("on", f"start=whole/checkpoints/step-{first:06d}", "train.max_steps=2", "train.epochs=auto", "method.dropout=0.2")
    _, log, record = result("on")
    assert record["start"]["folder"].endswith(f"whole/checkpoints/step-{first:06d}")
    assert record["steps"] == 2
    losses = dict(evaluated("whole"))
    if first in losses:
        assert log[0]["loss"] == losses[first], "its evaluation before training is that checkpoint's"


def test_how_often_it_is_saved_and_how_much_is_kept_may_change_when_it_resumes(here):
    ended("cut", "stepped", 7)
    run("cut", "train.save_every=1", "train.keep=4")
    assert result("cut")[0] == result("whole")[0]
    assert set(checkpoints("cut")) >= {9, 10, 11, 12}


def test_the_seed_of_the_data_decides_about_order_and_split_and_that_of_training_about_the_rest(here):
    def order_and_split(output, *words):
        run(output, "train.max_steps=1", "train.epochs=auto", *words)
        facts = json.loads(Path(output, "data.json").read_text())
        return facts["held_out"], result(output)[1]

    plain = order_and_split("plain")
    assert order_and_split("same", "data.seed=0") == plain
    other = order_and_split("other", "data.seed=3")
    assert other[0] != plain[0]
    assert order_and_split("both", "data.seed=3", "train.seed=3")[0] == other[0] == order_and_split("old", "train.seed=3")[0]
    weights = order_and_split("weights", "data.seed=0", "train.seed=3")
    assert weights[0] == plain[0]
    assert weights[1] != plain[1]


def test_another_order_is_another_run_though_its_examples_are_the_same(here):
    write_rows(here / "held.jsonl", [{"prompt": f"Is {n} one?", "completion": "yes"} for n in range(50, 54)])
    ended("cut", "stepped", 7, "data.eval=held.jsonl")
    with pytest.raises(RecipeError, match=r"data\.seed: None in the run, 5 now"):
        run("cut", "data.eval=held.jsonl", "data.seed=5")
