"""What a terminal gets: in any encoding, whoever has left, and never a code from a text; and what becomes of Ctrl-C and its like."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import write_rows

from trimtab import api, cli
from trimtab.commands import _terminal
from trimtab.core import interrupts, streams
from trimtab.report import RunObserver
from trimtab.run import checkpoints
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

STEERING = "\x1b]0;pwned\x07\x1b[31m\x1b[2J\x9b5m\r\x08\x7f"
WRITTEN = "^[]0;pwned^G^[[31m^[[2J\\x9b5m^M^H^?"


def said_in(encoding, *words):
    """The command on a standard output of this encoding, strict as Python's is; its exit code, and what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = cli.main(list(words))
        out.flush()
        err.flush()
        return code, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)


# Encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "words",
    ["check odd.yaml", "check odd.yaml --json", "train odd.yaml output=new train.epochs=0.3", "show run", "show run --json",
     "eval run --base --show 2", "eval run --data odd.jsonl --show 2 --json", "chat run --prompt ünï…中", "methods tiny", "chat nöpe"],
)  # fmt: skip
def test_every_command_can_be_read_in_every_encoding(words, encoding, here):
    write_rows(here / "odd.jsonl", [{"prompt": f"Is {n} – ünï中 – a number…?", "completion": "yes — “ja”"} for n in range(30)])
    (here / "odd.yaml").write_text((here / "r.yaml").read_text().replace("rows.jsonl", "odd.jsonl"))
    code, out, err = said_in(encoding, *words.split(" "))
    assert code == (0 if "nöpe" not in words else 2), err
    assert "Traceback" not in err
    if words.endswith("--json"):
        assert json.loads(out)
    if words == "check odd.yaml":
        assert ("Is 0 - \\xfcn\\xef\\u4e2d - a number...?" if encoding == "ascii" else "a number") in out


def test_half_of_a_character_can_be_shown(here):
    """JSON may hold one, and a file's name bytes that are none."""
    for text in ("\ud800", os.fsdecode(b"caf\xe9")):
        code, _, err = said_in("utf-8", "show", text)
        assert code == 2
        assert re.fullmatch(r"trimtab: (caf)?\\ud[8c]\w\w: no such folder\.\n", err), err
    code, _, err = said_in("utf-8", "chat", "run", "--prompt", os.fsdecode(b"caf\xe9"), "--max-new-tokens", "2")
    assert code == 0, err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        _terminal.print_json({"a": "\ud800 \x9b é", "b": "\u2028"})
        said = sys.stdout.getvalue()
    assert "\\ud800 \\u009b é" in said
    assert json.loads(said) == {"a": "\ud800 \x9b é", "b": "\u2028"}


# Codes that a terminal would obey


@pytest.fixture
def steering(here, monkeypatch):
    """Rows, answers and names that would, and a terminal with colors."""
    write_rows(
        here / "evil.jsonl", [{"prompt": f"Is {n}{STEERING} a number?", "completion": f"yes{STEERING}"} for n in range(30)]
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("trimtab.evaluate.metrics.ScoredAnswer.answer", STEERING, raising=False)
    return here


@pytest.mark.parametrize(
    "words",
    [
        "check r.yaml data.train=evil.jsonl",
        "eval run --data evil.jsonl --show 3 --base",
        "train r.yaml data.train=evil.jsonl output=new train.epochs=0.3",
    ],
)
def test_no_text_of_a_row_steers_the_terminal(words, steering, trimtab):
    done = trimtab(*words.split(" "))
    assert done.code == 0, done.err
    assert "\x1b[" in done.out, "colors are the terminal's own"
    left = re.sub(r"\x1b\[(\?25[lh]|1A|2K|[0-9;]*m)|\r", "", done.out)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", left)
    assert "\x1b[31m\x1b[2J" not in done.out
    if not words.startswith("train"):
        assert WRITTEN[:8] in left


def test_the_negative_control(steering):
    """Rich alone lets them through."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(file=io.StringIO(), highlight=False, color_system=None)
    console.print(escape(STEERING))
    assert "\x1b]0;pwned" in console.file.getvalue()


def test_what_a_model_says_is_shown_as_it_comes_and_steers_nothing(here, trimtab, monkeypatch):
    def stream(*_, **__):
        yield from ("yes", STEERING, "\x1b", "[2J", "\n\tend")
        return "stopped"

    monkeypatch.setattr(api, "stream", stream)
    assert trimtab("chat", "run", "--prompt", "x").out == f"yes{WRITTEN}^[[2J\n\tend\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n/quit\n"))
    assert f"yes{WRITTEN}^[[2J\n\tend\n" in trimtab("chat", "run").out


def test_no_error_and_no_name_steers_the_terminal(here, trimtab):
    done = trimtab("chat", f"no{STEERING}")
    assert done.err.startswith(f"trimtab: model: no{WRITTEN}: no such file or folder")
    (here / f"run{STEERING[:5]}").symlink_to(here / "run")
    assert f"run{WRITTEN[:6]}" in trimtab("show", f"run{STEERING[:5]}").out
    write_rows(here / "bad.jsonl", [{"prompt": 3, f"\x1b[2J{STEERING}": 1}])
    done = trimtab("check", "r.yaml", "data.train=bad.jsonl")
    assert done.code == 3
    assert "\x1b" not in done.err + done.out


# Who has left


def test_a_stream_that_is_closed_is_nowhere_and_no_file_takes_its_place(tmp_path):
    script = (
        "import os\nfrom trimtab.core import streams\nstreams.configure()\nfile = open('file', 'w')\nprint('lost', flush=True)\n"
        "os.write(1, b'lost')\nos.write(2, b'lost')\nfile.write(repr((file.fileno(), input.__name__)))"
    )
    for closed in ("<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, (tmp_path / "file").read_text()) == (0, "(3, 'input')"), closed
        assert "Traceback" not in done.stderr


def test_training_goes_on_when_nobody_reads(here, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["train", "r.yaml", "output=new", "train.epochs=1"]) == 0
    assert json.loads(Path("new/run.json").read_text())["status"] == "done"
    assert capfd.readouterr().err == "trimtab: standard output is closed; the command continues.\n"


def test_what_is_only_looked_at_ends_when_nobody_reads(here, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert cli.main(["show", "run"]) == 0
    assert capfd.readouterr().err == ""


def test_a_disk_that_is_full_is_no_reader_that_has_left():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        streams.PipeTolerantStream(Full()).write("x")


# Ctrl-C and its like


@pytest.fixture
def clock(monkeypatch):
    """Signals as they are by default, and a clock that stands still until it is set."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in interrupts.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    yield now
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interrupts.SIGNALS, ids=lambda number: number.name)
def test_the_first_is_obeyed_and_those_at_once_after_it_change_nothing(number, clock):
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=False) as came:
        assert not came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert came()
        for other in (*interrupts.SIGNALS, number):
            signal.raise_signal(other)
        clock[0] += 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_one_that_is_ignored_stays_ignored(clock):
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=False):
        signal.raise_signal(signal.SIGHUP)
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=True):
        pass
    for number in interrupts.SIGNALS:
        signal.raise_signal(number)  # the process ends


def test_whatever_an_interruption_turns_into_is_an_interruption(here, trimtab, monkeypatch, clock):
    """In the middle of an import, say. Without one it is what it is."""

    def broken(*_):
        if came:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        raise ImportError("half a module")

    monkeypatch.setattr("trimtab.report.folders.folder_facts", broken)
    came = True
    done = trimtab("show", "run")
    assert (done.code, done.err) == (130, "trimtab: interrupted.\n")
    came = False
    clock[0] += 100
    with pytest.raises(ImportError):
        trimtab("show", "run")


def test_one_that_comes_while_a_state_is_written_comes_afterwards(here, monkeypatch, clock):
    write, calls = checkpoints.write_state, []

    def interrupted(states, state):
        calls.append(state.step)
        signal.raise_signal(signal.SIGHUP)
        clock[0] += 10
        signal.raise_signal(signal.SIGINT)
        return write(states, state)

    monkeypatch.setattr(checkpoints, "write_state", interrupted)
    recipe = Recipe.read(Path("r.yaml"), ["output=new", "train.evaluate_every=10"])
    with (
        interrupts.signals_as_keyboard_interrupt(ignored_afterwards=False),
        pytest.raises(KeyboardInterrupt, match="the adapter after step 10 is in"),
    ):
        run_recipe(recipe)
    assert calls == [10]
    assert json.loads(Path("new/run.json").read_text())["status"] == "interrupted"


def test_one_that_comes_while_an_interrupted_run_is_saved_changes_nothing(here, monkeypatch, clock):
    look, pressed = checkpoints.Checkpointer.save, []

    class Pressing(RunObserver):
        def logged(self, kind, step, values):
            if (kind, step) == ("train", 7):
                signal.raise_signal(signal.SIGINT)

    def save(self, step, *given):
        pressed.append(step)
        for _ in range(5):
            clock[0] += 10
            signal.raise_signal(signal.SIGINT)
        look(self, step, *given)

    monkeypatch.setattr(checkpoints.Checkpointer, "save", save)
    recipe = Recipe.read(Path("r.yaml"), ["output=new", "train.evaluate_every=10"])
    with (
        interrupts.signals_as_keyboard_interrupt(ignored_afterwards=False),
        pytest.raises(KeyboardInterrupt, match="the adapter after step 7 is in"),
    ):
        run_recipe(recipe, Pressing())
    assert pressed == [7]
    assert [json.loads(line)["step"] for line in Path("new/metrics.jsonl").read_text().splitlines()] == list(range(1, 8))
