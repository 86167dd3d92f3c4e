"""A stand-in for a command of several processes: a loop of exchanges, in which one of them does what MODE says.

python together.py MODE RANK        one of the processes
python together.py start MODE RANK  starts two
"""

import os
import signal
import sys
import time
from pathlib import Path

from trimtab.cli import _end
from trimtab.core import interrupts
from trimtab.core.errors import DataError
from trimtab.core.processes import processes
from trimtab.launch import one_process_notice, run_together
from trimtab.launch.start import start

STEPS = 400


def loop(mode: str, rank: int) -> int:
    import torch

    mine = processes.rank == rank
    if mode == "early" and mine:
        raise DataError("row 17 has no answer.")
    with processes.interrupted_together():
        for step in range(1, STEPS):
            time.sleep(0.02)
            if step == 10:
                Path(f"at-work-{processes.rank}").write_text(str(os.getpid()))
            if step == 20:
                if mode == "same" or (mode == "error" and mine):
                    raise DataError("row 17 has no answer.")
                if mode == "bug" and mine:
                    raise ValueError("a fault of ours")
                if mode == "kill" and mine:
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "done":
                    break
                if mode == "busy":  # nothing is exchanged any more
                    if mine:
                        raise DataError("row 17 has no answer.")
                    time.sleep(600)
                if mode == "busy-kill":
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(600)
            processes.sum_(torch.ones(1000))
            processes.wait()
            if processes.told_to_stop:
                print(f"process {processes.rank} stopped after step {step}", flush=True)
                raise KeyboardInterrupt("saved")
    print(f"process {processes.rank} is done", flush=True)
    return 0


def main() -> int:
    if sys.argv[1] == "start":
        return start(2, [sys.executable, __file__, *sys.argv[2:]])
    if processes.size == 1:
        print(one_process_notice())
        return 0
    with interrupts.signals_as_keyboard_interrupt(ignored_afterwards=True):
        return run_together(lambda: loop(sys.argv[1], int(sys.argv[2])), _end)


if __name__ == "__main__":
    sys.exit(main())
