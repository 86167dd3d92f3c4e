"""Trackers: each gets all that metrics.jsonl has, once; and whatever one does, training goes on, and says so once.

Their packages are stand-ins in tests/stand_ins; `make trackers` runs the real ones, and holds the stand-ins to their signatures.
"""

import importlib.util
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_resume import Ends, Killed, here, made, result, run  # noqa: F401 (fixtures)
from together import run_together

from trimtab import cli
from trimtab.core import locks
from trimtab.core.errors import ArtifactError, RecipeError, StorageError
from trimtab.report import RunObserver, Together
from trimtab.run import script, tracking
from trimtab.run.recipe import Recipe
from trimtab.track import Tracker, TrackerProcess, _process
from trimtab.track._names import COLUMNS, Namer
from trimtab.track._worker import problem

NAMES = Tracker.names()
STAND_INS = Path(__file__).with_name("stand_ins")
METRICS = [
    {"kind": "train", "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.5, "items": 9.0, "tokens": 40, "computed": 30, "took": 0.5,
     "epoch": 0.25, "seconds": 0.6},
    {"kind": "train", "step": 2, "loss": "nan", "lr": 1e-3, "grad_norm": 3.0, "items": 9.0, "tokens": 60, "computed": 50, "took": 0.5,
     "skipped": "Step 2: …", "epoch": 0.5, "seconds": 1.1},
    {"kind": "eval", "step": 0, "loss": 3.0, "low": 2.0, "high": 4.0, "tokens": 99, "rows": 4, "sources": {"law": {"loss": 3.5, "rows": 2}}},
    {"kind": "samples", "step": 0, "exact_match": 0.5, "answers": [
        {"question": "1 | 1?", "expected": "2", "answer": "3", "right": False},
        {"question": "2?", "expected": "2", "answer": "2", "right": True}]},
    {"kind": "eval", "step": 2, "loss": 2.0, "low": None, "high": None, "tokens": 99, "rows": 4, "accuracy": 1.0, "chosen_reward": 0.5},
    {"kind": "train", "step": 3, "loss": 2.0, "lr": 5e-4, "grad_norm": 1.0, "items": 9.0, "tokens": 50, "computed": 50, "took": 0.25,
     "accuracy": 0.75, "margin": 0.1, "kl": 0.2, "rejected_logp": -7.0, "epoch": 0.75, "seconds": 1.5},
]  # fmt: skip
"""The base model is evaluated after training has begun, so steps do not only rise."""
SHOWN = [
    (1, {"train/loss": 2.5, "train/learning_rate": 1e-3, "train/grad_norm": 1.5, "train/epoch": 0.25, "train/global_step": 1,
         "train/num_input_tokens_seen": 40, "perf/tokens_per_s": 80.0, "perf/seconds": 0.6}),
    (2, {"train/learning_rate": 1e-3, "train/grad_norm": 3.0, "train/epoch": 0.5, "train/global_step": 2,
         "train/num_input_tokens_seen": 100, "perf/tokens_per_s": 120.0, "perf/seconds": 1.1}),
    (0, {"eval/loss": 3.0, "eval/loss_low": 2.0, "eval/loss_high": 4.0, "eval/law/loss": 3.5}),
    (0, {"eval/exact_match": 0.5}),
    (2, {"eval/loss": 2.0, "eval/rewards/accuracies": 1.0, "eval/rewards/chosen": 0.5}),
    (3, {"train/loss": 2.0, "train/learning_rate": 5e-4, "train/grad_norm": 1.0, "train/rewards/accuracies": 0.75,
         "train/rewards/margins": 0.1, "train/kl": 0.2, "train/logps/rejected": -7.0, "train/epoch": 0.75, "train/global_step": 3,
         "train/num_input_tokens_seen": 150, "perf/tokens_per_s": 200.0, "perf/seconds": 1.5}),
]  # fmt: skip
ROWS = [["1 | 1?", "2", "3", False], ["2?", "2", "2", True]]


class Notes:
    """What a stand-in has noted."""

    def __init__(self, path):
        self.path = path

    def all(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def of(self, call):
        return [note for note in self.all() if note["call"] == call]


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """Stand-ins instead of packages, in this process and in those of trackers; no login."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_INS), str(Path(__file__).parents[1] / "src")]))
    monkeypatch.setenv("STAND_IN_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")) or name == "NETRC":
            monkeypatch.delenv(name)
    return Notes(tmp_path / "notes")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    record = {
        "status": "done",
        "id": "a" * 21,
        "steps": 3,
        "peak_lr": 1e-3,
        "memory_held": {"measured": 2e9},
        "versions": {"torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text("model: {name: tiny}\ntrain: {lr: 1e-3}\ntrack: []\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    return folder


def sent(tracker, folder, status="done", patience=20.0):
    """What the tracker says at its end, if anything."""
    process = TrackerProcess(Tracker.pick(tracker), folder, patience)
    process.start()
    process.finish(status)
    return process.wait(30)


def faults(notes, name, project="trimtab", run="first"):
    """What a tracker has not got as it should have, by the notes of its stand-in."""
    logged = [note for note in notes if note["call"] in ("log", "table")]
    values = sorted((note["step"], *value) for note in logged for value in note.get("values", {}).items())
    end = (3, "perf/memory_gb", 2.0)
    expected = sorted((step, *value) for step, line in SHOWN for value in line.items())
    if name == "wandb":  # which is told the step in each line, to draw over it
        values, expected = ([value for value in some if value[1] != "train/global_step"] for some in (values, expected))
    found = [] if [value for value in values if value != end] == expected else ["values"]
    found += [] if values.count(end) == 1 else ["the end"]
    tables = [(note["step"], table) for note in logged for table in note["tables"].items()]
    (_, (columns, rows)) = tables[0][1] if tables else ("", ([], []))
    expected = [[str(cell).replace("|", "\\|") if name == "tensorboard" else str(cell) for cell in row] for row in ROWS]
    whole = [step for step, _ in tables] == [0] and tables[0][1][0] == "eval/samples" and columns == list(COLUMNS)
    found += [] if whole and [list(map(str, row)) for row in rows] == expected else ["table"]
    begun = [note for note in notes if note["call"] == "init"]
    same = len(begun) == 1 and begun[0]["project"] == project and begun[0]["name"].startswith(run)
    found += [] if same and begun[0].get("id", "a" * 21) == "a" * 21 else ["run"]
    config = begun[0].get("config") if begun else None
    told = json.dumps(config) + "".join(str(note.get("text", "")) + f"{note.get('key')}={note.get('value')}" for note in notes)
    found += [] if re.search(r"(lr\W+|train\.lr=)(0\.001|1e-3)", told) and "peak_lr" in told and "tiny" in told else ["config"]
    ended = [note["call"] for note in notes if note["call"] in ("log", "finish")]
    found += [] if ended[-1:] == ["finish"] and ended.count("finish") == 1 else ["finish"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_gets_all_that_the_metrics_have_and_keeps_its_files_in_one_folder(name, notes, folder):
    assert sent(name, folder) is None
    assert faults(notes.all(), name) == []
    kept = {path.relative_to(folder).parts[:2] for path in folder.rglob("*") if path.is_file()} - {
        ("run.json",), ("recipe.yaml",), ("metrics.jsonl",),
    }  # fmt: skip
    assert kept == {("trackers", name)}


SPOILED = {
    "values": lambda notes: [note for note in notes if note.get("step") != 2],
    "the end": lambda notes: [note for note in notes if "perf/memory_gb" not in note.get("values", {})],
    "table": lambda notes: [note | ({"tables": {}} if note.get("tables") else {}) for note in notes],
    "run": lambda notes: [note | ({"project": "other"} if note["call"] == "init" else {}) for note in notes],
    "config": lambda notes: [note | ({"config": {}} if note["call"] == "init" else {}) for note in notes],
    "finish": lambda notes: [note for note in notes if note["call"] != "finish"],
}
"""What a tracker could fail to get."""


@pytest.mark.parametrize("fault", SPOILED)
def test_what_a_tracker_does_not_get_is_found(fault, notes, folder):
    sent("wandb", folder)
    assert faults(SPOILED[fault](notes.all()), "wandb") == [fault]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_sent_again_is_there_once(name, notes, folder):
    """As after it was resumed: it has the same id, and the tracker has each of its steps once."""
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]))
    sent(name, folder, "interrupted")
    before = [path.name for path in (folder / "trackers" / name).rglob("*") if path.is_file()]
    first = notes.all()
    assert [note["done"] for note in notes.of("finish")] == [name in ("tensorboard", "trackio")], "which have no word for it"
    notes.path.unlink()
    (folder / "metrics.jsonl").write_text(whole)
    assert sent(name, folder) is None
    again = notes.all()
    after = [path.name for path in (folder / "trackers" / name).rglob("*") if path.is_file()]
    assert len(after) == len(before) == 1, "made anew, or gone on with: never two of one run"
    if name == "mlflow":  # it would hold twice what it is sent twice
        assert notes.of("init") == []
        held = json.loads((folder / "trackers" / name / "mlflow.db").read_text())["runs"]
        (metrics,) = [run["metrics"] for run in held.values()]
        assert len({(key, step) for key, _, step in metrics}) == len(metrics)
        again = [
            *[note for note in first if note.get("values") != {"perf/memory_gb": 2.0} and note["call"] != "finish"],
            *again,
        ]
    assert faults(again, name) == []


def test_events_that_tensorboards_writer_loses_are_missed(notes, folder, monkeypatch):
    """Its thread meets a full disk silently."""
    monkeypatch.setenv("STAND_IN", "loses")
    assert "only 1 of 10 events were written. Is the disk full?" in sent("tensorboard", folder)


def test_what_wandb_holds_online_is_not_sent_again(notes, folder, monkeypatch):
    monkeypatch.setenv("STAND_IN_HOLDS", "4")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    sent("wandb", folder)
    assert [note["number"] for note in notes.of("log")] == [4, 5, 6]
    assert (notes.of("init")[0]["mode"], notes.of("init")[0]["resume"]) == ("online", "allow")


WRONG = {
    "raise": "ConnectionError: no route to host",
    "hang": "has not answered",
    "exit": "SystemExit",
    "die": "its process has ended",
}


@pytest.mark.parametrize(
    ("name", "how", "where"),
    [
        (name, how, where)
        for how in WRONG
        for name in (NAMES if how == "raise" else ["swanlab"])
        for where in ("init", "log", "finish")
    ],
)
def test_a_tracker_that_fails_is_named_once_with_what_to_do(name, how, where, notes, folder, monkeypatch):
    monkeypatch.setenv("STAND_IN", f"{how}:{where}")
    process = TrackerProcess(Tracker.pick(name), folder, 0.4)
    process.start()
    process.finish("done")
    said = process.wait(30)
    assert re.fullmatch(
        rf"track: {name}: .*{WRONG[how]}.*\. It is off now, and nothing is lost: once training has ended, `trimtab track \S+/first "
        rf"--to {name}` sends all of the run's metrics\.jsonl",
        said,
    )
    assert (process.failure(), process.wait(1)) == (None, None), "once"
    assert subprocess.run(["pgrep", "-g", str(process._process.pid)], check=False).returncode == 1, "nothing is left running"
    monkeypatch.delenv("STAND_IN")
    notes.path.unlink()
    assert sent(name, folder) is None
    if name != "mlflow" or where == "init":  # which has what it was sent before
        assert faults(notes.all(), name) == []


def test_a_slow_tracker_gets_what_it_can_and_is_ended(notes, folder, monkeypatch):
    monkeypatch.setenv("STAND_IN", "slow:log")
    process = TrackerProcess(Tracker.pick("wandb"), folder)
    process.start()
    started = time.monotonic()
    process.finish("done")
    assert "it has not finished within 1 s" in process.wait(1.0)
    assert time.monotonic() - started < 3
    assert len(notes.of("log")) < len(METRICS)
    monkeypatch.undo()


def test_trackers_that_hang_share_one_limit(notes, folder, monkeypatch):
    monkeypatch.setenv("STAND_IN", "hang:init")
    monkeypatch.setattr(tracking, "LIMIT", 1.0)
    processes, seen = [TrackerProcess(Tracker.pick(name), folder) for name in ("wandb", "swanlab", "trackio")], Seen()
    for process in processes:
        process.start()
    started = time.monotonic()
    tracking.Tracking(processes, seen).end("done")
    assert time.monotonic() - started < 2
    assert [notice.count("has not finished within 1 s") for notice in seen.notices] == [1, 1, 1]


class Ending:
    """A process that says its last word, and ends, in the moment that it is asked whether it has."""

    def __init__(self, channel, text):
        self.channel, self.text = channel, text

    def poll(self):
        os.write(self.channel, self.text)
        return 0


@pytest.mark.parametrize("noise", [b"", b"a start-up file prints\n42\n"])
def test_a_last_word_is_heard_whenever_the_process_ends(noise, folder):
    process, (out, channel) = TrackerProcess(Tracker.pick("wandb"), folder), os.pipe()
    os.set_blocking(out, False)
    process._process = Ending(channel, noise + b'{"lines": 6}\n')
    with open(out, "rb") as process._process.stdout:
        assert process.failure() is None
    assert process.lines == 6
    os.close(channel)


def test_a_long_run_is_sent_in_parts_that_are_answered_one_by_one(notes, folder):
    lines = [{"kind": "train", "step": n + 1, "loss": 1.0} for n in range(500)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sent("mlflow", folder) is None
    numbers = 3  # loss, and the counts of steps and tokens
    assert [note["size"] for note in notes.of("batch")] == [200 * numbers, 200 * numbers, 100 * numbers, 1]


def test_mlflow_gets_no_more_numbers_at_once_than_it_takes(notes, folder):
    sources = {f"s{n}": {"loss": 1.0, "low": 0.9, "high": 1.1} for n in range(150)}
    lines = [{"kind": "eval", "step": n, "loss": 1.0, "sources": sources} for n in range(5)]
    lines += [{"kind": "samples", "step": 5, **{f"m{n}": 1.0 for n in range(1100)}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sent("mlflow", folder) is None
    sizes = [note["size"] for note in notes.of("batch")]
    assert sum(sizes) == 5 * 451 + 1100 + 1
    assert max(sizes) <= 1000


@pytest.mark.parametrize("name", ["../../../../out", "a/b", "..", 'x:"<>|?*'])
def test_names_lead_no_files_elsewhere(name, notes, folder, tmp_path):
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert sent({"name": "tensorboard", "project": name, "run": name}, folder) is None
    after = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert {path.name for path in after - before} <= {"notes"}
    (path,) = (folder / "trackers" / "tensorboard").rglob("events.out.*")
    assert len(path.relative_to(folder / "trackers" / "tensorboard").parts) == 3
    assert not set(str(path.relative_to(folder))) & set(':"<>|?*')


def test_a_password_is_neither_in_a_recipe_nor_shown(folder, monkeypatch):
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        Tracker.member("mlflow").parse({"uri": "https://me:secret@host/path"})
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host:5432/runs")
    shown = Tracker.pick("mlflow").place(folder / "trackers" / "mlflow")
    assert "secret" not in shown
    assert "postgresql://me:…@host:5432/runs" in shown
    assert "secret" not in problem(OSError("cannot reach https://me:secret@host"))
    assert Tracker.pick({"name": "mlflow", "uri": "https://host:5000"}).uri == "https://host:5000"


def test_the_recipe_is_sent_without_the_path_of_the_users_home(notes, folder, tmp_path):
    home = tmp_path / "home"
    recipe = {
        "model": {"name": f"{home}/models/x"},
        "data": {"train": [f"{home}/a.jsonl", f"{home}er/b.jsonl"]},
        "output": str(home),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert sent("wandb", folder) is None
    config = notes.of("init")[0]["config"]
    assert config["model"] == {"name": "~/models/x"}
    assert config["data"] == {"train": ["~/a.jsonl", f"{home}er/b.jsonl"]}
    assert config["output"] == "~"


def test_a_process_that_cannot_be_started_is_a_tracker_that_fails(notes, folder, monkeypatch):
    monkeypatch.setattr(_process, "module_command", lambda _: ["/nowhere/python"])
    assert "could not be started" in sent("wandb", folder)


def test_the_folder_of_a_tracker_may_be_unwritable(notes, folder):
    (folder / "trackers").write_text("a file, where its folder would be")
    assert "track: wandb: FileExistsError" in sent("wandb", folder) or "NotADirectoryError" in sent("wandb", folder)


def test_a_tracker_finishes_what_is_there_if_training_is_killed(notes, folder, monkeypatch):
    monkeypatch.setenv("STAND_IN", "child:init")
    code = (
        "import os, signal, sys, time; from pathlib import Path; from trimtab.track import Tracker, TrackerProcess\n"
        f"process = TrackerProcess(Tracker.pick('wandb'), Path({str(folder)!r})); process.start()\n"
        "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    until = time.monotonic() + 20
    while not notes.of("teardown") and time.monotonic() < until:
        time.sleep(0.05)
    assert faults(notes.all(), "wandb") == []
    assert not notes.of("finish")[0]["done"]
    child = Path("/proc", Path(f"{notes.path}.child").read_text(), "stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until, "what the package has started has ended with it"


def test_parameters_of_mlflow_have_names_that_it_takes(notes, folder):
    (folder / "recipe.yaml").write_text("method: {ranks: {'(q|k)_proj$': 8, a/../b: 4}}\ntrain: {lr: 1e-3}\n")
    assert sent("mlflow", folder) is None
    names = {note["key"]: note["value"] for note in notes.of("param")}
    assert names["method.ranks._q_k__proj_"] == "8"
    assert names["train.lr"] == "0.001"
    assert all(re.fullmatch(r"[\w.: -]+", name) for name in names)


def test_lines_are_sent_while_training_goes_on(notes, folder):
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").unlink()
    process = TrackerProcess(Tracker.pick("wandb"), folder)
    process.start()
    for end in (50, 400, len(text)):  # the first and second within a line
        (folder / "metrics.jsonl").write_text(text[:end])
        until = time.monotonic() + 20
        while len(notes.of("log")) < text[:end].count("\n") and time.monotonic() < until:
            time.sleep(0.05)
        assert len(notes.of("log")) == text[:end].count("\n")
        assert process.failure() is None
    process.finish("done")
    assert process.wait(30) is None
    assert process.lines == len(METRICS)
    assert faults(notes.all(), "wandb") == []


class Seen(RunObserver):
    def __init__(self):
        self.notices, self.places = [], []

    def on_notice(self, message):
        self.notices.append(message)

    def on_tracker(self, name, place):
        self.places.append((name, place))


@pytest.mark.parametrize("misbehaviour", ["", "hang:init", "raise:log:3", "hooks"])
def test_a_run_is_the_same_whatever_its_trackers_do(misbehaviour, notes, here, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STAND_IN", misbehaviour)
    monkeypatch.setattr(tracking, "LIMIT", 1.5)
    hooks = sys.excepthook, sys.stdout, signal.getsignal(signal.SIGINT)
    seen = Seen()
    run("tracked", "track=[wandb]", watch=seen)
    first, other = result("whole"), result("tracked")
    assert first[:2] == other[:2]
    assert hooks == (sys.excepthook, sys.stdout, signal.getsignal(signal.SIGINT))
    assert [name for name, _ in seen.places] == ["wandb"]
    failures = [notice for notice in seen.notices if notice.startswith("track: wandb: ")]
    assert len(failures) == (misbehaviour not in ("", "hooks"))
    lines = Path("tracked/metrics.jsonl").read_text().splitlines()
    if misbehaviour == "":
        assert len(notes.of("log")) == len(lines) + 1
        assert notes.of("finish")[0]["done"]


def test_a_run_that_is_resumed_goes_on_under_its_id_and_may_change_its_trackers(notes, here):  # noqa: F811
    with pytest.raises(Killed):
        run("cut", "track=[wandb]", watch=Ends("stepped", 8))
    run("cut", "track=[{name: wandb, project: mine}, trackio]")
    assert result("cut")[:2] == result("whole")[:2]
    begun = notes.of("init")
    assert [(note["package"], note["project"]) for note in begun if note["package"] == "wandb"] == [
        ("wandb", "trimtab"),
        ("wandb", "mine"),
    ]
    assert {note["id"] for note in begun if "id" in note} == {json.loads(Path("cut/run.json").read_text())["id"]}
    assert re.fullmatch("[a-z0-9]{21}", begun[0]["id"])
    lines = [json.loads(line) for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["epoch"] for line in train][-1] == 2.0
    assert all(one["seconds"] < two["seconds"] and one["epoch"] < two["epoch"] for one, two in itertools.pairwise(train))
    assert (
        sum(line["took"] for line in train)
        < train[-1]["seconds"]
        < json.loads(Path("cut/run.json").read_text())["seconds"] + 0.001
    )
    assert {note["step"] for note in notes.of("log") if note["package"] == "trackio"} == set(range(14))


def test_several_processes_are_one_run_of_each_tracker(notes, here, tmp_path):  # noqa: F811
    """Which also goes on where it was interrupted, and gets the values of one process."""
    words = [f"track=[{', '.join(NAMES)}]", "eval.samples=2", "train.pack_tokens=96", "output=both"]
    path = os.pathsep.join([str(STAND_INS), os.environ["PYTHONPATH"], str(Path(__file__).parent)])
    said = run_together(here, [{"words": words, "interrupted_at": 2}, words], PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert [[job["status"] for job in of_rank] for of_rank in said] == [["interrupted", "done"]] * 2
    together = notes.all()
    notes.path.unlink()
    run("alone", *words[:-1])
    (begun, whole), (alone,) = [
        [note for note in some if note["call"] == "init" and note["package"] == "wandb"] for some in (together, notes.all())
    ]
    assert begun["id"] == whole["id"] == json.loads(Path("both/run.json").read_text())["id"] != alone["id"]
    for name in NAMES:
        ours, theirs = _shown(together, name), _shown(notes.all(), name)
        assert ours.keys() == theirs.keys()
        assert len(ours) > 10
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert len([path for path in Path("both/trackers", name).rglob("*") if path.is_file()]) == 1


def _shown(notes, name):
    """The values of a tracker by step and name, without those of time and memory."""
    found = {}
    for note in notes:
        if note["package"] == name and note["call"] == "log":
            for key, value in note.get("values", {}).items():
                if not key.startswith("perf/"):
                    found[note["step"], key] = value
    return found


INTERRUPTED = """
import os, signal, sys, threading, time
from trimtab import cli
from trimtab.run import tracking
whole = tracking.Tracking.logged
def logged(self, kind, step, values):
    whole(self, kind, step, values)
    if step == 2 and kind == "train":
        time.sleep(2.0)  # the tracker has begun, and installed what it installs
        os.kill(os.getpid(), signal.SIGINT)
tracking.Tracking.logged = logged
sys.exit(cli.main(["train", "r.yaml", "output=cut", "track=[wandb]"]))
"""


def test_an_interrupted_run_says_what_it_says_without_trackers(notes, here, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STAND_IN", "hooks")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored, by us and by what we start
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert re.search(
        r"trimtab: interrupted: the adapter after step 2 is in cut/checkpoints/step-000002; the same command resumes",
        done.stderr,
    )
    assert "a tracker" not in done.stdout + done.stderr
    assert re.search(r"track +wandb: offline, files in cut/trackers/wandb; after `wandb login`", done.stdout)
    assert [note["done"] for note in notes.of("finish")] == [False]


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_missing_is_refused_before_anything_is_loaded(name, here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    monkeypatch.setattr(script.Recipe, "absolute", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(RecipeError) as caught:
        run("new", f"track={name}")
    package = Tracker.member(name).package
    assert (
        str(caught.value)
        == f"track: {name} needs the package {package}, which is not installed: pip install 'trimtab[{name}]'."
    )
    assert not Path("new").exists()


def track_of(raw):
    return Recipe.parse({"data": {"train": "x"}, "track": raw})


def test_trackers_are_names_or_mappings_alone_or_in_a_list():
    assert Recipe.parse({"data": {"train": "x"}}).track == ()
    expected = track_of([{"name": "wandb"}])
    assert track_of("wandb") == track_of(["wandb"]) == track_of({"name": "wandb"}) == expected
    two = track_of(["swanlab", {"name": "mlflow", "uri": "http://x"}])
    assert [tracker.name for tracker in two.track] == ["swanlab", "mlflow"]
    assert Recipe.parse(yaml.safe_load(two.to_yaml())).track == two.track


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            ["wandb", {"name": "wandb", "project": "p"}],
            "track: wandb is there twice, and a tracker shows a run once. Leave one out.",
        ),
        ("wanbd", "track.name: no such choice: 'wanbd'. Did you mean 'wandb'?"),
        ([{"name": "wandb", "projekt": "p"}], "track.0.projekt: no such key. Did you mean 'project'?"),
        ([{"name": "wandb", "mode": "cloud"}], "track.0.mode: expected 'auto', 'online' or 'offline', got 'cloud'."),
        ([3], "track.0: expected one of mlflow, swanlab, tensorboard, trackio, wandb, or a mapping with a name, got 3."),
        ([{"name": "wandb", "project": ""}], "track.0.project: expected a text that is not empty, got ''."),
    ],
)
def test_what_is_no_tracker_is_refused(raw, said):
    with pytest.raises(RecipeError) as caught:
        track_of(raw)
    assert str(caught.value) == said


CHANGED = {
    "project": ("mine", lambda begun: begun["project"]),
    "run": ("second", lambda begun: begun["name"]),
    "entity": ("us", lambda begun: begun["entity"]),
    "workspace": ("us", lambda begun: begun["workspace"]),
    "mode": ("online", lambda begun: begun["mode"]),
    "uri": ("sqlite:///{}/other.db", lambda begun: begun["dir"]),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in Tracker.member(name).model_fields])
def test_every_key_of_a_tracker_changes_what_it_is_told(name, key, notes, folder, tmp_path):
    value, told = CHANGED[key]
    value = value.format(tmp_path)
    assert sent({"name": name, key: value}, folder) is None
    assert told(notes.of("init")[0]) == value


ONLINE = {
    "wandb": [{"WANDB_API_KEY": "x"}, {"WANDB_API_KEY": "x", "WANDB_BASE_URL": "https://ours"}],
    "swanlab": [{"SWANLAB_API_KEY": "x"}],
}
OFFLINE = {
    "wandb": [{}, {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, {"WANDB_MODE": "online"}],
    "swanlab": [{}, {"SWANLAB_API_KEY": "x", "SWANLAB_MODE": "offline"}, {"SWANLAB_MODE": "cloud"}],
}


@pytest.mark.parametrize("name", ONLINE)
def test_nothing_is_sent_without_a_login(name, notes, tmp_path, monkeypatch):
    tracker = Tracker.pick(name)
    for environment, expected in [*((one, True) for one in ONLINE[name]), *((one, False) for one in OFFLINE[name])]:
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            assert tracker.online() is expected
            assert tracker.place(Path("run/trackers/x")).startswith(
                "online, project trimtab on https://" if expected else "offline, files in"
            )
            assert not Tracker.pick({"name": name, "mode": "offline"}).online()
    home = tmp_path / "home"
    (home / ".swanlab").mkdir(parents=True)
    for file in (home / ".netrc", home / ".swanlab" / ".netrc"):
        file.write_text("machine elsewhere.example login user password x\n" if file.parent == home else "machine")
    assert not tracker.online(), "a login for something else, and a file that is none"
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (home / ".swanlab" / ".netrc").write_text("machine https://api.swanlab.cn login https://swanlab.cn password x\n")
    assert tracker.online()


def test_the_command_sends_a_run_to_a_tracker(notes, folder, capsys):
    assert cli.main(["track", str(folder), "--to", "wandb", "project=mine"]) == 0
    assert faults(notes.all(), "wandb", project="mine") == []
    assert re.match(
        rf"6 lines of {folder}/metrics.jsonl sent\nwandb: offline, files in {folder}/trackers/wandb; ", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--to", "wandbb"], 2, "no such choice: 'wandbb'. Did you mean 'wandb'?"),
        (["--to", "wandb", "projekt=x"], 2, "projekt: no such key. Did you mean 'project'?"),
        (["--to", "wandb", "=x"], 2, "'=x': expected key=value, for example project=mine."),
    ],
)
def test_the_command_refuses_what_is_no_tracker(words, code, said, notes, folder, capsys):
    assert cli.main(["track", str(folder), *words]) == code
    assert said in capsys.readouterr().err
    assert notes.all() == []


def test_the_command_says_what_fails(notes, folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["track", str(tmp_path), "--to", "wandb"]) == ArtifactError.exit_code
    assert "is not the folder of a run" in capsys.readouterr().err
    monkeypatch.setenv("STAND_IN", "raise:init")
    assert cli.main(["track", str(folder), "--to", "wandb"]) == StorageError.exit_code
    assert "track: wandb: ConnectionError: no route to host" in capsys.readouterr().err


def test_a_run_that_is_being_trained_is_not_sent_as_if_it_had_ended(notes, folder, capsys):
    with locks.file_lock(folder / "lock"):
        assert cli.main(["track", str(folder), "--to", "tensorboard"]) == StorageError.exit_code
    assert "is being trained" in capsys.readouterr().err
    assert notes.all() == []
    assert cli.main(["track", str(folder), "--to", "tensorboard"]) == 0


def test_lines_that_are_none_are_passed_over_and_do_not_count():
    namer = Namer()
    texts = [b"", b"{", b"[1]", b'{"kind": "train"}', json.dumps(METRICS[0]).encode(), json.dumps(METRICS[2]).encode()]
    assert [line and line.number for line in map(namer.line, texts)] == [None, None, None, None, 0, 1]


def test_observers_together_are_each_told_everything():
    """Whatever `RunObserver` gets, `Together` has to forward."""
    told = [name for name, value in vars(RunObserver).items() if callable(value) and not name.startswith("_")]
    assert len(told) > 5
    calls = []

    class Notes(RunObserver):
        def __getattribute__(self, name):
            return (lambda *given: calls.append((self, name, given))) if name in told else object.__getattribute__(self, name)

    first, second = Notes(), Notes()
    for name in told:
        given = tuple(range(len(inspect.signature(getattr(RunObserver, name)).parameters) - 1))
        getattr(Together(first, second), name)(*given)
        assert [(id(who), what, arguments) for who, what, arguments in calls] == [
            (id(one), name, given) for one in (first, second)
        ]
        calls.clear()
