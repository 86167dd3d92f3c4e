"""Processes that train together: who starts them, who speaks, and that they end together. `make scale` has every launcher and case."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from launchers import are_gone, at_work, start_stand_ins
from worlds import command

from trimtab.core.errors import ProcessLost, RecipeError
from trimtab.core.processes import Processes
from trimtab.launch import start, watch, worker
from trimtab.launch.watch import End, First, Other


class Store(dict):
    """As torch's, for threads."""

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)


class Place:
    """Processes that are threads: what each says, and what it ends with."""

    def __init__(self, size):
        self.said, self.codes, self.interrupts = [], {}, []
        store, self.watches = Store(), []
        for rank in range(size):
            processes = Processes(rank, size, rank, size)
            processes.store = store
            kind = Other if rank else First
            self.watches.append(
                kind(
                    processes,
                    lambda text, rank=rank: self.said.append((rank, text)),
                    lambda code, rank=rank: self._leave(rank, code),
                )
            )

    def start(self):
        threads = [threading.Thread(target=one.start) for one in self.watches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)

    def _leave(self, rank, code):
        self.codes.setdefault(rank, code)
        self.watches[rank]._over.set()  # its thread closes its connections, as the system does for a process that ends
        raise SystemExit

    def ends(self, rank, end, *, doubtful=False):
        """What the main thread of a process does when it fails."""
        with pytest.raises(SystemExit):
            self.watches[rank].leave_with(end, doubtful)

    def wait(self, ranks):
        until = time.monotonic() + 5
        while not set(ranks) <= self.codes.keys():
            assert time.monotonic() < until, self.codes
            time.sleep(0.01)


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watch, "TICK", 0.05)
    monkeypatch.setattr(watch, "SAME", 0.2)
    monkeypatch.setattr(watch, "GRACE", 0.3)
    monkeypatch.setattr(watch, "NEWS", 0.3)
    monkeypatch.setattr(os, "kill", lambda pid, number: made[-1].interrupts.append((pid, number)))
    made, faults = [], []
    monkeypatch.setattr(threading, "excepthook", lambda fault: fault.exc_type is SystemExit or faults.append(fault))

    def make(size):
        made.append(Place(size))
        return made[-1]

    yield make
    for one in made:
        for each in one.watches:
            each._over.set()
            if hasattr(each, "thread"):
                each.thread.join(5)
            elif isinstance(each, First):
                each.listener.close()
    assert faults == []


def test_an_error_of_one_ends_all_with_its_code_and_process_0_says_it(place):
    three = place(3)
    three.start()
    three.ends(2, End(3, "row 17 has no answer."))
    three.wait([0, 1, 2])
    assert three.codes == {0: 3, 1: 3, 2: 3}
    assert three.said == [(0, f"process 2 of 3 ({socket.gethostname()}): row 17 has no answer.")]


def test_an_error_that_all_have_is_said_once_by_process_0_as_its_own(place):
    three = place(3)
    three.start()
    ends = [threading.Thread(target=three.ends, args=(rank, End(3, "row 17 has no answer."))) for rank in (2, 1)]
    for end in ends:
        end.start()
    time.sleep(0.1)
    three.ends(0, End(3, "row 17 has no answer."))
    three.wait([0, 1, 2])
    assert three.codes == {0: 3, 1: 3, 2: 3}
    assert three.said == [(0, "row 17 has no answer.")]


def test_what_follows_from_another_end_is_not_said(place):
    """An exchange that fails, or a launcher's SIGTERM, because another process has ended."""
    two = place(2)
    two.start()
    threading.Timer(0.1, lambda: two.ends(1, End(3, "row 17 has no answer."))).start()
    two.ends(0, End(6, "Connection closed by peer"), doubtful=True)
    assert two.codes[0] == 3
    assert [text.partition(": ")[2] for _, text in two.said] == ["row 17 has no answer."]


def test_without_news_a_doubtful_end_is_its_own(place):
    two = place(2)
    two.start()
    two.ends(0, End(6, "Timed out"), doubtful=True)
    two.wait([0, 1])
    assert (two.codes, two.said) == ({0: 6, 1: 6}, [(0, "Timed out")])


def test_a_process_that_is_killed_ends_all(place):
    three = place(3)
    three.start()
    three.watches[1].first.connection.shutdown(socket.SHUT_RDWR)
    three.wait([0, 2])
    assert (three.codes[0], three.codes[2]) == (6, 6)
    [text] = [text for rank, text in three.said if rank == 0]
    assert text.startswith("process 1 of 3 (")
    assert "was killed" in text


def test_process_0_is_interrupted_and_then_ended_whatever_it_is_busy_with(place):
    two = place(2)
    two.start()
    two.ends(1, End(3, "row 17 has no answer."))
    assert two.interrupts == []  # it may have the same error
    two.wait([0])
    assert two.interrupts == [(os.getpid(), signal.SIGTERM)]
    assert (two.codes[0], len(two.said)) == (3, 1)


def test_if_process_0_is_killed_one_of_each_machine_says_it(place):
    four = place(4)
    for rank in (2, 3):  # another machine
        four.watches[rank].processes.local_rank = rank - 2
    four.start()
    four.watches[0]._over.set()  # its thread closes all connections, as the system does
    four.wait([1, 2, 3])
    assert {four.codes[rank] for rank in (1, 2, 3)} == {6}
    said = [rank for rank, text in four.said if text.startswith("process 0 of 4")]
    assert sorted(said) == [1, 2]


def test_after_the_work_a_process_that_leaves_ends_nothing(place):
    two = place(2)
    two.start()
    done = threading.Thread(target=two.watches[1].over)
    done.start()
    two.watches[0].over()
    done.join(5)
    two.watches[1].thread.join(5)  # which has closed its connection
    time.sleep(0.2)
    assert (two.codes, two.said) == ({}, [])


def test_others_who_were_interrupted_wait_for_process_0_which_saves(place):
    two = place(2)
    two.start()
    two.watches[1].processes.told_to_stop = True
    threading.Thread(target=two.ends, args=(1, End(130, "interrupted."))).start()
    time.sleep(1)  # longer than GRACE
    assert two.codes == {}
    two.ends(0, End(130, "interrupted: saved."))
    two.wait([0, 1])
    assert (two.codes, two.said) == ({0: 130, 1: 130}, [(0, "interrupted: saved.")])


def test_a_parent_that_dies_interrupts_and_then_ends(place, monkeypatch):
    monkeypatch.setattr(watch, "ORPHAN", 0.3)
    two = place(2)
    two.start()
    time.sleep(0.2)
    assert (two.interrupts, two.codes) == ([], {})
    monkeypatch.setattr(os, "getppid", lambda: 1)
    two.wait([0, 1])
    assert two.interrupts == 2 * [(os.getpid(), signal.SIGTERM)]
    assert 130 in two.codes.values()  # of the first to leave; nobody is there to hear


def test_a_stranger_is_not_heard(place):
    two = place(2)
    two.start()
    port = two.watches[0].listener.getsockname()[1]
    for said in (
        b'{"code": 3, "text": "stop"}\n',
        b'{"rank": 1, "host": "x", "word": "guessed"}\n{"code": 3}\n',
        b"GET /\n",
        b"[]\n",
        b"\xff" * 99,
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(said)
    time.sleep(0.3)
    assert (two.codes, two.said) == ({}, [])


def test_a_process_that_never_comes_is_named(place, monkeypatch):
    monkeypatch.setattr(watch, "START", watch.START / 6000)
    three = place(3)
    threading.Thread(target=three.watches[2].start).start()
    with pytest.raises(ProcessLost, match="Process 1 of 3 has not come within"):
        three.watches[0].start()


def test_what_ends_a_run_is_said_while_a_library_is_silenced(capfd):
    say, stderr, nowhere = worker._voice(), os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    say("process 1 of 2: no answer.")
    os.write(2, b"what else is said")
    os.dup2(stderr, 2)
    for opened in (stderr, nowhere):
        os.close(opened)
    assert capfd.readouterr().err == "trimtab: process 1 of 2: no answer.\n"


# Launchers


@pytest.fixture
def launched(monkeypatch):
    """Says by which launcher this process has been started, as one of how many."""
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "ACCELERATE", "CROSS_RANK")):
            monkeypatch.delenv(name)

    def launched(variables, size):
        for name in variables:
            monkeypatch.setenv(name, "x")
        monkeypatch.setattr(start.processes, "started", size)

    return launched


@pytest.mark.parametrize(
    ("variables", "size", "name", "option"),
    [
        (["TORCHELASTIC_RUN_ID"], 2, "torchrun", "--nproc-per-node 3"),
        (["TORCHELASTIC_RUN_ID"], 1, "torchrun", "--nproc-per-node 3"),
        (["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"], 2, "accelerate launch", "--multi_gpu --num_processes 3"),
        (["ACCELERATE_MIXED_PRECISION"], 1, "accelerate launch", "--multi_gpu --num_processes 3"),
        (["CROSS_RANK"], 2, "deepspeed", "--num_gpus 3"),
        ([], 2, "the launcher", "its number of processes 3"),
        ([], 1, "this is one process", "torchrun"),
    ],
)
def test_devices_that_a_launcher_has_not_started_are_refused(launched, variables, size, name, option):
    launched(variables, size)
    with pytest.raises(RecipeError) as error:
        start.refuse_other_devices(3, "cpu")
    assert name in str(error.value)
    assert option in str(error.value)
    start.refuse_other_devices(size, "cpu")
    start.refuse_other_devices(1, "cpu")  # which is the default
    assert not start.starts_processes(1)
    assert start.starts_processes(3) == (variables == [] and size == 1)
    said = start.one_process_notice()
    assert (said is not None) == (size == 1 and variables != [])
    assert said is None or said.startswith(f"{name} has started one process")


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [("cpu", ("cuda", 1), True), ("auto", None, True), ("auto", ("cuda", 2), False), ("cuda", ("cuda", 2), False)],
)
def test_processes_share_the_processor_or_have_a_device_each(monkeypatch, device, there, expected):
    _accelerators(monkeypatch, there)
    assert start.share_processor(2, device) is expected


@pytest.mark.parametrize(
    ("device", "there", "problem"),
    [
        ("auto", ("cuda", 1), "this machine, which has 1 of cuda: start at most 1"),
        ("cuda", None, "this machine, which has 0 of cuda"),
        ("cuda:1", ("cuda", 4), "model.device: cuda:1 is one device, for 2"),
    ],
)
def test_more_devices_than_there_are_are_refused(monkeypatch, device, there, problem):
    _accelerators(monkeypatch, there)
    with pytest.raises(RecipeError, match=problem):
        start.share_processor(2, device)


def _accelerators(monkeypatch, there):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there is not None)
    if there is not None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(there[0]))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: there[1])


# Real processes


def test_a_killed_process_ends_the_other_with_one_message(tmp_path):
    started = start_stand_ins(tmp_path, "devices", "run", "0")
    pids = at_work(tmp_path, started)
    os.kill(pids[1], signal.SIGKILL)
    out, err = started.communicate(timeout=30)
    assert (started.returncode, out) == (6, "")
    assert err.startswith("trimtab: process 1 of 2 (")
    assert err.count("\n") == 1
    assert are_gone(pids, within=5)


def test_a_killed_parent_takes_its_processes_along(tmp_path):
    started = start_stand_ins(tmp_path, "devices", "run", "0")
    pids = at_work(tmp_path, started)
    started.kill()
    _, err = started.communicate(timeout=30)
    assert are_gone(pids, within=10)
    assert err == "trimtab: interrupted: saved.\n"


def test_devices_train_together_and_a_run_that_is_interrupted_resumes_with_another_number(here):
    """The same losses as of one process; every launcher's processes are asked to stop in this way."""
    (here / "r.yaml").write_text((here / "r.yaml").read_text().replace("output: run", "output: two"))
    words = ["-m", "trimtab", "train", "r.yaml", "devices=2"]
    started = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = here / "two" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 1:
        assert started.poll() is None, started.communicate()
        time.sleep(0.01)
    started.terminate()
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert err.startswith("trimtab: interrupted: the adapter after step ")
    assert err.count("\n") == 1
    done = command("train", "r.yaml", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "processes: 2 in the run, 1 now" in done.stdout
    one, two = (_losses(here / name) for name in ("run", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    assert _losses(here / "two") != _losses(here / "run")  # part of it was added up in another order


def _losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]
