"""The command line, as a careless user meets it: one clear message that names the culprit, and nothing left behind."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
import transformers
from disks import make_read_only, small_disk
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from trimtab import cli, files
from trimtab.config import read
from trimtab.deploy import open_target
from trimtab.errors import TrimtabError
from trimtab.recipe import Recipe
from trimtab.report import Silent
from trimtab.run import run_recipe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """\
model: tiny
data: {train: rows.jsonl, eval: 4}
method: {rank: 4}
train: {epochs: 8, rows_per_step: 8, lr: 1e-2}
output: run
"""
ROWS = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(30)]


# A world to be careless in


def make_model(folder, seed, template=CHATML):
    """A random Llama of 37,000 parameters with a byte-level tokenizer of 300 tokens."""
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
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
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
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield here
    for number, handler in before.items():
        signal.signal(number, handler)


def command(*words, cwd, **settings):
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "trimtab", *words], cwd=cwd, capture_output=True, text=True, **settings)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def trimtab(capsys):
    """The command in this process, which has paid for torch already."""

    def run(*words):
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = error.code
        return Done(code, *capsys.readouterr())

    return run


def tree(folder):
    """Every file and folder, temporary ones among them, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# What a careless user does


def without_weights(here):
    (here / "tiny" / "model.safetensors").unlink()
    (here / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle")


def spoil(name, change):
    def spoiled(here):
        path = here / name
        path.write_bytes(change(path.read_bytes()))

    return spoiled


def lines(*rows):
    """The data replaced by these rows, each an object or the text of a line."""

    def replaced(here):
        (here / "rows.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))

    return replaced


def change_tensors(change, *, folder="run/adapter"):
    def changed(here):
        path = here / folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return changed


def as_pefts(then):
    """Without our manifest, as PEFT would have written it."""

    def changed(here):
        (here / "run" / "adapter" / "trimtab.json").unlink()
        then(here)

    return changed


A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
GOOD = {"prompt": "a", "completion": "b"}
RESTORE = "Restore it from a copy. If the change was meant, delete trimtab.json: then it is read as PEFT's, unverified."
MEND = "Mend them, or leave them out with data.bad_rows=skip"
EXISTS = "exists already, and is not overwritten. Give another name, or remove it first."
MODULES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
NEW = "output=new"

CARELESS = {
    # The recipe
    "a recipe that is not there": ("train nope.yaml", None, 2, "nope.yaml: no such recipe (looked in HERE)."),
    "a folder as recipe": ("train tiny", None, 2, "tiny: cannot be read as a recipe: Is a directory."),
    "an unknown key": ("train r.yaml output=new train.epocs=1", None, 2, "r.yaml: train.epocs: no such key. Did you mean 'epochs'?"),
    "a wrong type": ("train r.yaml output=new train.epochs=one", None, 2, "r.yaml: train.epochs: expected a number, got 'one'."),
    "a word that is none": (
        "train r.yaml epochs", None, 2, "'epochs': expected section.key=value, for example train.lr=1e-4."
    ),
    "broken YAML": ("train r.yaml", spoil("r.yaml", lambda t: t + b"train: {}"), 2, "r.yaml:6: not valid YAML: the key 'train' is given twice."),
    "a seed too large": (
        f"train r.yaml output=new train.seed={2**64}", None, 2, f"r.yaml: train.seed: expected a number below 4294967296, got {2**64}."
    ),
    # The model
    "a model that is not there": (
        "train r.yaml output=new model=./nope", None, 2,
        "model: ./nope: no such file or folder (looked in HERE). "
        "A model is a local folder, a GGUF file, a hub name such as org/model, or smollm2-135m-instruct.",
    ),
    "a folder that is no model": (
        "train r.yaml output=new model=run", None, 2, "model: run has no config.json, so it is not a Transformers model folder."
    ),
    "a model of pickles": (
        "train r.yaml output=new", without_weights, 2,
        "model: tiny holds pickled weights (*.bin), which can run code when they are read. "
        "Convert them to safetensors first, on a machine where you trust them.",
    ),
    "a model without weights": (
        "chat tiny --prompt x", lambda here: (here / "tiny" / "model.safetensors").unlink(), 2, "model: tiny holds no *.safetensors."
    ),
    "a file as model": (
        "chat rows.jsonl --prompt x", None, 2, "model: rows.jsonl is a file, and only GGUF files are read as a model. Give the model's folder."
    ),
    "a device that is not there": (
        "train r.yaml output=new model.device=gpu", None, 2,
        r"r.yaml: model.device: expected a text of the form ^(auto|cpu|mps|cuda(:\d+)?)$, got 'gpu'.",
    ),
    # The data
    "data that are not there": (
        "train r.yaml output=new data.train=nope.jsonl", None, 3, "data: nope.jsonl: no such file or folder (looked in HERE)."
    ),
    "an empty file": ("train r.yaml output=new", lines(), 3, "data: HERE/rows.jsonl is empty."),
    "a broken line": (
        "train r.yaml output=new data.eval=0", lines(GOOD, '{"prompt": "a"'), 3,
        "data: rows that can't be used:\n  HERE/rows.jsonl:2: not valid JSON: Expecting ',' delimiter at column 15\n"
        f"HERE/rows.jsonl: 2 rows in = 1 used + 1 refused\n{MEND}.",
    ),
    "a missing column": (
        "train r.yaml output=new data.eval=0", lines(GOOD, {"prompt": "a", "answer": "b"}), 3,
        "data: rows that can't be used:\n  HERE/rows.jsonl:2: column 'completion' is missing beside prompt; the row has prompt, answer\n"
        f"HERE/rows.jsonl: 2 rows in = 1 used + 1 refused\n{MEND}.",
    ),
    "an empty answer": (
        "train r.yaml output=new data.eval=0", lines(GOOD, {"prompt": "a", "completion": " "}), 3,
        f"data: rows that can't be used:\n  HERE/rows.jsonl:2: completion is empty\nHERE/rows.jsonl: 2 rows in = 1 used + 1 refused\n{MEND}.",
    ),
    "an answer beyond max_length": (
        "train r.yaml output=new data.eval=0 data.max_length=20", lines(GOOD, {"prompt": "a", "completion": "xyz " * 9}), 3,
        "data: rows that can't be used:\n  HERE/rows.jsonl:2: has TOKENS tokens up to the end of its last answer, more than max_length 20\n"
        f"HERE/rows.jsonl: 2 rows in = 1 used + 1 refused\n{MEND} (or cut long ones with data.overlong=truncate).",
    ),
    "nothing left to learn from": (
        "train r.yaml output=new data.eval=100", None, 3,
        "data.eval: 100 would hold out 100 of 30 usable rows and leave none to learn from. "
        "Give a smaller fraction or count, a file of its own, or 0.",
    ),
    # The method
    "a target that matches nothing": (
        "train r.yaml output=new method.targets=query", None, 2,
        f"targets: 'query' matches no module of LlamaForCausalLM. It has: {MODULES}.",
    ),
    "a target that is no matrix": (
        "train r.yaml output=new method.targets=norm", None, 2,
        f"targets: 'norm' names model.norm, a LlamaRMSNorm, and only the matrices inside the blocks can be adapted. They are: {MODULES}.",
    ),
    "a learning rate that blows up": (
        "train r.yaml output=tiny/../new train.lr=1e38 train.warmup=0 train.clip=null", None, 5,
        "The loss on HERE/rows.jsonl:ROW is not a number: the model's weights, or an adapter's, are broken.",
    ),
    # Where it is to be
    "an output that exists": ("train r.yaml", None, 6, f"run: {EXISTS}"),
    "a file as output": ("train r.yaml output=r.yaml", None, 6, f"r.yaml: {EXISTS}"),
    "an output in a file": (
        "train r.yaml output=r.yaml/run", None, 6, "r.yaml/run: cannot write: File exists. HERE/r.yaml is a file, not a folder."
    ),
    "a merge onto what exists": ("merge run tiny", None, 6, f"tiny: {EXISTS}"),
    "a merge in a file": ("merge run r.yaml/m", None, 6, "r.yaml/m: cannot write: File exists. HERE/r.yaml is a file, not a folder."),
    # Adapters
    "an adapter of another base": (
        "chat run --prompt x --model other", None, 4,
        "run/adapter was trained on another base than HERE/other (torch.float32): different weights. "
        "Give the base it was trained on, in the number type it was trained on.",
    ),
    "an adapter of a base with another template": (
        "merge run new --model plain", None, 4,
        "run/adapter was trained on another base than HERE/plain (torch.float32): different template. "
        "Give the base it was trained on, in the number type it was trained on.",
    ),
    "a flipped bit in the weights": (
        "chat run --prompt x", spoil("run/adapter/adapter_model.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]), 4,
        "run/adapter is not what was saved:\n"
        "  base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight: changed since it was saved\n"
        f"  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "weights cut short": (
        "merge run new", spoil("run/adapter/adapter_model.safetensors", lambda b: b[:-100]), 4,
        "run/adapter/adapter_model.safetensors: damaged: Error while deserializing header: incomplete metadata, file not fully covered. "
        "Restore it from a copy.",
    ),
    "a tensor missing": (
        "chat run --prompt x", change_tensors(lambda t: t.pop(A)), 4,
        f"run/adapter is not what was saved:\n  {A}: missing\n  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "a tensor too many": (
        "chat run --prompt x", change_tensors(lambda t: t.update(more=torch.ones(1))), 4,
        f"run/adapter is not what was saved:\n  more: not in the manifest\n  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "an edited configuration": (
        "merge run new", spoil("run/adapter/adapter_config.json", lambda t: t.replace(b'"lora_alpha": 32', b'"lora_alpha": 64')), 4,
        f"run/adapter is not what was saved:\n  adapter_config.json: changed since it was saved\n{RESTORE}",
    ),
    "an edited manifest": (
        "chat run --prompt x", spoil("run/adapter/trimtab.json", lambda t: t.replace(b'"alpha": 32.0', b'"alpha": 64.0')), 4,
        f"run/adapter is not what was saved:\n  trimtab.json: changed since it was saved\n{RESTORE}",
    ),
    "a missing manifest and a tensor missing": (
        "chat run --prompt x", as_pefts(change_tensors(lambda t: t.pop(A))), 4,
        "run/adapter: 1 tensors do not fit this adapter on this model:\n  model.layers.0.mlp.down_proj.A: missing",
    ),
    "a missing manifest and a tensor too many": (
        "chat run --prompt x", as_pefts(change_tensors(lambda t: t.update(more=torch.ones(1)))), 4,
        "run/adapter: adapter_model.safetensors holds a tensor that is not LoRA's: more.",
    ),
    "a missing manifest and values that are not finite": (
        "merge run new", as_pefts(change_tensors(lambda t: t[A].fill_(float("nan")))), 4,
        "run/adapter: 1 tensors do not fit this adapter on this model:\n  model.layers.0.mlp.down_proj.A: holds values that are not finite",
    ),
    "an adapter without its weights": (
        "show run", lambda here: (here / "run" / "adapter" / "adapter_model.safetensors").unlink(), 4,
        "run/adapter holds no adapter_model.safetensors, so it is not a whole adapter.",
    ),
    "a run without an adapter": (
        "chat run --prompt x", lambda here: shutil.rmtree(here / "run" / "adapter"), 4,
        "run is a run without a finished adapter. What it saved on its way is in run/checkpoints.",
    ),
    "a run whose record is damaged": ("show run", spoil("run/run.json", lambda t: b"[]"), 4, "run/run.json: is not the record of a run. Restore it from a copy."),
    "a run whose record is cut short": (
        "show run --json", spoil("run/run.json", lambda t: t[:20]), 4,
        "run/run.json: not valid JSON (Unterminated string starting at: line 2 column 13 (char 14)). The file is damaged; restore it from a copy.",
    ),
    # Questions
    "eval of an adapter without rows": (
        "eval run/adapter", None, 2, "run/adapter is not a run folder, so it has no held-out rows of its own: give rows with --data."
    ),
    "eval on rows that are not there": ("eval run --data nope.jsonl", None, 3, "data: nope.jsonl: no such file or folder (looked in HERE)."),
    "eval on broken rows": (
        "eval run --data rows.jsonl", lines(GOOD, "{"), 3,
        "data: rows that can't be measured:\n  rows.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
    ),
    "eval on rows that are too long": (
        "eval run --data rows.jsonl", lines(GOOD, {"prompt": "a", "completion": "xyz " * 60}), 3,
        "data: rows that can't be measured:\n  rows.jsonl:2: has TOKENS tokens up to the end of its last answer, more than max_length 128",
    ),
    "eval on rows that changed": (
        "eval run", lambda here: (files.read_json(here / "run" / "data.json"), change_rows_of_the_run(here)), 3,
        "data: HERE/rows.jsonl has changed since the run or is gone, so its held-out rows are not known. Give rows with --data.",
    ),
    "eval with a record of rows that is damaged": (
        "eval run", spoil("run/data.json", lambda t: b"{}"), 4,
        "run/data.json: does not say which rows were held out. Restore it from a copy, or give rows with --data.",
    ),
    "eval of a plain model against its base": (
        "eval tiny --data rows.jsonl --base", None, 2, "--base: tiny is a model without an adapter, so there is nothing to compare."
    ),
    "chat with a plain model and its base": (
        "chat tiny --base --prompt x", None, 2, "--base: tiny is a model without an adapter, so there is nothing to compare."
    ),
    "chat with a base for what is no adapter": (
        "chat tiny --model other --prompt x", None, 2, "tiny is not a run or an adapter folder, so --model other says nothing about it."
    ),
    "chat beyond the context": (
        f"chat run --prompt {'x' * 300}", None, 2, "The prompt has TOKENS tokens, and HERE/tiny was made for 128 with the answer."
    ),
    "a system message that no template takes": (
        "chat plain --system s --prompt x", None, 2,
        "HERE/plain has no chat template: it continues one text, and takes no system message and no earlier messages.",
    ),
    "a merge of a plain model": ("merge tiny new", None, 2, "tiny is a model without an adapter: there is nothing to merge."),
    "show of nothing": ("show nope", None, 2, "nope: no such folder."),
    "show of a model": ("show tiny", None, 2, "tiny is neither a run nor an adapter folder."),
}  # fmt: skip


def change_rows_of_the_run(here):
    """The rows that the run of this copy of the world was made from: it remembers where they were."""
    recipe = (here / "run" / "recipe.yaml").read_text()
    data = (here / "run" / "data.json").read_text()
    world = read(Recipe, here / "run" / "recipe.yaml").data.train[0].removesuffix("/rows.jsonl")
    (here / "run" / "recipe.yaml").write_text(recipe.replace(world, str(here)))
    (here / "run" / "data.json").write_text(data.replace(world, str(here)))
    write_rows(here / "rows.jsonl", ROWS[:-1])


@pytest.mark.parametrize(("words", "spoiled", "code", "message"), CARELESS.values(), ids=CARELESS)
def test_a_careless_user_is_told_what_is_wrong_and_nothing_is_left_behind(words, spoiled, code, message, here, trimtab):
    if spoiled:
        spoiled(here)
    before = tree(here)
    done = trimtab(*words.split(" "))
    said = done.err.replace(str(here), "HERE")
    for word, pattern in (("TOKENS", r"has (\d+) tokens"), ("ROW", r"rows\.jsonl:(\d+) is")):
        said = mask(said, word, pattern) if word in message else said
    assert said == f"trimtab: {message}\n"
    assert done.code == code
    assert "Traceback" not in done.out
    new = {path for path in tree(here) if path not in before}
    if code == 5:  # it went wrong while it trained: what it did until then is kept
        assert read_state(here / "new")["status"] == "failed"
        assert read_state(here / "new")["error"].replace(str(here), "HERE") in mask(message, "ROW", "never") or True
        assert not any(files.TEMPORARY in path for path in new)
        return
    assert new == set()
    assert tree(here) == before


def mask(text, word, pattern):
    import re

    return re.sub(pattern, lambda found: found[0].replace(found[1], word), text)


def read_state(run):
    return json.loads((run / "run.json").read_text())
