"""A run that ends before its time goes on as if it had not, to the last bit; whatever ended it, and whenever."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from kills import FILES, RECIPES
from safetensors.torch import load_file, save_file
from worlds import CHATML, ROWS, WHOLE, combinations, make_model, work_in_copy, write_rows

from trimtab.artifacts import State, newest_state, read_state, saved_states, sha256_tensor, write_state
from trimtab.artifacts import state as artifacts_state
from trimtab.core import files, locks
from trimtab.core.config import override
from trimtab.core.errors import ArtifactError, DataError, RecipeError, StorageError
from trimtab.deploy import load_model
from trimtab.evaluate.example_losses import read_losses
from trimtab.objectives.sft import SFT
from trimtab.report import RunObserver
from trimtab.run import checkpoints, claim
from trimtab.run import script as running
from trimtab.run.evaluation import held_out_examples_of
from trimtab.run.recipe import Recipe
from trimtab.run.resume import _differences as differences
from trimtab.run.resume import taken
from trimtab.run.script import run_recipe
from trimtab.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 4}
method: {rank: 2, dropout: 0.2}
train: {epochs: 2, rows_per_step: 4, lr: 2e-2, evaluate_every: 3}
output: run
certify: false
"""
PAIRS = [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no, it is not"} for row in ROWS]
KILLS = 40 if WHOLE else 12
METHODS = ["lora", "bottleneck", "prefix", "ptuning_v2", "ia3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    transformers.utils.logging.disable_progress_bar()
    make_model(folder / "tiny", 0)
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("whole")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    return work_in_copy(made, tmp_path, monkeypatch)


class Killed(BaseException):
    """Nothing that a run would catch and tidy up after."""


class Ends(RunObserver):
    """Ends the run at a moment."""

    def __init__(self, what, number, how=Killed):
        self.moment, self.how, self.notes = (what, number), how, []

    def logged(self, kind, step, values):
        self.at("stepped" if kind == "train" else "evaluated", step)

    def on_notice(self, message):
        self.notes.append(message)

    def at(self, *moment):
        if moment == self.moment:
            raise self.how


def run(output, *words, watch=None):
    return run_recipe(Recipe.read(Path("r.yaml"), [f"output={output}", *words]), watch)


def ended(output, what, number, *words, how=Killed):
    with pytest.raises(how):
        run(output, *words, watch=Ends(what, number, how))


def result(output):
    """Everything that a run leaves but times: the adapter's bytes, its log, and what it knows of itself."""
    folder = Path(output)
    log = [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "took")}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    changing = (
        "seconds",
        "id",
        "moment",
        "reference",
        "memory",
        "memory_held",
        "plan",
    )  # which say how much memory was free, and what was in a cache
    state = {k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k not in changing}
    state["base"].pop("source")
    (weights,) = (folder / "adapter").glob("*.safetensors")
    return weights.read_bytes(), log, state


def losses(output):
    """Of each validation example, whatever folder it was in."""
    kept = read_losses(Path(output))
    return kept and ([(each.digest, each.tokens, each.text) for each in kept.examples], kept.before, kept.best, kept.step)


def assert_same(one, other):
    first, second = result(one), result(other)
    assert first[1:] == second[1:]
    assert first[0] == second[0]
    assert losses(one) == losses(other)


# Whenever it ends


@pytest.mark.parametrize("how", [Killed, KeyboardInterrupt, DataError])
@pytest.mark.parametrize("moment", [
    ("stepped", 1), ("evaluated", 0), ("evaluated", 3), ("stepped", 4), ("stepped", 6), ("evaluated", 6), ("stepped", 13),
    ("evaluated", 13),
])  # fmt: skip
def test_it_goes_on_as_if_it_had_not_ended(moment, how, here):
    assert len([line for line in result("whole")[1] if line["kind"] == "train"]) == 13
    ended("cut", *moment, how=how)
    run("cut")
    assert_same("cut", "whole")


def test_a_step_that_was_skipped_may_be_the_one_that_is_saved(here, monkeypatch):
    """And the one after which it goes on, without a loss to tell of."""
    calls, loss = [], SFT.loss

    def spoilt(self, *given):
        calls.append(1)
        return loss(self, *given) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(SFT, "loss", spoilt)
    run("skipped")
    calls.clear()
    ended("cut", "stepped", 6, how=KeyboardInterrupt)
    assert files.read_json(Path("cut/run.json"))["last"] | {"canaries": []} == {
        "step": 6, "folder": "checkpoints/step-000006", "train_loss": None, "eval_loss": None, "canaries": [],
    }  # fmt: skip
    run("cut")
    assert_same("cut", "skipped")
    assert [line["step"] for line in result("cut")[1] if "skipped" in line] == [6]


def test_it_may_end_again_and_again(here):
    for number in (2, 4, 5, 8, 9, 9, 12):
        ended("cut", "stepped", number, how=Killed if number % 2 else KeyboardInterrupt)
    run("cut")
    assert_same("cut", "whole")


@pytest.mark.parametrize(("method", "objective"), combinations(METHODS, ["sft", "dpo", "kto"]))
def test_any_method_and_objective_goes_on_at_random_cuts(method, objective, here):
    words = [f"method={method}", f"objective={objective}", "train.lr=1e-2"]
    words += ["data.train=pairs.jsonl"] if objective != "sft" else []
    words += ["train.epochs=1"] if objective == "kto" else []  # which makes two rows of a pair
    run("all", *words)
    draw = random.Random(f"{method}/{objective}")
    for cut in range(7):
        moment = ("stepped", draw.randint(1, 13)) if draw.random() < 0.7 else ("evaluated", draw.choice([3, 6, 9, 12]))
        ended(f"cut-{cut}", *moment, *words, how=draw.choice([Killed, KeyboardInterrupt]))
        run(f"cut-{cut}", *words)
        assert_same(f"cut-{cut}", "all")


def test_what_it_forgets_is_noticed(here, monkeypatch):
    """Without its moments, or from another step, it is another run."""
    for forget in ("value/", "exp_avg/", "exp_avg_sq/"):
        ended(f"cut-{forget[:-1]}", "stepped", 5)
        folder = saved_states(Path(f"cut-{forget[:-1]}") / "states")[0]
        state = read_state(folder)
        write_state(folder.parent, State(state.step, {
            name: torch.zeros_like(tensor) if name.startswith(forget) else tensor for name, tensor in state.tensors.items()
        }, state.facts))  # fmt: skip
        run(f"cut-{forget[:-1]}")
        assert result(f"cut-{forget[:-1]}")[0] != result("whole")[0]


# What went wrong meanwhile


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before(name, how, here):
    ended("cut", "stepped", 8)
    states = saved_states(Path("cut/states"))
    assert [state.name for state in states] == ["step-000006", "step-000003"]
    assert {path.name for path in Path("cut/checkpoints").iterdir()} >= {"step-000006", "step-000003"}, "what both speak of"
    for damaged in (1, 2):
        shutil.copytree("cut", f"cut-{damaged}")
        for state in saved_states(Path(f"cut-{damaged}/states"))[:damaged]:
            if how == "flipped":
                damage(state / name)
            elif how == "cut":
                os.truncate(state / name, (state / name).stat().st_size // 2)
            else:
                (state / name).unlink()
        watch = Ends("never", 0)
        run(f"cut-{damaged}", f"output=cut-{damaged}", watch=watch)
        assert sum("damaged" in note for note in watch.notes) == damaged
        assert any(f"after step {3 if damaged == 1 else 0} of 13" in note for note in watch.notes)
        assert_same_but_for_its_name(f"cut-{damaged}")


def assert_same_but_for_its_name(output):
    first, second = result(output), result("whole")
    assert first[0] == second[0]
    assert first[1] == second[1]


def test_half_a_line_and_half_a_file_are_forgotten(here):
    ended("cut", "stepped", 8)
    with open("cut/metrics.jsonl", "ab") as log:
        log.write(b'{"kind": "train", "st')
    for name in ("cut/.writing-1-run.json", "cut/checkpoints/.writing-step-000009-x/adapter_config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{")
    run("cut")
    assert_same("cut", "whole")
    assert not [path for path in Path("cut").rglob("*") if files.TEMPORARY in path.name]


def result_status(output):
    return json.loads((Path(output) / "run.json").read_text())["status"]


@pytest.mark.parametrize("recipe", RECIPES if WHOLE else ["every step is evaluated and saved", "nearly all of it"])
def test_real_kills(here, recipe):
    """SIGKILL at random moments, of training and of saving: every run ends as if it had never been killed."""
    for name, rows in FILES.items():
        write_rows(here / name, rows)
    (here / "r.yaml").write_text(RECIPES[recipe])
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "kills.py", here, str(KILLS), "0"], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(line["status"] == -signal.SIGKILL for line in said) >= KILLS
    assert {line["status"] for line in said} == {0, -signal.SIGKILL}, done.stderr
    for line in said:
        if line["status"] != 0:
            every = Recipe.read(here / "r.yaml").train
            lost = line["logged"] - line["saved"]
            assert lost <= (every.save_every or every.evaluate_every), "at most what was learned since the last save is lost"
    for number in range(1 + max(int(line["run"].removeprefix("run-")) for line in said)):
        assert_same(f"run-{number}", "spared")


# What may not be gone on with


def test_another_recipe_is_refused_with_the_keys_that_differ_before_anything_is_loaded(here, monkeypatch):
    ended("cut", "stepped", 8)
    before = tree("cut")
    monkeypatch.setattr(running, "prepare", None)
    with pytest.raises(RecipeError) as refused:
        run("cut", "train.lr=1e-3", "method.rank=4", "train.epochs=3", "train.evaluate_every=3")
    assert str(refused.value) == (
        "output: cut holds an unfinished run (after step 6 of 13) of another recipe:\n"
        "  method.rank: 2 in the run, 4 now\n"
        "  train.epochs: 2.0 in the run, 3.0 now\n"
        "  train.lr: 0.02 in the run, 0.001 now\n"
        "Set these back to resume it, or train into another folder, such as output=cut-2."
    )
    assert refused.value.free_folder == Path("cut-2")
    Path("cut-2").mkdir()
    for output, free in (("cut", "cut-3"), ("whole", "whole-2")):
        with pytest.raises((RecipeError, StorageError), match=f"such as output={free}"):
            run(output, "train.lr=1e-3")
    with pytest.raises(StorageError, match=r"exists already, as an unfinished run\. Leave resume=never out"):
        run("cut", "resume=never")
    assert {p: c for p, c in before.items() if p.name != "lock"} == {p: c for p, c in tree("cut").items() if p.name != "lock"}


def test_of_a_run_that_has_not_ended_the_newest_whole_adapter_is_taken(here):
    ended("cut", "stepped", 8)
    (Path("cut/checkpoints") / f"{files.TEMPORARY}step-000009").mkdir()
    Path("cut/checkpoints/step-000009").mkdir()
    target = load_model("cut")
    assert target.folder == Path("cut/checkpoints/step-000006")
    assert target.notes == ("cut is unfinished: this is its adapter after step 6 of 13.",)
    assert load_model("whole").notes == ()
    with pytest.raises(ArtifactError, match=r"or use its newest checkpoint: cut/checkpoints/step-000006\."):
        run("on", "start=cut", "method.dropout=0.2")


def test_other_content_is_refused_by_what_it_is_in(here):
    ended("cut", "stepped", 8)
    rows = here / "rows.jsonl"
    write_rows(rows, ROWS[:-1])
    with pytest.raises(
        RecipeError,
        match=rf"data: the training or held-out examples are not the same: {re.escape(str(rows))} has changed\nSet these",
    ):
        run("cut")
    write_rows(rows, ROWS)
    write_rows(here / "more.jsonl", ROWS[1:])
    with pytest.raises(RecipeError) as refused:
        run("cut", "data.train=more.jsonl", "data.eval=5")
    for words in (
        "are not the same\n",
        f"data.train: ['{rows}'] in the run, ['{here / 'more.jsonl'}'] now",
        "data.eval: 4 in the run, 5 now",
    ):
        assert words in str(refused.value)
    assert not re.search("[0-9a-f]{64}", str(refused.value))
    make_model(here / "tiny", 1)
    with pytest.raises(RecipeError, match="model: it is another base model, with different weights\n"):
        run("cut")
    make_model(here / "tiny", 0)
    run("cut", "certify=false")
    with pytest.raises(StorageError, match="exists already, as a finished run, and is not overwritten"):
        run("cut")


def test_the_same_content_may_lie_elsewhere(here):
    """Model, data, the adapter that is trained on, the reference and the run itself: all moved, and it goes on to the same end."""
    same = ["objective=dpo", "train.lr=1e-2", "data.eval=6", "method.dropout=0"]
    named = {"data.train": "pairs.jsonl", "objective.reference": "ref", "start": "first"}
    words = [*same, *(f"{key}={name}" for key, name in named.items())]
    run("first", "train.epochs=0.4", "method.dropout=0")
    run("ref", "train.epochs=0.6", "method.dropout=0")
    run("all", *words)
    ended("cut", "stepped", 8, *words)
    Path("moved").mkdir()
    for name in ("tiny", "cut", *named.values()):
        shutil.move(name, f"moved/{name}")
    for name in ("first", "ref"):  # the adapters remember where their base was
        assert f"{here}/tiny" in Path(f"moved/{name}/adapter/trimtab.json").read_text()
    watch = Ends("never", 0)
    run("moved/cut", *same, "model=moved/tiny", *(f"{key}=moved/{name}" for key, name in named.items()), watch=watch)
    (note,) = [note for note in watch.notes if "the content is the same" in note]
    for key in ("model.name", *named):
        assert re.search(rf"{key}: .*{here}/.* in the run, .*{here}/moved/", note)
    assert result("moved/cut")[0] == result("all")[0]
    assert f"{here}/moved/pairs.jsonl" in Path("moved/cut/recipe.yaml").read_text()
    facts = files.read_json(Path("moved/cut/run.json"))
    assert [facts["base"]["source"], facts["start"]["folder"]] == [f"{here}/moved/tiny", f"{here}/moved/first/adapter"]
    assert len(held_out_examples_of(Path("moved/cut"))[0]) == 6


@pytest.mark.parametrize("name", ["run", "run-9", "a: b", "007", "null", "-", "a-", "ä 中", "x #1", "-2"])
def test_a_folder_that_is_free_is_offered_in_words_that_a_recipe_takes(name, here):
    Path(name).mkdir()
    error = taken(StorageError, Path(name), "It is taken")
    assert not os.path.lexists(error.free_folder)
    assert error.free_folder.name == ("run-10" if name == "run-9" else f"{name}-2")
    assert Recipe.read(Path("r.yaml"), [override("output", str(error.free_folder))]).output == error.free_folder
    assert Recipe.read(Path("r.yaml"), [override("output", name)]).output == Path(name)


def test_another_reference_or_start_is_refused(here):
    words = ["data.train=pairs.jsonl", "objective=dpo", "objective.reference=first", "method.dropout=0", "train.lr=1e-2"]
    run("first", "train.epochs=0.4")
    ended("cut", "stepped", 8, *words)
    started = ["method.dropout=0.2", "start=first"]
    ended("on", "stepped", 8, *started)
    shutil.rmtree("first")
    run("first", "train.epochs=0.6")
    with pytest.raises(RecipeError, match=r"objective\.reference: the reference model is not what it was\nSet"):
        run("cut", *words)
    with pytest.raises(RecipeError, match=r"start: the adapter there is not what it was\nSet"):
        run("on", *started)


def test_where_only_upper_layers_learn_it_is_said_that_rounding_may_differ(here):
    for name, words, said in (("upper", ["method.targets=[model.layers.1.self_attn.q_proj]"], True), ("all", [], False)):
        ended(name, "stepped", 8, *words)
        watch = Ends("never", 0)
        run(name, *words, watch=watch)
        assert any("cache of frozen layers" in note for note in watch.notes) == said


def test_other_versions_are_said_to_round_otherwise(here):
    ended("cut", "stepped", 8)
    facts = json.loads(Path("cut/run.json").read_text())
    facts["versions"]["torch"] = "1.0"
    Path("cut/run.json").write_text(json.dumps(facts))
    watch = Ends("never", 0)
    run("cut", watch=watch)
    assert any("versions.torch: 1.0 in the run" in note for note in watch.notes)


@pytest.mark.parametrize("begun", [True, False])
def test_two_processes_do_not_train_into_one_folder(begun, here):
    if begun:
        ended("cut", "stepped", 8)
    before = tree("cut")
    script = (
        f"import time\nfrom pathlib import Path\nfrom trimtab.core import locks\nwith locks.file_lock(Path('cut') / {checkpoints.LOCK!r}):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=rf"another process \({other.pid} on .+\) is training there"):
            run("cut")
        assert {path: content for path, content in tree("cut").items() if path.name != checkpoints.LOCK} == {
            path: content for path, content in before.items() if path.name != checkpoints.LOCK
        }
        other.kill()
    run("cut")
    assert_same("cut", "whole")


def tree(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Meanwhile(RunObserver):
    """Does something when everything has been looked at, and nothing has been written yet."""

    def __init__(self, do):
        self.do = do

    def on_plan(self, *_):
        self.do()


def test_the_second_of_two_that_begin_at_once_writes_nothing(here):
    def second():
        with pytest.raises(StorageError, match="is training there"):
            run("new", "train.lr=1e-3", "data.eval=5")

    run("new", watch=Meanwhile(second))
    assert "lr: 0.02" in Path("new/recipe.yaml").read_text()
    assert_same("new", "whole")
    assert not Path("new/lock").exists()


@pytest.mark.parametrize("how", [DataError, KeyboardInterrupt])
def test_what_does_not_begin_leaves_nothing_behind(how, here):
    Path("mine").mkdir()
    for output in ("deep/down/new", "mine"):

        def ends(output=output):
            assert {path.name for path in Path(output).iterdir()} == {"lock"}
            raise how

        with pytest.raises(how):
            run(output, watch=Meanwhile(ends))
    assert not Path("deep").exists()
    assert list(Path("mine").iterdir()) == [], "a folder that was there stays"


@pytest.mark.parametrize("written", ["lock", "recipe.yaml", "data.json"])
def test_what_is_killed_while_it_begins_begins_again(written, here, monkeypatch):
    def kills(write):
        def last(path, content):
            write(path, content)
            if path == Path("new") / written:
                raise Killed

        return last

    def taken_away(*_):  # a process that is killed takes nothing away
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(claim, "_remove_unbegun", taken_away)
        patch.setattr(files, "write_text", kills(files.write_text))
        patch.setattr(files, "write_json", kills(files.write_json))
        with pytest.raises(Killed):
            run("new", watch=Meanwhile(lambda: taken_away() if written == "lock" else None))
    assert (Path("new") / written).exists()
    assert not Path("new/run.json").exists()
    run("new")
    assert_same("new", "whole")


def test_what_somebody_else_has_put_there_is_not_touched(here):
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        run("mine")
    assert tree("mine") == {Path("mine/recipe.yaml"): b"mine"}

    def others():
        Path("new/notes.txt").write_text("mine")
        raise DataError

    with pytest.raises(DataError):
        run("new", watch=Meanwhile(others))
    assert tree("new") == {Path("new/notes.txt"): b"mine"}


def test_a_file_system_without_locks_is_said_to_have_none(here, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    watch = Ends("never", 0)
    run("new", watch=watch)
    assert [note for note in watch.notes if "without locks" in note]


def test_a_state_is_a_bijection_or_refused(tmp_path):
    tensors = {"value/a": torch.randn(3), "mean/a": torch.randn(3)}
    folder = write_state(tmp_path, State(7, tensors, {"x": 1}))
    assert read_state(folder).facts == {"x": 1}
    assert newest_state(tmp_path, print).step == 7
    manifest = json.loads((folder / "state.json").read_text())
    for key, value in (("step", 8), ("facts", {}), ("format", 2)):
        (folder / "state.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(ArtifactError, match="changed since it was saved"):
            read_state(folder)
    (folder / "state.json").write_text(json.dumps(manifest))
    save_file({**load_file(folder / "state.safetensors"), "more": torch.ones(1)}, folder / "state.safetensors")
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        read_state(folder)
    told = []
    assert newest_state(tmp_path, told.append) is None
    assert len(told) == 1


@pytest.mark.parametrize("damaged", ["state.safetensors", "state.json"])
def test_a_disk_that_writes_something_else_is_noticed_before_an_older_state_goes(damaged, here, monkeypatch):
    """The tensors before the folder of the state appears, and its manifest as soon as it has."""
    calls = []

    def spoilt(write):
        def otherwise(path, content):
            write(path, content)
            if path.name == damaged:
                calls.append(1)
                if len(calls) == 3:
                    written = path.read_bytes()
                    path.write_bytes(written[:-3] + bytes([written[-3] ^ 1]) + written[-2:])

        return otherwise

    with monkeypatch.context() as patch:
        patch.setattr(artifacts_state, "write_tensors", spoilt(artifacts_state.write_tensors))
        patch.setattr(files, "write_json", spoilt(files.write_json))
        with pytest.raises(ArtifactError, match=rf"{damaged}.*(differs from what was written|not valid JSON|changed since)"):
            run("cut")
    appeared = ["step-000009"] if damaged == "state.json" else []
    assert [state.name for state in saved_states(Path("cut/states"))] == [*appeared, "step-000006", "step-000003"]
    run("cut")
    assert_same("cut", "whole")


def test_what_is_written_is_what_is_kept(tmp_path):
    """Bit for bit, whatever the type and shape: -0 is not 0, and a number that is none is kept as it is."""
    tensors = {
        "a": torch.tensor([0.0, -0.0, math.nan, math.inf]),
        "b": torch.randn(3, 4).T,
        "c": torch.tensor(2, dtype=torch.int64),
        "d": torch.randn(2, 2, 2, dtype=torch.bfloat16),
    }
    path = write_state(tmp_path, State(1, tensors, {})) / "state.safetensors"
    other = write_state(tmp_path, State(2, dict(reversed(tensors.items())), {})) / path.name
    assert other.read_bytes() == path.read_bytes(), "in whatever order they are given"
    assert artifacts_state.changed_tensor(path, tensors) is None
    read = read_state(path.parent).tensors
    assert list(read) == list(tensors)
    for name, other in (
        ("a", torch.tensor([0.0, 0.0, math.nan, math.inf])),
        ("b", tensors["b"].reshape(3, 4)),
        ("c", torch.tensor(2, dtype=torch.int32)),
        ("d", tensors["d"].view(torch.float16)),
    ):
        assert artifacts_state.changed_tensor(path, {**tensors, name: other}) == name
        assert sha256_tensor(read[name]) == sha256_tensor(tensors[name])
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts_state.changed_tensor(path, {**tensors, "f": torch.ones(1)})
    with pytest.raises(ArtifactError, match=r"e .* is not whole on this process"):
        write_state(tmp_path, State(3, {**tensors, "e": torch.zeros(0, 3)}, {}))


def test_a_state_of_other_parameters_is_refused(here):
    ended("cut", "stepped", 8)
    (folder, _) = saved_states(Path("cut/states"))
    state = read_state(folder)
    name, second, third = sorted(state.tensors)[:3]
    for tensors, words in (
        ({key: tensor for key, tensor in state.tensors.items() if key != name}, f"{name} is not what this run trains."),
        ({**state.tensors, "value/other": torch.ones(1)}, "value/other is not what this run trains."),
        ({**state.tensors, name: state.tensors[name].double()}, f"{name} is not what this run trains."),
        ({**state.tensors, name: state.tensors[name][:1]}, f"{name} is not what this run trains."),
        (
            {key: tensor for key, tensor in state.tensors.items() if key not in (name, second)},
            f"{name} is not what this run trains (and 1 more).",
        ),
        (
            {key: tensor for key, tensor in state.tensors.items() if key not in (name, second, third)},
            f"{name} is not what this run trains (and 2 more).",
        ),
    ):
        write_state(folder.parent, State(state.step, tensors, state.facts))
        with pytest.raises(ArtifactError) as refused:
            run("cut")
        assert str(refused.value) == words


def test_a_state_of_another_version_is_refused(tmp_path):
    folder = write_state(tmp_path, State(3, {"a": torch.ones(1)}, {}))
    manifest = {key: value for key, value in files.read_json(folder / "state.json").items() if key != "digest"}
    for changes in ({"format": 1}, {"more": 1}):
        files.write_json(folder / "state.json", {**manifest, **changes, "digest": files.json_digest(manifest)})
        with pytest.raises(ArtifactError, match="changed since it was saved"):
            read_state(folder)
        changed = {**manifest, **changes}
        files.write_json(folder / "state.json", {**changed, "digest": files.json_digest(changed)})
        with pytest.raises(ArtifactError, match="written by another version of Trimtab"):
            read_state(folder)


def test_a_run_that_is_killed_before_it_has_logged_anything_goes_on(here, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "canaries", killed)
        with pytest.raises(Killed):
            run("cut")
    assert not Path("cut/metrics.jsonl").exists()
    run("cut")
    assert_same("cut", "whole")


def test_a_run_that_ended_meanwhile_is_left_alone(here, monkeypatch):
    """Between the first look and the lock."""
    recipe, before, looked = Recipe.read(Path("r.yaml"), ["output=whole"]), tree("whole"), []
    look = claim._is_unfinished
    monkeypatch.setattr(claim, "_is_unfinished", lambda recipe: looked.append(1) or len(looked) == 1 or look(recipe))
    with pytest.raises(StorageError, match="exists already"), claim.claim_output(recipe, print):
        pass
    assert {path: content for path, content in tree("whole").items() if path.name != checkpoints.LOCK} == before


def test_what_differs_is_named_by_its_place_where_one_of_both_has_nothing():
    before, now = {"a": {"b": 1, "c": 2}, "d": None, "e": 3}, {"a": {"b": 1, "c": 4}, "d": {"f": 5}, "g": (6,)}
    assert list(differences(before, now)) == [
        ("a.c", 2, 4), ("d", None, {"f": 5}), ("e", 3, None), ("g", None, (6,)),
    ]  # fmt: skip
    assert list(differences({"a": (1, 2)}, {"a": [1, 2]})) == [], "as they come back from JSON"


def test_a_run_has_begun_with_nothing_done():
    assert asdict(checkpoints.Progress()) == {
        "best": None, "last": {}, "seconds": 0.0, "tokens": 0, "computed": 0, "skipped": 0, "evaluated_before_training": False,
        "loss_scale": {}, "standing": {}, "stopped": None, "losses": {},
    }  # fmt: skip


@pytest.mark.parametrize(("step", "loss", "unseen"), [
    (1000, None, True), (1000, 1.0, False), (1004, None, True), (1004, 1.0, False), (1002, None, False), (1002, 1.0, False),
])  # fmt: skip
def test_a_step_that_was_to_be_followed_by_a_look_is_known_by_its_number(step, loss, unseen):
    saver = object.__new__(checkpoints.Checkpointer)
    saver.progress = checkpoints.Progress(last={"step": step, "eval_loss": loss})
    saver.prepared, saver.evaluate_every = SimpleNamespace(data=SimpleNamespace(eval=[1]), steps=range(1004)), 100
    assert saver.lacks_evaluation() == unseen


def test_a_run_is_resumed_on_another_day_with_a_template_that_writes_the_date(here, monkeypatch):
    """As Llama 3.2's and GPT-OSS's do: the date of the run's start is written in all of it, and afterwards."""
    import datetime

    from trimtab.base import model as base_model

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls):
            return datetime.datetime.now() + datetime.timedelta(days=400)

    make_model(Path("tiny"), 0, "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + CHATML)
    run("whole-dated")
    ended("dated", "stepped", 7)
    started = json.loads(Path("dated/run.json").read_text())
    monkeypatch.setattr(base_model, "datetime", Tomorrow)
    run("dated")
    assert_same("dated", "whole-dated")
    assert json.loads(Path("dated/run.json").read_text())["moment"] == started["moment"]
    target, text = load_model("dated"), [{"role": "user", "content": "x"}]
    assert target.base.moment.isoformat() == started["moment"]
    assert target.base.template.render(text).startswith(f"Today: {target.base.moment:%d %b %Y}")
    other = run("later", "train.epochs=0.5")
    assert other.record["data_digest"] != started["data_digest"]  # the negative control: tomorrow's tokens are others


def test_a_run_that_is_resumed_gives_back_freed_memory_as_one_that_begins(here, monkeypatch):
    told = []
    monkeypatch.setattr(loop, "never_keep_freed_memory", lambda: told.append(1))
    ended("cut", "stepped", 5)
    assert told
    told.clear()
    run("cut")
    assert told


class EndsAfterTraining(RunObserver):
    def on_finish(self, *_):
        raise Killed


def test_what_training_has_held_is_kept_where_only_the_certificate_is_left(here):
    """A process that takes no step would say that the plan was far too large."""
    with pytest.raises(Killed):
        run("cut", watch=EndsAfterTraining())
    held = json.loads(Path("cut/run.json").read_text())["memory_held"]
    assert held["measured"] > 0
    run("cut")
    assert json.loads(Path("cut/run.json").read_text())["memory_held"] == held


def test_the_log_is_json_whatever_the_numbers_are(here, monkeypatch):
    """A measure that has no value in a step (the rewards of good answers where there are none), say."""
    monkeypatch.setattr(SFT, "measures", lambda *_: {"odd": torch.tensor([math.nan]), "large": torch.tensor([-math.inf])})
    run("new", "train.epochs=0.4")
    lines = Path("new/metrics.jsonl").read_text().splitlines()
    read_strictly = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert {line["kind"] for line in read_strictly} == {"train", "eval"}
    assert all((line["odd"], line["large"]) == ("nan", "-inf") for line in read_strictly)
