"""What the stand-ins of trackers' packages share: they note every call in the file $STAND_IN_NOTES, and misbehave as $STAND_IN says.

`raise:log`, `hang:init`, `slow:log`, `raise:log:5` (at the fifth call); `child:init`
starts a process; `hooks` replaces all that a process has once.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_counts: dict[str, int] = {}


def note(package, call, **values):
    with open(os.environ["STAND_IN_NOTES"], "a") as file:
        file.write(json.dumps({"package": package, "call": call, **values}, default=str) + "\n")
    misbehave(call)


def misbehave(call):
    print(f"a tracker prints at {call}", flush=True)
    print(f"a tracker complains at {call}", file=sys.stderr, flush=True)
    how, _, rest = os.environ.get("STAND_IN", "").partition(":")
    where, _, count = rest.partition(":")
    if how == "hooks":
        sys.excepthook = lambda *_: os._exit(99)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, lambda *_: os._exit(98))
        atexit.register(time.sleep, 1000)
    if where != call:
        return
    _counts[call] = _counts.get(call, 0) + 1
    if count and _counts[call] < int(count):
        return
    if how == "raise":
        raise ConnectionError("no route\nto host")
    if how == "exit":
        sys.exit(3)
    if how == "child":
        with open(os.environ["STAND_IN_NOTES"] + ".child", "w") as file:
            file.write(str(subprocess.Popen(["sleep", "300"]).pid))
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how in ("hang", "slow"):
        time.sleep(1000 if how == "hang" else 0.2)


def keep(folder, name, text="kept"):
    """A file of the tracker's own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_text(text)
