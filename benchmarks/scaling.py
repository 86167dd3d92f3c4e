"""Speed and memory by length of the examples, by rank, and by number of examples. Each point is measured in a new process.

python benchmarks/scaling.py lengths [1024 2048 4096 8192 16384]   # one example of random tokens a step
python benchmarks/scaling.py packs   [256 512 768 1024 1536 2048]  # tokens per micro-batch, in examples of 170
python benchmarks/scaling.py ranks   [4 16 64 256]                 # 1,024 tokens per micro-batch
python benchmarks/scaling.py rows    [10 1000 100000]              # data only: read, tokenize, mask, shuffle; memory and time
python benchmarks/scaling.py bookkeeping [1000 10000 100000]       # examples of 87 tokens: packing, evaluation, reference, without the model

Results are added to docs/measured/scaling.json.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "measured" / "scaling.json"
DEFAULTS = {
    "lengths": [1024, 2048, 4096, 8192, 16384],
    "packs": [256, 512, 768, 1024, 1536, 2048],
    "ranks": [4, 16, 64, 256],
    "rows": [10, 1000, 100_000],
    "bookkeeping": [1000, 10_000, 100_000],
}


def trained(length: int, rank: int, steps: int, at_once: int = 1) -> dict[str, Any]:
    """Steps of made-up rows, `at_once` in a pack, all of them learned but the first quarter; the first step warms up."""
    from peers.run_peer import peak_gb

    import trimtab
    from trimtab.data import pack_flat
    from trimtab.data.example import TokenRow
    from trimtab.train import TrainConfig, plan_training_memory, train

    base = trimtab.load("smollm2-135m-instruct")
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=rank, alpha=2.0 * rank))
    draw = random.Random(0)
    rows = [TokenRow([draw.randrange(49152) for _ in range(length)], list(range(length // 4, length)), "made up", length)]
    config = TrainConfig()
    memory = plan_training_memory(base, config, rows)
    done = list(train(base, adapter, trimtab.SFT(), [[pack_flat(rows * at_once)]] * steps, config, 1e-4, memory))
    seconds = sorted(step.seconds for step in done[1:])[0]
    return {"tokens_per_s": length * at_once / seconds, "peak_gb": peak_gb(), "memory": memory.summary}


def loaded(count: int) -> dict[str, Any]:
    """Rows made, read, tokenized, labelled and put in order: what training waits for before its first step."""
    from peers.run_peer import peak_gb

    import trimtab
    from trimtab.data import plan_steps

    base = trimtab.load("smollm2-135m-instruct")
    before = peak_gb()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        draw = random.Random(0)
        words = [
            "order",
            "three",
            "boxes",
            "of",
            "green",
            "tea",
            "for",
            "Anna",
            "by",
            "Friday",
            "please",
            "and",
            "send",
            "it",
            "to",
            "Bergen",
        ]
        with path.open("w") as file:
            for number in range(count):
                texts = [" ".join(draw.choices(words, k=draw.randrange(8, 40))) for _ in range(2)]
                file.write(json.dumps({"prompt": f"{number}: {texts[0]}", "completion": texts[1]}) + "\n")
        os.environ["TRIMTAB_CACHE"] = folder
        seconds, grew = [], 0.0
        for _ in range(2):  # the second time, the tokens are kept from the first
            started = time.perf_counter()
            rows = trimtab.rows(str(path), base)
            plan_steps(rows, epochs=2, seed=0, examples=16)
            seconds.append(time.perf_counter() - started)
            grew = grew or peak_gb() - before
            tokens = sum(len(row.ids) for row in rows)
            del rows
    return {"seconds": seconds[0], "tokens": tokens, "grew_gb": grew, "again_s": seconds[1]}


def bookkeeping(count: int) -> dict[str, Any]:
    """What rows cost beside the model, which says -1 to everything: their packs; the held-out loss with its interval and measures;
    and Σ log p in a reference, computed and kept, then read again."""
    import torch

    import trimtab
    from trimtab.data import pack_all
    from trimtab.data.example import TokenRow
    from trimtab.evaluate import reference, score_loss
    from trimtab.objectives import _kl_estimate
    from trimtab.testing import tiny_model

    _kl_estimate.pack_logprobs = reference.pack_logprobs = lambda model, pack, **_: -torch.ones(len(pack.rows))
    draw, tokens = random.Random(0), list(range(49152))
    rows = []
    for number in range(count):
        ids = [*tokens[:20], *draw.choices(tokens, k=min(600, round(draw.lognormvariate(4.0, 0.6))) + 4)]
        side = ("good", "bad")[number % 2]
        rows.append(TokenRow(ids, tokens[len(ids) // 2 : len(ids)], f"rows.jsonl:{number}", len(ids), side))
    base = trimtab.Base(tiny_model())
    adapter, seconds = trimtab.attach(base.model, trimtab.LoRA()), {}

    def timed(what: str, work: Any) -> None:
        started = time.process_time()  # which others' work lengthens least
        work()
        seconds[what] = time.process_time() - started

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIMTAB_CACHE"] = folder
        timed("packing_s", lambda: pack_all(rows, 1024))
        timed("evaluation_s", lambda: score_loss(base, rows))
        timed("reference_s", lambda: reference.add_reference_logprobs(base, adapter, "base", rows, 4096))
        timed("again_s", lambda: reference.add_reference_logprobs(base, adapter, "base", rows, 4096))
    return {"tokens": sum(len(row.ids) for row in rows), **seconds}


def main() -> None:
    if sys.argv[1] == "one":
        what, value = sys.argv[2], int(sys.argv[3])
        measure = {
            "rows": loaded,
            "bookkeeping": bookkeeping,
            "packs": lambda tokens: trained(170, 8, 4, round(tokens / 170)),
            "lengths": lambda length: trained(length, 8, 3 if length < 16384 else 2),
            "ranks": lambda rank: trained(1024, rank, 4),
        }
        result = measure[what](value)
        print(json.dumps(result))
        return
    what = sys.argv[1]
    for value in map(int, sys.argv[2:] or DEFAULTS[what]):
        command = [sys.executable, __file__, "one", what, str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{what} {value:,}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{what} {value:,}: {result}  (load {os.getloadavg()[0]:.1f})", flush=True)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known.setdefault(what, {})[str(value)] = result
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
