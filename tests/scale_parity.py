"""The whole matrix of what `test_processes.py` samples, and kills of real groups: part of `make scale`."""

import json
import random
import signal
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from kills import TEXTS
from test_processes import JUDGED, PAIRS, ROWS, off
from together import RECIPE, run_together, start_together, train_alone
from worlds import make_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = {"sft": "rows", "dpo": "pairs", "orpo": "pairs", "simpo": "pairs", "cpo": "pairs", "kto": "judged"}
HOW = {
    "plain": [],
    "recomputed": ["train.recompute=full"],
    "mlp recomputed": ["train.recompute=mlp"],
    "tied": ["model=tied"],
}
SFT = {
    "dropout": ["method.dropout=0.3"],
    "neftune": ["train.neftune=5"],
    "tokens": ["train.tokens_per_step=300", "train.rows_per_step=null"],
    "weights": ["data.train={a: {path: rows.jsonl, weight: 2}, b: {path: other.jsonl, weight: 1}}"],
    "corpus": ["data={train: texts.jsonl, corpus: true, max_length: 48, eval: 4, seed: 0}", "train.rows_per_step=3"],
    "one row a step": ["train.rows_per_step=1", "train.max_steps=8"],
    "stops early": ["train.patience=1", "train.min_improvement=5", "train.evaluate_every=2"],
    "float16": ["model.dtype=float16", "model.device=cpu"],
}
JOBS = {
    f"{name}, {how}": [f"objective={name}", f"data.train={data}.jsonl", *words]
    for name, data in DATA.items()
    for how, words in HOW.items()
}
JOBS |= {f"sft, {name}": words for name, words in SFT.items()}
TOLERANCE = {"sft, float16": (1e-2, 0.2)}
"""Of losses and adapters, where it is not that of float32."""


def make(folder):
    transformers.utils.logging.disable_progress_bar()
    make_model(folder / "tiny", 0)
    untied = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny")
    make_model(folder / "tied", 0)
    untied.config.tie_word_embeddings = True
    tied = transformers.LlamaForCausalLM(untied.config)
    tied.load_state_dict(untied.state_dict(), strict=False)
    tied.tie_weights()
    tied.save_pretrained(folder / "tied")
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("judged", JUDGED), ("other", ROWS[:20]), ("texts", TEXTS)):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "r.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        make(folder)
        for name, words in JOBS.items():
            train_alone(folder, [*words, f"output=1/{name}"])
        for size in (2, 3):
            said = run_together(folder, [[*words, f"output={size}/{name}"] for name, words in JOBS.items()], size, seconds=580)
            assert {one["status"] for of_rank in said for one in of_rank} == {"done"}
        yield folder


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", JOBS)
def test_any_number_of_processes_trains_the_same_run(name, size, made):
    losses, adapters = off(made / str(size) / name, made / "1" / name)
    most = TOLERANCE.get(name, (1e-6, 1e-4))
    assert losses < most[0]
    assert adapters < most[1]
    sys.stdout.write(f"{name}, {size}: {losses:.1e} {adapters:.1e}\n")


# Kills

KILLED = ["train.epochs=6", "train.evaluate_every=3", "train.save_every=1", "method.dropout=0.2"]
WORKER = """
import sys, torch
torch.set_num_threads(1)
from trimtab import cli
sys.exit(cli.main(["train", "r.yaml", *sys.argv[1:]]))
"""


def _end(processes, kill):
    """How many seconds the others take to end after one was killed, and the exit codes of all. As launchers do, SIGTERM comes soon, and SIGKILL
    after 30 seconds, for those that are still waiting for a process that never came."""
    started, sent = time.monotonic(), set()
    while any(process.poll() is None for process in processes):
        for after, number in ((3, signal.SIGTERM), (33, signal.SIGKILL)):
            if kill and time.monotonic() > started + after and number not in sent:
                sent.add(number)
                for process in processes:
                    process.send_signal(number)
        assert time.monotonic() < started + 120, "they have not ended"
        time.sleep(0.02)
    return time.monotonic() - started, [process.returncode for process in processes], sent


def test_no_run_is_lost_and_none_is_wrong_when_random_processes_are_killed(tmp_path, monkeypatch):
    """40 kills of random ranks at random moments; each time, the run goes on with another number of processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    make(tmp_path)
    train_alone(tmp_path, [*KILLED, "output=spared"])
    draw, kills, runs, slowest, sizes = random.Random(0), 0, 0, 0.0, []
    helped = Counter()
    while kills < 40:
        output, done = f"run-{runs}", False
        while not done:
            size = draw.choice([1, 2, 3])
            processes = start_together([sys.executable, "-c", WORKER, *KILLED, f"output={output}"], size, tmp_path)
            seconds = draw.uniform(5, 14)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and all(process.poll() is None for process in processes):
                time.sleep(0.02)
            victim = draw.choice(processes)
            kill = victim.poll() is None and kills < 40
            if kill:
                victim.send_signal(signal.SIGKILL)
                kills += 1
                sizes.append(size)
            took, codes, sent = _end(processes, kill)
            helped[max(sent, default=0)] += kill
            errors = [process.communicate()[1] for process in processes]
            record = Path(output, "run.json")
            done = (
                record.exists() and json.loads(record.read_text())["status"] == "done" and not Path(output, "states").exists()
            )
            if -9 in codes and signal.SIGKILL not in sent:
                slowest = max(slowest, took)
                assert 0 not in codes or size == 1 or json.loads(Path(output, "run.json").read_text())["status"] == "done", (
                    codes
                )
            elif signal.SIGKILL not in sent:
                assert done or 130 in codes, [text[-2000:] for text in errors]
        losses, adapters = off(tmp_path / output, tmp_path / "spared")
        assert losses < 1e-5
        assert adapters < 1e-3
        runs += 1
    changes = sum(a != b for a, b in pairwise(sizes))
    sys.stdout.write(
        f"{kills} kills in {runs} runs, {changes} resumed by another number; all ended within {slowest:.1f} s of a kill\n"
    )
    sys.stdout.write(
        f"without a signal {helped[0]}, by SIGTERM {helped[signal.SIGTERM]}, by SIGKILL {helped[signal.SIGKILL]}\n"
    )
