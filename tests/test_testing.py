"""The tiny base of `trimtab.testing`: the same everywhere, reads conversations, learns from them, and is a folder when saved."""

import json
import subprocess
import sys

import pytest
import torch
from templates import saved_base

import trimtab
from trimtab.testing import tiny_base, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = [{"prompt": f"Is {n} a number?", "completion": "yes"} for n in range(24)]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    return str(path)


def trained(rows_file):
    base = tiny_base()
    rows = trimtab.rows(rows_file, base)
    adapter = trimtab.attach(base.model, trimtab.LoRA(rank=4, dropout=0.1))
    losses = [step.loss for step in trimtab.fit(base, adapter, rows, epochs=6, rows_per_step=8, lr=2e-2)]
    return base, adapter, losses


def test_a_whole_fit_learns_the_answer_and_is_repeated_exactly(rows_file, tmp_path):
    base, adapter, losses = trained(rows_file)
    assert losses[-1] < 0.2 * losses[0]
    assert trimtab.answer(base, "Is 100 a number?", max_new_tokens=8) == "yes"
    trimtab.save_adapter(base, adapter, tmp_path / "adapter")
    again, other, repeated = trained(rows_file)
    assert repeated == losses
    parameters = other.parameters()
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in adapter.parameters().items())
    other.detach()
    assert trimtab.answer(again, "Is 100 a number?", max_new_tokens=8) != "yes"
    trimtab.load_adapter(again, tmp_path / "adapter")
    assert trimtab.answer(again, "Is 100 a number?", max_new_tokens=8) == "yes"


def test_it_is_the_same_in_another_process_and_another_by_another_seed():
    program = "import json; from trimtab.testing import tiny_base; print(json.dumps(tiny_base().fingerprint))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    mine = tiny_base().fingerprint
    assert json.loads(done.stdout.splitlines()[-1]) == mine
    seeded = tiny_base(seed=1).fingerprint
    assert seeded["weights"] != mine["weights"]
    assert seeded["tokenizer"] == mine["tokenizer"]


def test_any_text_is_its_bytes():
    base = tiny_base()
    for text in ("Hello, world\n", "naïve 中文 👍 \t\x00", "  two  spaces "):
        (encoded,) = base.encode([text])
        assert len(encoded.ids) == len(text.encode())
        assert base.decode(encoded.ids) == text
    (encoded,) = base.encode(["<|im_start|>"])
    assert base.stop_ids == (2,)
    assert max(encoded.ids) < tiny_model().config.vocab_size == len(base.tokenizer)


def test_it_is_a_folder_when_saved(tmp_path):
    loaded, held = trimtab.load(str(saved_base(tmp_path / "tiny"))), tiny_base()
    for name in ("weights", "tokenizer", "template"):
        assert loaded.fingerprint[name] == held.fingerprint[name]
