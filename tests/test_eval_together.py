"""`trimtab eval` and `trimtab check` by two processes say what one says."""

import random
import re

import pytest
import transformers
from test_processes import JUDGED, PAIRS, ROWS
from together import RECIPE, carry_out, run_together, train_alone
from worlds import make_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CORPUS = """\
model: tiny
data: {train: {a: {path: a.jsonl, weight: 2}, b: {path: b.jsonl, weight: 1}}, corpus: true, max_length: 32, eval: 8, seed: 0}
method: {rank: 4}
train: {max_steps: 6, rows_per_step: 8, lr: 2e-3}
output: corpus
certify: false
"""
FUNCTION = "def length(answer, expected):\n    return {'length': len(answer), 'same': float(answer == expected)}\n"
RUNS = {
    "sft": [],
    "dpo": ["objective=dpo", "data.train=pairs.jsonl"],
    "kto": ["objective=kto", "data.train=judged.jsonl"],
}
COMMANDS = [
    ["eval", "sft", "--base", "--show", "3"],
    ["eval", "sft", "--json", "eval.function=m.py:length", "eval.metrics=[f1]"],
    ["eval", "dpo", "--show", "3", "--json"],
    ["eval", "kto", "--base", "--show", "3"],
    ["check", "r.yaml", *RUNS["kto"]],
    ["check", "c.yaml"],
]
FAULTY = [
    {"command": ["eval", "HERE/sft", "--data", "rows.jsonl"], "fault": "other_base"},
    {"command": ["eval", "tiny", "--data", "same.jsonl"], "fault": "other_base"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("evaluated"), random.Random(1)
    transformers.utils.logging.disable_progress_bar()
    texts = {
        name: [{"text": " ".join(draw.choices(["yes", "no", "even", "is"], k=draw.randint(5, 40)))} for _ in range(60)]
        for name in "ab"
    }
    for name, rows in {"rows": ROWS, "pairs": PAIRS, "judged": JUDGED, **texts}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    for place, seed, rows in ((folder, 0, ROWS), (folder / "elsewhere", 1, ROWS[::-1])):
        make_model(place / "tiny", seed)
        write_rows(place / "same.jsonl", ROWS[:8])
        write_rows(place / "rows.jsonl", rows)
    for name, text in {"r.yaml": RECIPE, "c.yaml": CORPUS, "m.py": FUNCTION}.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRIMTAB_CACHE", str(folder / "cache"))
        for name, words in RUNS.items():
            train_alone(folder, [*words, f"output={name}", "train.epochs=1"])
        alone = [carry_out(command) for command in COMMANDS]
        faulty = [{**job, "command": [word.replace("HERE", str(folder)) for word in job["command"]]} for job in FAULTY]
        yield alone, run_together(folder, [*({"command": command} for command in COMMANDS), *faulty])


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=map(" ".join, COMMANDS))
def test_two_say_what_one_says(number, made):
    alone, (first, other) = made
    assert other[number]["status"] == first[number]["status"] == "done"
    assert _without_machine(first[number]["out"]) == _without_machine(alone[number]["out"])
    assert (first[number]["code"], first[number]["err"]) == (alone[number]["code"], alone[number]["err"])


def _without_machine(said):
    """Of a check, without the free disk and memory, of which each process has its part."""
    return re.sub(r"[\d,.]+ [MG]B are free in|[\d.]+ GB free", "", said)


@pytest.mark.parametrize(("number", "what"), [(0, "the examples"), (1, "the base model .*tiny")])
def test_processes_that_evaluate_different_things_end_with_an_error(number, what, made):
    for said in made[1]:
        found = said[len(COMMANDS) + number]
        assert (found["status"], found["code"]) == ("ProcessesDiffer", 5)
        assert re.search(f"differs from process 0 in {what}: Have the same files on every machine", found["message"])
