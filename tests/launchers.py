"""Launchers of two processes on this machine, stand-ins for what they start, and when all of it has ended."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

STAND_IN = Path(__file__).parent / "stand_ins" / "together.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
DEEPSPEED = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()", "--num_gpus", "2", "--master_port"]
CODES = {"devices": None, "torchrun": 1, "accelerate": 1, "deepspeed": None}
"""The exit code of whatever has failed; None if it is the processes'."""


def launcher(name, port=29500):
    """The command that starts two processes of the program whose path follows."""
    return {
        "torchrun": [*TORCHRUN, "--standalone", "--nproc-per-node", "2"],
        "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)],
        "deepspeed": [*DEEPSPEED, str(port)],
    }[name]


def environment(name):
    """DeepSpeed is imported without a GPU and its compiler."""
    return os.environ | ({"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"} if name == "deepspeed" else {})


def is_there(name):
    """Whether a launcher is installed."""
    return name in ("devices", "torchrun") or find_spec(name) is not None


def start_stand_ins(folder, name, *words, port=29500):
    """Two stand-ins that are told what to do, by a launcher; returns its process."""
    command = [sys.executable, str(STAND_IN), "start"] if name == "devices" else [*launcher(name, port), str(STAND_IN)]
    return subprocess.Popen(
        [*command, *words],
        cwd=folder,
        env=environment(name),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def at_work(folder, started, count=2):
    """The processes' numbers, once all are at work."""
    marks = [folder / f"at-work-{rank}" for rank in range(count)]
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    return [int(mark.read_text()) for mark in marks]


def are_gone(pids, within):
    """Whether processes end within so many seconds."""
    until = time.monotonic() + within
    while any(_exists(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a zombie has ended
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not status.parent.parent.joinpath("self").exists()
