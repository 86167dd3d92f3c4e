"""Models, rows and a recipe to run commands on, and how to run them. `conftest.py` has the fixtures for everybody."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimtab import cli
from trimtab.core import interrupts

WHOLE = os.environ.get("TRIMTAB_WHOLE") == "1"
"""Whether whole matrices are tested, of which `make test` takes a sample: `make whole`."""


def combinations(methods, others):
    """Each method with one of the others, in turn, and the first one with all of them; or everything with everything."""
    if WHOLE:
        return [(method, other) for method in methods for other in others]
    sample = [(method, others[n % len(others)]) for n, method in enumerate(methods)]
    return list(dict.fromkeys([*((methods[0], other) for other in others), *sample]))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 4}
method: {rank: 4}
train: {epochs: 8, rows_per_step: 8, lr: 2e-2}
output: run
certify: false
"""
ROWS = [{"prompt": f"Is {n} a number?", "completion": "yes"} for n in range(30)]


def dataset_card(first, second):
    """The README.md of a dataset with two subsets, as on the hub: the first has the splits train and test."""
    return (
        f"---\nconfigs:\n- config_name: {first}\n  data_files:\n  - {{split: train, path: {first}.jsonl}}\n"
        f"  - {{split: test, path: {first}_test.jsonl}}\n- config_name: {second}\n  data_files: {second}.jsonl\n---\n"
    )


def work_in_copy(made, tmp_path, monkeypatch):
    """Change to a copy of a folder, with a cache of its own."""
    here = tmp_path / "here"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return here


def make_tokenizer(template=CHATML):
    """A byte-level tokenizer of 300 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant system", *(f"{row['prompt']} {row['completion']}" for row in ROWS)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder, seed, template=CHATML):
    """A random Llama of 37,000 parameters with a byte-level tokenizer of 300 tokens."""
    tokenizer = make_tokenizer(template)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Models, rows, a recipe, and a run of it, made by the real command."""
    world = tmp_path_factory.mktemp("world")
    transformers.utils.logging.disable_progress_bar()
    make_model(world / "tiny", 0)
    make_model(world / "other", 1)
    make_model(world / "plain", 0, template=None)
    write_rows(world / "rows.jsonl", ROWS)
    (world / "r.yaml").write_text(RECIPE)
    done = command("train", "r.yaml", cwd=world)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (world / "said.txt").write_text(done.stdout)
    return world


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, to work in."""
    here = tmp_path / "here"
    shutil.copytree(world, here)
    for name in ("recipe.yaml", "data.json"):  # as if the run had been made here; its manifest stays as it was
        (here / "run" / name).write_text((here / "run" / name).read_text().replace(str(world), str(here)))
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield here
    for number, handler in before.items():
        signal.signal(number, handler)


def command(*words, cwd):
    """The real command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "trimtab", *words], cwd=cwd, env=environment, capture_output=True, text=True)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def trimtab(capsys, world):
    """The command in this process, which has paid for torch already; what it says, with HERE for where it works."""

    def run(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = error.code
        out, err = capsys.readouterr()
        return Done(code, out, err.replace(str(Path.cwd()), "HERE").replace(str(world), "HERE"))

    return run
