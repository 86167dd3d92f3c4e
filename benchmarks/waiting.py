"""What it gains and costs that OpenMP's threads sleep instead of spinning while they wait for each other (core/process.py).

    chrt -r 1 python benchmarks/waiting.py alone
    python benchmarks/waiting.py "beside two busy loops"

Two threads train and decode SmolLM2 with each wait policy in turn, in new processes. On a shared machine, chrt gives these processes
priority. Beside busy loops of one's own, use `echo -20 > /proc/self/autogroup` in a new session (setsid) instead.
Results go to docs/measured/waiting.json, each with the load average at the time.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import trimtab
from trimtab.core.files import read_json, write_json
from trimtab.core.process import WAITING
from trimtab.engine import stream_tokens
from trimtab.train import Step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measured" / "waiting.json"
WAYS = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "asleep soon": WAITING, "asleep at once": {"OMP_WAIT_POLICY": "passive"}}
"""The first is what libgomp does where nothing is said."""
PLACES = {"alone": (0, 5), "beside two busy loops": (2, 3)}
"""How many loops there are, and how often each way is tried."""
TRAINS_S, DECODES_S = 4, 3


def one() -> None:
    """Train for some seconds, a first step besides, and decode for some; prints tokens a second of both as JSON."""
    base = trimtab.load("smollm2-135m-instruct")
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=8))
    rows = trimtab.rows(str(ROOT / "demo" / "train.jsonl"), base)
    steps: list[Step] = []
    for step in trimtab.fit(base, adapter, rows, rows_per_step=4):
        steps.append(step)
        if sum(one.seconds for one in steps[1:]) > TRAINS_S:
            break
    decoded, began = 0, time.perf_counter()
    for _ in stream_tokens(base.model, rows[0].ids, (), max_new_tokens=1000):
        decoded += 1
        if time.perf_counter() - began > DECODES_S:
            break
    decoding = decoded / (time.perf_counter() - began)
    training = sum(one.tokens for one in steps[1:]) / sum(one.seconds for one in steps[1:])
    print(json.dumps({"training": training, "decoding": decoding, "load": os.getloadavg()[0]}))


def apart(waits: dict[str, str]) -> dict[str, float]:
    plain = {name: value for name, value in os.environ.items() if name not in (*WAITING, "KMP_BLOCKTIME")}
    command = [sys.executable, __file__, "one"]
    done = subprocess.run(command, env=plain | {"OMP_NUM_THREADS": "2"} | waits, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    place, (loops, rounds) = sys.argv[1], PLACES[sys.argv[1]]
    ran: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        for _ in range(rounds):
            for way, waits in WAYS.items():
                ran[way].append(apart(waits))
                print(place, way, json.dumps(ran[way][-1]), flush=True)
    finally:
        for process in busy:
            process.kill()
    known = read_json(RESULTS) if RESULTS.exists() else {}
    medians = {way: {key: median(one[key] for one in found) for key in found[0]} for way, found in ran.items()}
    write_json(RESULTS, known | {place: {way: {**medians[way], "runs": found} for way, found in ran.items()}})


if __name__ == "__main__":
    one() if sys.argv[1:2] == ["one"] else main()
