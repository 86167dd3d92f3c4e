"""The list of runs: each once, whatever state it is in, and without a look into what a run holds."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from worlds import work_in_copy

from trimtab.artifacts.run_folder import read_record
from trimtab.core import files, locks
from trimtab.core.errors import RecipeError, StorageError
from trimtab.report import runs as listing
from trimtab.report.runs import list_runs


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A folder of runs, of which the first was made by the real command."""
    here = work_in_copy(world, tmp_path, monkeypatch)
    (here / "runs").mkdir()
    shutil.move(here / "run", here / "runs" / "first")
    return here


def copy(name, **facts):
    """A copy of the first run, with other facts in its record."""
    folder = Path("runs", name)
    shutil.copytree("runs/first", folder)
    files.write_json(folder / "run.json", {**read_record(folder), **facts})
    return folder


def listed(name, **settings):
    (found,) = [run for run in list_runs(Path("runs"), **settings) if run.run == f"runs/{name}"]
    return found


# States


def test_a_run_that_is_done_says_what_it_is_and_how_well_it_did(here):
    (run,) = list_runs(Path("runs"))
    record = read_record(Path("runs/first"))
    assert (run.run, run.state, run.words) == ("runs/first", "done", "done, without a certificate")
    assert (run.method, run.objective, run.train_examples, run.eval_examples) == ("lora", "sft", 26, 4)
    assert run.base == record["base"]["source"]
    assert run.best == record["best"]["eval_loss"] < run.before
    assert (run.seconds, run.started) == (record["seconds"], record["moment"])
    first = next(
        line for line in map(json.loads, Path("runs/first/metrics.jsonl").read_text().splitlines()) if line["kind"] == "eval"
    )
    assert (first["step"], first["loss"]) == (0, run.before)


@pytest.mark.parametrize(("facts", "state", "words"), [
    ({"status": "interrupted", "last": {"step": 7}}, "interrupted", "interrupted at step 7 of 26"),
    ({"status": "failed", "error": "r.yaml: no."}, "failed", "failed at step 26 of 26: r.yaml: no."),
    ({"status": "running", "last": {"step": 14}}, "unfinished", "unfinished: its process ended; saved at step 14 of 26"),
    ({"status": "running"}, "unfinished", "unfinished: its process ended; saved at step 26 of 26"),
])  # fmt: skip
def test_a_run_that_did_not_end_well_says_how_far_it_was(facts, state, words, here):
    copy("other", **facts)
    run = listed("other")
    assert (run.state, run.words) == (state, words)


def test_a_run_is_running_while_a_process_holds_its_lock(here):
    folder = copy("other", status="running", last={})
    log = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(
        "".join(line for line in log if json.loads(line)["step"] <= 9) + '{"kind": "train", "st'
    )
    with locks.file_lock(folder / "lock"):
        assert listed("other").words == "running: step 9 of 26"
    assert listed("other").state == "unfinished", "it ended"
    with locks.file_lock(Path("runs/first/lock")):
        assert listed("first").words == "training is done; being certified"


def test_the_last_step_is_found_before_long_answers(here):
    folder = copy("other", status="running", last={})
    with open(folder / "metrics.jsonl", "a") as log:
        for _ in range(2):
            log.write(json.dumps({"kind": "samples", "step": 26, "answers": [{"answer": "x" * 600_000}]}) + "\n")
    with locks.file_lock(folder / "lock"):
        assert listed("other").words == "running: step 26 of 26"


def test_a_certificate_decides_what_a_finished_run_is(here):
    folder = copy("other")
    certificate = {"passed": True, "tests": [{"name": "gain", "status": "passed", "words": ""}]}
    rest = {"canaries": [], "answers": [], "losses": {}, "files": {}, "base": {}, "data_digest": "", "versions": {}}
    files.write_manifest(folder / "certificate.json", 2, {**certificate, **rest})
    assert (listed("other").state, listed("other").words) == ("certified", "done, certified")
    files.write_manifest(folder / "certificate.json", 2, {**certificate, **rest, "passed": False})
    assert (listed("other").state, listed("other").words) == ("not certified", "done, NOT certified")
    (folder / "certificate.json").write_text((folder / "certificate.json").read_text().replace("false", "true"))
    assert listed("other").state == "damaged"
    assert "certificate.json: changed since it was saved" in listed("other").words


DAMAGED = ["", "[]", "{}", '{"status": "do', '{"status": "done", "steps": 3, "base": [], "method": {}, "objective": {}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_run_is_a_line_and_not_the_end_of_the_list(content, here, trimtab):
    folder = copy("other")
    (folder / "run.json").write_text(content)
    found = {run.run: run for run in list_runs(Path("runs"))}
    assert found["runs/other"].state == "damaged"
    assert "runs/other/run.json" in found["runs/other"].words
    assert found["runs/first"].state == "done"
    done = trimtab("runs")
    assert done.code == 0
    assert "runs/other/run.json" in done.out.replace("\n", "")


def test_files_that_are_missing_are_gaps(here):
    folder = copy("other")
    (folder / "metrics.jsonl").unlink()
    (folder / "data.json").write_text("{")
    run = listed("other")
    assert (run.state, run.before, run.train_examples) == ("done", None, None)
    assert run.best is not None


# Where they are


def test_newest_first_or_by_loss(here):
    best = {"step": 1, "folder": "checkpoints/step-000026"}
    copy("new", moment="2099-01-01T00:00:00+00:00", best={**best, "eval_loss": 3.0})
    copy("old", moment="2001-01-01T00:00:00+00:00", best={**best, "eval_loss": 0.01})
    copy("none", moment="2000-01-01T00:00:00+00:00", best=None)
    names = [run.run.removeprefix("runs/") for run in list_runs(Path("runs"))]
    assert names == ["new", "first", "old", "none"]
    assert [run.run.removeprefix("runs/") for run in list_runs(Path("runs"), "loss")] == ["old", "first", "new", "none"]


def test_runs_in_runs_are_not_looked_for(here, monkeypatch):
    shutil.copytree("runs/first", "runs/deeper/still/other")
    shutil.copytree("runs/deeper/still/other", "runs/first/checkpoints/inner")
    shutil.copytree("runs/first", "runs/.hidden/other")
    for n in range(3000):
        Path(f"runs/first/checkpoints/step-{n:06d}").mkdir(exist_ok=True)
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    assert sorted(run.run for run in list_runs(Path("runs"))) == ["runs/deeper/still/other", "runs/first"]
    assert sorted(scanned) == ["runs", "runs/deeper", "runs/deeper/still"]


def test_links_lead_to_runs_once_and_never_in_circles(here):
    Path("runs/circle").symlink_to(Path("runs").absolute())
    Path("runs/again").symlink_to(Path("runs/first").absolute())
    Path("runs/broken").symlink_to(Path("nowhere").absolute())
    shutil.copytree("runs/first", "elsewhere/other")
    Path("runs/other").symlink_to(Path("elsewhere/other").absolute())
    Path("runs/all").symlink_to(Path("elsewhere").absolute())
    assert sorted(run.run for run in list_runs(Path("runs"))) == ["runs/first", "runs/other"]


def test_a_folder_that_is_a_run_is_listed_alone(here):
    assert [run.run for run in list_runs(Path("runs/first"))] == ["runs/first"]


def test_a_folder_without_runs_says_so_and_one_that_is_not_there_is_refused(here, trimtab):
    Path("empty").mkdir()
    done = trimtab("runs", "empty")
    assert (done.code, done.err) == (0, "")
    assert "no runs below empty" in done.out
    assert json.loads(trimtab("runs", "empty", "--json").out) == {"runs": []}
    with pytest.raises(RecipeError, match="nowhere: no such folder"):
        list_runs(Path("nowhere"))
    with pytest.raises(RecipeError, match=r"r\.yaml: is no folder"):
        list_runs(Path("r.yaml"))


def test_the_command_lists_them(here, trimtab):
    copy("other", status="failed", error="something [red] with \x1b[31m codes")
    done = trimtab("runs")
    assert done.code == 0
    assert "runs/first" in done.out
    assert "26 + 4 validation examples" in " ".join(done.out.split())
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    found = json.loads(trimtab("runs", "runs", "--json", "--sort", "loss").out)["runs"]
    assert {run["run"] for run in found} == {"runs/first", "runs/other"}
    assert {"state", "words", "before", "best", "started"} <= found[0].keys()


# The lock


def test_asking_whether_a_run_is_running_does_not_stop_one_from_starting(here):
    asked = locks.fcntl.flock
    lock = Path("runs/lock")
    lock.write_text("")
    with open(lock, "rb") as file:
        asked(file, locks.fcntl.LOCK_SH)
        released = threading.Timer(0.02, lambda: asked(file, locks.fcntl.LOCK_UN))
        released.start()
        with locks.file_lock(lock) as held:
            assert held
        released.join()
        asked(file, locks.fcntl.LOCK_SH)
        start = time.monotonic()
        with pytest.raises(StorageError, match="another process"), locks.file_lock(lock):
            pass
        assert time.monotonic() - start < 1
    assert locks.is_locked(Path("runs/nothing")) is False
