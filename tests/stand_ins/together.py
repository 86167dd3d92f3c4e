"""A stand-in for a command of several processes: a loop of exchanges, in which one of them does what MODE says.

python together.py MODE RANK        one of the processes
python together.py start MODE RANK  starts two
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from trimtab.cli import _end
from trimtab.core import interrupts
from trimtab.core import process_group as module
from trimtab.core.errors import DataError
from trimtab.core.processes import processes
from trimtab.launch import one_process_notice, run_together
from trimtab.launch.start import start

STEPS, SLOW = 400, 8
if "STEP_SECONDS" in os.environ:  # in place of 30 minutes
    module.STEP = timedelta(seconds=float(os.environ["STEP_SECONDS"]))
if "WAIT_SECONDS" in os.environ:  # in place of 24 hours
    module.WAIT = timedelta(seconds=float(os.environ["WAIT_SECONDS"]))


def loop(mode: str, rank: int) -> int:
    import torch

    mine = processes.rank == rank
    if mode == "slow":  # as a large corpus is tokenized
        with processes.first_here_first():
            time.sleep(SLOW if processes.first_here else 0)
        mode = "done"
    with processes.interrupted_together():
        for step in range(1, STEPS):
            time.sleep(0.02)
            if step == 10:
                write(f"at-work-{processes.rank}", os.getpid())
            if step == 20:
                if mode == "done":
                    break
                if mine or mode == "same":
                    fail(mode)
                if mode.startswith("busy"):  # exchanges nothing any more
                    time.sleep(600)
            processes.sum_(torch.ones(1000))
            processes.wait()
            if processes.told_to_stop:
                write(f"stopped-{processes.rank}", step)
                processes.wait()  # as while it is saved
                raise KeyboardInterrupt("saved")
    return 0


def fail(mode: str) -> None:
    write("failed-at", time.time())
    if mode in ("error", "same", "busy-error"):
        raise DataError("row 17 has no answer.")
    if mode == "fault":
        raise ValueError("a fault of ours")
    if mode in ("kill", "busy-kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "behind":
        time.sleep(SLOW)


def write(name: str, value: object) -> None:
    part = Path(f"{name}.{processes.rank}")
    part.write_text(str(value))
    part.replace(name)


def main() -> int:
    if sys.argv[1] == "start":
        return start(2, [sys.executable, __file__, *sys.argv[2:]])
    if processes.started == 1:
        print(one_process_notice())
        return 0
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=True):
        mode, rank = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        return run_together(lambda: loop(mode, int(rank)), _end)


if __name__ == "__main__":
    sys.exit(main())
