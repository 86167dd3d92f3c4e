"""Every launcher, and every way to end: exit codes, what is said, and how soon all processes have ended. `make scale`; `-s` shows the table.

DeepSpeed's launcher is tested where DeepSpeed is installed.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from launchers import STAND_IN, TORCHRUN, are_gone, at_work, environment, is_there, launcher, start_stand_ins
from worlds import RECIPE, ROWS, command, make_model, write_rows

LAUNCHERS = ["devices", "torchrun", "accelerate", "deepspeed"]
LOST, ROW = " has ended without an error of its own", "row 17 has no answer."
FAILURES = {
    # mode and rank: Trimtab's exit code, and what is said
    "error 0": (3, ROW),
    "error 1": (3, f"process 1 of 2 ({socket.gethostname()}): {ROW}"),
    "same 0": (3, ROW),
    "fault 1": (1, "ValueError: a fault of ours"),
    "kill 0": (6, f"process 0 of 2{LOST}"),
    "kill 1": (6, f"process 1 of 2 ({socket.gethostname()}){LOST}"),
    "busy-error 0": (3, ROW),
    "busy-error 1": (3, f"process 1 of 2 ({socket.gethostname()}): {ROW}"),
    "busy-kill 0": (6, f"process 0 of 2{LOST}"),
    "busy-kill 1": (6, f"process 1 of 2 ({socket.gethostname()}){LOST}"),
}
SIGNALS = {
    # who gets it, and the exit code of each launcher
    "SIGTERM launcher": {"devices": 130, "torchrun": 1, "accelerate": 1, "deepspeed": -15},
    "SIGINT all": {"devices": 130, "torchrun": 1, "accelerate": 1, "deepspeed": None},  # Ctrl-C in a terminal
    "SIGTERM 1": {"devices": 130, "torchrun": 1, "accelerate": 1, "deepspeed": 130},
    "SIGKILL launcher": dict.fromkeys(LAUNCHERS, -9),
}
table = []


@pytest.fixture(scope="module", autouse=True)
def shown():
    yield
    for row in table:
        sys.stdout.write(" | ".join(map(str, row)) + "\n")


@pytest.fixture(params=LAUNCHERS)
def name(request):
    if not is_there(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def messages(err):
    """What Trimtab has said, among what launchers and torch print: its first lines."""
    return [line for line in err.splitlines() if line.startswith("trimtab: ")]


def ended(started, pids, since):
    """What was said, and how many seconds after a moment all had ended."""
    out, err = started.communicate(timeout=90)
    assert are_gone(pids, within=60)
    return out, err, time.time() - since


def test_done(name, tmp_path):
    started = start_stand_ins(tmp_path, name, "done", "0", port=free_port())
    _, err = started.communicate(timeout=60)
    assert (started.returncode, messages(err)) == (0, [])
    if name == "devices":
        assert err == ""


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_ends_all_with_one_message(name, case, tmp_path):
    code, text = FAILURES[case]
    started = start_stand_ins(tmp_path, name, *case.split(), port=free_port())
    pids = at_work(tmp_path, started)
    while not (tmp_path / "failed-at").exists():
        time.sleep(0.02)
    _, err, _ = ended(started, pids, 0)
    seconds = time.time() - float((tmp_path / "failed-at").read_text())
    table.append((name, case, started.returncode, f"{seconds:.1f} s"))
    own = {"torchrun": {1}, "accelerate": {1}, "devices": {code}, "deepspeed": {code, 247}}  # 247: of the killed one, as it is
    assert started.returncode in own[name], err
    assert len(messages(err)) == 1
    assert text in err
    assert name != "devices" or err.count("\n") == (1 if code != 1 else len(err.splitlines()))
    assert "destroy_process_group" not in err
    assert seconds < 15


@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_stops_all_after_the_same_step(name, case, tmp_path):
    what, whom = case.split()
    started = start_stand_ins(tmp_path, name, "run", "0", port=free_port())
    pids = at_work(tmp_path, started)
    since, number = time.time(), getattr(signal, what)
    if whom == "all":
        os.killpg(started.pid, number)
        for pid in pids:  # torch's launcher has put them where a terminal does not reach them
            if os.getpgid(pid) != started.pid:
                assert name != "deepspeed"
    else:
        os.kill(started.pid if whom == "launcher" else pids[1], number)
    _, err, seconds = ended(started, pids, since)
    table.append((name, case, started.returncode, f"{seconds:.1f} s"))
    assert SIGNALS[case][name] in (started.returncode, None)
    assert messages(err) == ["trimtab: interrupted: saved."]
    steps = [int((tmp_path / f"stopped-{rank}").read_text()) for rank in (0, 1)]
    assert steps[0] == steps[1]
    assert name != "devices" or err.count("\n") == 1
    assert seconds < 15


def test_under_nohup_a_closed_terminal_is_not_heard(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        started = start_stand_ins(tmp_path, "devices", "run", "0")
    finally:
        signal.signal(signal.SIGHUP, before)
    pids = at_work(tmp_path, started)
    for pid in (started.pid, *pids):
        os.kill(pid, signal.SIGHUP)
    time.sleep(1)
    assert started.poll() is None
    started.terminate()
    _, err, _ = ended(started, pids, 0)
    assert (started.returncode, err) == (130, "trimtab: interrupted: saved.\n")


@pytest.mark.parametrize(
    ("mode", "limits", "code"),
    [
        ("slow", {"STEP_SECONDS": "5"}, 0),  # one tokenizes for 8 s
        ("slow", {"WAIT_SECONDS": "5"}, 6),
        ("behind", {"STEP_SECONDS": "5"}, 6),
        ("behind", {}, 130),
    ],
)
def test_each_timeout_is_of_what_it_is_for(mode, limits, code, tmp_path, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    started = start_stand_ins(tmp_path, "devices", mode, "1")
    with contextlib.suppress(AssertionError):
        at_work(tmp_path, started)
    if code == 130:  # it goes on
        while not (tmp_path / "failed-at").exists():
            time.sleep(0.1)
        time.sleep(12)
        started.terminate()
    _, err = started.communicate(timeout=60)
    assert started.returncode == code, err
    assert ("Timed out" in err) == (code == 6)


def test_a_second_interrupt_does_not_wait_for_what_is_saved(tmp_path):
    started = start_stand_ins(tmp_path, "devices", "busy-never", "1")
    pids = at_work(tmp_path, started)
    while not (tmp_path / "failed-at").exists():
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    time.sleep(4)
    assert started.poll() is None  # it waits for them
    since = time.time()
    started.send_signal(signal.SIGINT)
    _, err, seconds = ended(started, pids, since)
    assert started.returncode == 130, err
    assert seconds < 20


# The real command


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    make(tmp_path)
    return tmp_path


def make(folder):
    make_model(folder / "tiny", 0)
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "r.yaml").write_text(RECIPE)


def metrics(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_by(name, folder, *words, limit=120):
    """The real command, started by a launcher."""
    words = [*words[:2], *words[2:]]
    program = {
        "devices": [sys.executable, "-m", "trimtab", *words, *(["devices=2"] if words[0] == "train" else [])],
        "torchrun": [*launcher("torchrun"), "-m", "trimtab", *words],
        "accelerate": [*launcher("accelerate", free_port()), "--module", "trimtab", *words],
        "deepspeed": [*launcher("deepspeed", free_port()), "--module", "trimtab", *words],
    }[name]
    return subprocess.run(program, cwd=folder, env=environment(name), capture_output=True, text=True, timeout=limit)


def test_the_real_command_trains_checks_and_evaluates(name, work):
    train = run_by(name, work, "train", "r.yaml")
    assert train.returncode == 0, train.stderr
    assert train.stdout.count("done  ") == 1
    assert messages(train.stderr) == []
    alone = command("train", "r.yaml", "output=alone", cwd=work)
    assert alone.returncode == 0
    assert [line.get("loss") for line in metrics(work / "run")] == pytest.approx(
        [line.get("loss") for line in metrics(work / "alone")], rel=1e-4
    )
    assert json.loads((work / "run" / "run.json").read_text())["processes"] == 2
    for words in (["check", "r.yaml", "--json"], ["eval", "run", "--data", "rows.jsonl", "--json"]):
        several, one = run_by(name, work, *words), command(*words, cwd=work)
        assert several.returncode == one.returncode == 0, several.stderr
        found = [line for line in several.stdout.splitlines() if not line.startswith("[20")]  # DeepSpeed's own
        assert json.loads("\n".join(found)).keys() == json.loads(one.stdout).keys()


def test_a_command_of_one_process_is_refused(name, work):
    if name == "devices":
        return
    done = run_by(name, work, "show", "run")
    [said] = messages(done.stderr)
    assert "this command is the work of one" in said


def test_other_devices_than_were_started_are_refused(name, work):
    if name == "devices":
        return
    done = run_by(name, work, "train", "r.yaml", "devices=3")
    [said] = messages(done.stderr)
    assert "devices: 3, and " in said
    assert "has started 2" in said


def test_one_process_by_accelerate_is_said(work):
    """Without --multi_gpu, it starts one on a CPU, whatever --num_processes says."""
    program = [*launcher("accelerate"), "--module", "trimtab", "check", "r.yaml"]
    program.remove("--multi_gpu")
    done = subprocess.run(program, cwd=work, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "trimtab: accelerate launch has started one process." in done.stderr


# Several machines


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Two folders, which know nothing of each other, and a function that starts the real command in both."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folders = [tmp_path / name for name in ("first", "second")]
    make(folders[0])
    shutil.copytree(folders[0], folders[1])
    port, running = free_port(), []

    def start(program, *words):
        for rank, folder in enumerate(folders):
            flags = [
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(rank),
                "--rdzv-backend",
                "c10d",
                "--rdzv-id",
                "one",
            ]
            flags += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
            running.append(
                subprocess.Popen(
                    [*TORCHRUN, *flags, *program, *words],
                    cwd=folder,
                    env=os.environ | {"TRIMTAB_CACHE": str(folder / "cache")},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running

    yield folders, start
    for one in running:
        one.kill()


def test_two_machines_train_one_run_which_is_where_process_0_is(machines):
    (first, second), start = machines
    both = start(["-m", "trimtab"], "train", "r.yaml")
    said = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert "done  " in said[0][0]
    assert said[1][0] == ""
    assert (first / "run" / "adapter").exists()
    assert sorted(path.name for path in second.iterdir()) == ["cache", "r.yaml", "rows.jsonl", "tiny"]
    assert command("train", "r.yaml", "output=alone", cwd=first).returncode == 0
    assert [line.get("loss") for line in metrics(first / "run")] == pytest.approx(
        [line.get("loss") for line in metrics(first / "alone")], rel=1e-4
    )


@pytest.mark.parametrize("what", ["data", "model", "recipe", "no data", "no recipe", "nothing"])
def test_a_machine_with_other_files_is_refused_by_name(machines, what):
    (first, second), start = machines
    if what == "data":
        write_rows(second / "rows.jsonl", [*ROWS[:-1], {"prompt": "Is 29 a number?", "completion": "no"}])
    elif what == "model":
        shutil.rmtree(second / "tiny")
        make_model(second / "tiny", 1)
    elif what == "recipe":
        (second / "r.yaml").write_text(RECIPE.replace("lr: 2e-2", "lr: 1e-2"))
    elif what == "no data":
        (second / "rows.jsonl").unlink()
    elif what == "no recipe":
        (second / "r.yaml").unlink()
    both = start(["-m", "trimtab"], "train", "r.yaml")
    since = time.time()
    said = [one.communicate(timeout=60)[1] for one in both]
    if what == "nothing":  # the negative control
        assert [one.returncode for one in both] == [0, 0]
        return
    [message], other = messages(said[0]), messages(said[1])
    table.append(("two machines", what, message, f"{time.time() - since:.1f} s from the start"))
    assert [one.returncode for one in both] == [1, 1]  # torchrun's
    assert other == []
    word = {"data": "rows.jsonl", "model": "tiny", "recipe": "train", "no data": "rows.jsonl", "no recipe": "r.yaml"}[what]
    assert word in message
    assert not (first / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", ["kill", "error", "busy-kill"])
def test_what_ends_on_one_machine_ends_on_the_other(machines, rank, mode):
    folders, start = machines
    both = start([str(STAND_IN)], mode, str(rank))
    pids = [int(wait_for(folder / f"at-work-{n}")) for n, folder in enumerate(folders)]
    failed = float(wait_for(folders[rank] / "failed-at"))
    said = [one.communicate(timeout=60)[1] for one in both]
    assert are_gone(pids, within=10)
    seconds = time.time() - failed
    table.append(("two machines", f"{mode} {rank}", "", f"{seconds:.1f} s"))
    speaker = 1 if (mode, rank) in (("kill", 0), ("busy-kill", 0)) else 0
    assert [len(messages(err)) for err in said] == [int(n == speaker) for n in (0, 1)]
    assert seconds < 15


def test_an_interrupt_of_one_machine_saves_and_stops_both(machines):
    folders, start = machines
    both = start([str(STAND_IN)], "run", "0")
    for n, folder in enumerate(folders):
        wait_for(folder / f"at-work-{n}")
    both[1].terminate()
    said = [one.communicate(timeout=60)[1] for one in both]
    assert [messages(err) for err in said] == [["trimtab: interrupted: saved."], []]
    steps = [(folder / f"stopped-{n}").read_text() for n, folder in enumerate(folders)]
    assert steps[0] == steps[1]


def wait_for(path):
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, path
        time.sleep(0.02)
    return path.read_text()
