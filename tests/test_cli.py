"""The command line, as a careless user meets it: one clear message that names the culprit, and nothing left behind."""

import io
import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from disks import make_read_only, small_disk
from safetensors.torch import load_file, save_file
from worlds import ROWS, command, write_rows

from trimtab import api, cli, commands
from trimtab.artifacts import saved_states
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.config import override
from trimtab.core.errors import RecipeError, TrimtabError
from trimtab.data import Finding
from trimtab.deploy import load_model
from trimtab.methods import Method, attach
from trimtab.report import RunObserver
from trimtab.run import checkpoints, preflight
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

NAMES = ", ".join(repr(command.__name__.rpartition(".")[2]) for command in cli.COMMANDS)

pytestmark = pytest.mark.usefixtures("one_thread")


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
RESTORE = (
    "Restore it from a copy. If the change is intended, delete trimtab.json: then the folder is read as PEFT's, unverified."
)
FIX = "Fix them, or leave them out with data.bad_rows=skip"
EXISTS = "exists already, and is not overwritten. Give another name, or remove it first."
MODULES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
MATRICES = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
NEW = "output=new"

CARELESS = {
    # The recipe
    "a recipe that is not there": ("train nope.yaml", None, 2, "nope.yaml: no such recipe (looked in HERE)."),
    "a folder as recipe": ("train tiny", None, 2, "tiny: cannot be read as a recipe: Is a directory."),
    "an unknown key": ("train r.yaml output=new train.epocs=1", None, 2, "r.yaml: train.epocs: no such key. Did you mean 'epochs'?"),
    "a wrong type": ("train r.yaml output=new train.epochs=one", None, 2, "r.yaml: train.epochs: expected 'auto' or a number, got 'one'."),
    "a word that is none": (
        "train r.yaml epochs", None, 2, "'epochs': expected section.key=value, for example train.lr=1e-4."
    ),
    "broken YAML": ("train r.yaml", spoil("r.yaml", lambda t: t + b"train: {}"), 2, "r.yaml:7: not valid YAML: the key 'train' is given twice."),
    "a seed too large": (
        f"train r.yaml output=new train.seed={2**64}", None, 2, f"r.yaml: train.seed: expected a number below 4294967296, got {2**64}."
    ),
    # The model
    "a model that is not there": (
        "train r.yaml output=new model=./nope", None, 2,
        "model: ./nope: no such file or folder (looked in HERE). "
        "A model is a local folder, a GGUF file, a hub name such as org/model, or smollm2-135m-instruct.",
    ),
    "a home that is not there": (
        "chat ~nobody-of-this-name/m --prompt x", None, 2,
        "model: ~nobody-of-this-name/m: no such file or folder (looked in HERE). "
        "A model is a local folder, a GGUF file, a hub name such as org/model, or smollm2-135m-instruct.",
    ),
    "a folder that is no model": (
        "train r.yaml output=new model=run", None, 2, "model: run has no config.json, so it is not a Transformers model folder."
    ),
    "a model of pickles": (
        "train r.yaml output=new", without_weights, 2,
        "model: tiny holds pickled weights (pytorch_model.bin), which can run code when they are read, and no *.safetensors. "
        "If you trust them, convert them once, where nothing else is at stake:\n"
        "python -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        'M.from_pretrained("tiny", dtype="auto").save_pretrained("tiny-safetensors"); '
        """T.from_pretrained("tiny").save_pretrained("tiny-safetensors")'\nand use tiny-safetensors.""",
    ),
    "a model without weights": (
        "chat tiny --prompt x", lambda here: (here / "tiny" / "model.safetensors").unlink(), 2, "model: tiny holds no *.safetensors."
    ),
    "a file as model": (
        "chat rows.jsonl --prompt x", None, 2, "model: rows.jsonl is a file, and only GGUF files are read as a model. Give the model's folder."
    ),
    "a device that is not there": (
        "train r.yaml output=new model.device=gpu", None, 2,
        r"r.yaml: model.device: expected a text of the form ^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$, got 'gpu'.",
    ),
    # The data
    "data that are not there": (
        "train r.yaml output=new data.train=nope.jsonl", None, 3, "data: nope.jsonl: no such file or folder (looked in HERE)."
    ),
    "an empty file": ("train r.yaml output=new", lines(), 3, "data: rows.jsonl is empty."),
    "a broken line": (
        "train r.yaml output=new data.eval=0", lines(GOOD, '{"prompt": "a"'), 3,
        "data: examples that can't be used:\n  HERE/rows.jsonl:2: not valid JSON: Expecting ',' delimiter at column 15\n"
        f"HERE/rows.jsonl: 2 examples: 1 used, 1 rejected\n{FIX}.",
    ),
    "a missing column": (
        "train r.yaml output=new data.eval=0", lines(GOOD, {"prompt": "a", "answer": "b"}), 3,
        "data: examples that can't be used:\n  HERE/rows.jsonl:2: column 'completion' is missing beside prompt (is it 'answer'? Then set "
        "data.columns.completion=answer); the example has prompt, answer\n"
        f"HERE/rows.jsonl: 2 examples: 1 used, 1 rejected\n{FIX}.",
    ),
    "an empty answer": (
        "train r.yaml output=new data.eval=0", lines(GOOD, {"prompt": "a", "completion": " "}), 3,
        f"data: examples that can't be used:\n  HERE/rows.jsonl:2: completion is empty\nHERE/rows.jsonl: 2 examples: 1 used, 1 rejected\n{FIX}.",
    ),
    "an answer beyond max_length": (
        "train r.yaml output=new data.eval=0 data.max_length=20", lines(GOOD, {"prompt": "a", "completion": "xyz " * 9}), 3,
        "data: examples that can't be used:\n  HERE/rows.jsonl:2: has TOKENS tokens up to the end of its last answer, more than max_length 20\n"
        f"HERE/rows.jsonl: 2 examples: 1 used, 1 rejected\n{FIX} (or truncate or drop long ones with data.overlong).",
    ),
    "nothing left to learn from": (
        "train r.yaml output=new data.eval=100", None, 3,
        "data.eval: 100 would hold out 100 of 30 usable examples and leave none to train on. "
        "Give a smaller fraction or count, a file of its own, or 0.",
    ),
    # The method
    "a target that matches nothing": (
        "train r.yaml output=new method.targets=query", None, 2,
        f"targets: 'query' matches no module of LlamaForCausalLM. It has: {MODULES}.",
    ),
    "a target that is no matrix": (
        "train r.yaml output=new method.targets=norm", None, 2,
        f"targets: 'norm' names model.norm, a LlamaRMSNorm, and only the matrices can be adapted. They are: {MATRICES}.",
    ),
    # Where it is to be
    "an output that exists": (
        "train r.yaml", None, 6,
        "run: exists already, as a finished run, and is not overwritten. Look at it with `trimtab show run`; to train its adapter "
        "further, begin a run from it (start=run), or train into another folder, "
        "such as output=run-2. The command for that:\n  trimtab train r.yaml output=run-2",
    ),
    "a file as output": (
        "train r.yaml output=r.yaml", None, 6,
        "r.yaml: exists already, is no unfinished run, and is not overwritten. Remove it, or train into another folder, such as "
        "output=r.yaml-2. The command for that:\n  trimtab train r.yaml output=r.yaml-2",
    ),
    "an output in a file": (
        "train r.yaml output=r.yaml/run", None, 6, "r.yaml/run: cannot write: Not a directory. HERE/r.yaml is a file, not a folder."
    ),
    "a merge onto what exists": ("merge run tiny", None, 6, f"tiny: {EXISTS}"),
    "a merge onto what exists, before anything is loaded": ("merge nope tiny", None, 6, f"tiny: {EXISTS}"),
    "a merge in a file": ("merge --force run r.yaml/m", None, 6, "r.yaml/m: cannot write: File exists. HERE/r.yaml is a file, not a folder."),
    # Adapters
    "an adapter of another base": (
        "chat run --prompt x --model other", None, 4,
        "run/adapter was trained on another base than HERE/other (torch.float32): different weights. "
        "Use the base it was trained on, in the dtype it was trained in.",
    ),
    "an adapter of a base with another template": (
        "merge --force run new --model plain", None, 4,
        "run/adapter was trained on another base than HERE/plain (torch.float32): different template. "
        "Use the base it was trained on, in the dtype it was trained in.",
    ),
    "a flipped bit in the weights": (
        "chat run --prompt x", spoil("run/adapter/adapter_model.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:]), 4,
        "run/adapter has changed since it was saved:\n"
        "  base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight: changed since it was saved\n"
        f"  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "weights cut short": (
        "merge --force run new", spoil("run/adapter/adapter_model.safetensors", lambda b: b[:-100]), 4,
        "run/adapter/adapter_model.safetensors: damaged: Error while deserializing header: incomplete metadata, file not fully covered. "
        "Restore it from a copy.",
    ),
    "a tensor missing": (
        "chat run --prompt x", change_tensors(lambda t: t.pop(A)), 4,
        f"run/adapter has changed since it was saved:\n  {A}: missing\n"
        f"  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "a tensor too many": (
        "chat run --prompt x", change_tensors(lambda t: t.update(more=torch.ones(1))), 4,
        f"run/adapter has changed since it was saved:\n  more: not in the manifest\n"
        f"  adapter_model.safetensors: changed since it was saved\n{RESTORE}",
    ),
    "an edited configuration": (
        "merge --force run new", spoil("run/adapter/adapter_config.json", lambda t: t.replace(b'"lora_alpha": 32', b'"lora_alpha": 64')), 4,
        f"run/adapter has changed since it was saved:\n  adapter_config.json: changed since it was saved\n{RESTORE}",
    ),
    "an edited manifest": (
        "chat run --prompt x", spoil("run/adapter/trimtab.json", lambda t: t.replace(b'"alpha": 32.0', b'"alpha": 64.0')), 4,
        "run/adapter/trimtab.json: changed since it was saved. Restore it from a copy.",
    ),
    "a missing manifest and a tensor missing": (
        "chat run --prompt x", as_pefts(change_tensors(lambda t: t.pop(A))), 4,
        "run/adapter: its tensors do not fit this adapter on this model:\n  model.layers.0.mlp.down_proj.A: missing",
    ),
    "a missing manifest and a tensor too many": (
        "chat run --prompt x", as_pefts(change_tensors(lambda t: t.update(more=torch.ones(1)))), 4,
        "run/adapter: adapter_model.safetensors holds a tensor that is not LoRA's: more.",
    ),
    "a missing manifest and values that are not finite": (
        "merge --force run new", as_pefts(change_tensors(lambda t: t[A].fill_(float("nan")))), 4,
        "run/adapter: its tensors do not fit this adapter on this model:\n  model.layers.0.mlp.down_proj.A: holds values that are not finite",
    ),
    "an adapter without its weights": (
        "show run", lambda here: (here / "run" / "adapter" / "adapter_model.safetensors").unlink(), 4,
        "run/adapter holds no adapter_model.safetensors, so the adapter is incomplete.",
    ),
    "a run without an adapter": (
        "chat run --prompt x", lambda here: shutil.rmtree(here / "run" / "adapter"), 4,
        "run is a finished run, and its adapter is missing. Restore run/adapter from a copy, or use its newest checkpoint: "
        "run/checkpoints/step-000026.",
    ),
    "a run whose record is damaged": (
        "show run", spoil("run/run.json", lambda t: b"[]"), 4, "run/run.json: is not the record of a run. Restore it from a copy."
    ),
    "a run whose record is cut short": (
        "show run --json", spoil("run/run.json", lambda t: t[:17]), 4,
        "run/run.json: not valid JSON (Unterminated string starting at: line 2 column 13 (char 14)). "
        "The file is damaged; restore it from a copy.",
    ),
    # Questions
    "eval of an adapter without rows": (
        "eval run/adapter", None, 2, "run/adapter is not a run folder, so it has no held-out examples of its own: name a file with --data."
    ),
    "eval on rows that are not there": ("eval run --data nope.jsonl", None, 3, "data: nope.jsonl: no such file or folder (looked in HERE)."),
    "eval on broken rows": (
        "eval run --data rows.jsonl", lines(GOOD, "{"), 3,
        "data: examples that can't be evaluated:\n  rows.jsonl:2: not valid JSON: Expecting property name enclosed in double quotes at column 2",
    ),
    "eval on rows that are too long": (
        "eval run --data rows.jsonl", lines(GOOD, {"prompt": "a", "completion": "xyz " * 60}), 3,
        "data: examples that can't be evaluated:\n  rows.jsonl:2: has TOKENS tokens up to the end of its last answer, more than the context "
        "length 128",
    ),
    "eval on rows that changed": (
        "eval run", lines(*ROWS[:-1]), 3,
        "data: HERE/rows.jsonl has changed since the run or is gone, so its validation examples are not known. Give examples with --data.",
    ),
    "eval with a record of rows that is damaged": (
        "eval run", spoil("run/data.json", lambda t: b"{}"), 4,
        "run/data.json: does not say which examples were held out. Restore it from a copy, or name a file with --data.",
    ),
    "eval of a plain model against its base": (
        "eval tiny --data rows.jsonl --base", None, 2, "--base: tiny is a model without an adapter, so there is nothing to compare."
    ),
    "chat with a plain model and its base": (
        "chat tiny --base --prompt x", None, 2, "--base: tiny is a model without an adapter, so there is nothing to compare."
    ),
    "chat with a base for what is no adapter": (
        "chat tiny --model other --prompt x", None, 2, "tiny is not a run or an adapter, so --model other does not apply."
    ),
    "chat with what temperature 0 makes nothing of": (
        "chat run --top-p 0.9 --prompt x", None, 2,
        "top_p would change nothing: with temperature 0, the most likely token is always taken. Set a temperature, such as 0.7."
    ),
    "chat beyond the context": (
        f"chat run --prompt {'x' * 300}", None, 2, "The prompt has TOKENS tokens, and the context of HERE/tiny has 128 for prompt and answer."
    ),
    "a system message that no template takes": (
        "chat plain --system s --prompt x", None, 2,
        "HERE/plain has no chat template: it continues a single text, without a system message or earlier messages.",
    ),
    "a merge of a plain model": ("merge tiny new", None, 2, "tiny is a model without an adapter: there is nothing to merge."),
    "show of nothing": ("show nope", None, 2, "nope: no such folder."),
    "show of a model": ("show tiny", None, 2, "tiny is neither a run nor an adapter folder."),
}  # fmt: skip


def test_no_words_ask_for_help(trimtab):
    done = trimtab()
    assert (done.code, done.err) == (0, "")
    assert "train an adapter" in done.out


def test_keys_may_stand_behind_options(here, trimtab):
    before = trimtab("check", "r.yaml", "data.max_length=9", "--show", "0")
    behind = trimtab("check", "r.yaml", "--show", "0", "data.max_length=9")
    assert (before.code, before.err) == (behind.code, behind.err) == (3, before.err)
    assert "max_length 9" in behind.err


@pytest.mark.parametrize(("words", "spoiled", "code", "message"), CARELESS.values(), ids=CARELESS)
def test_a_careless_user_is_told_what_is_wrong_and_nothing_is_left_behind(words, spoiled, code, message, here, trimtab):
    if spoiled:
        spoiled(here)
    before = tree(here)
    done = trimtab(*words.split(" "))
    assert re.sub(r"\d+ tokens", "TOKENS tokens", done.err) == f"trimtab: {message}\n"
    assert done.code == code
    assert done.out == "" or words.startswith("train")
    assert tree(here) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "trian r.yaml",
            f"argument COMMAND: invalid choice: 'trian' (choose from {NAMES}). Did you mean 'train'?",
        ),
        ("train r.yaml --lr 1e-4", "unrecognized arguments: --lr 1e-4. Keys of the recipe are given as words: train.lr=1e-4"),
        (
            "train r.yaml --train.lr=1e-4",
            "unrecognized arguments: --train.lr=1e-4. Keys of the recipe are given as words: train.lr=1e-4",
        ),
        (
            "train r.yaml --max-steps 9",
            "unrecognized arguments: --max-steps 9. Keys of the recipe are given as words: train.max_steps=9",
        ),
        ("show run key=value", "unrecognized arguments: key=value"),
        ("combine run out", "argument TARGET=WEIGHT: expected a folder and its weight, such as runs/first=0.5, got 'run'"),
        (
            "combine run=much out",
            "argument TARGET=WEIGHT: expected a folder and its weight, such as runs/first=0.5, got 'run=much'",
        ),
        ("chat run --max-new-tokens 0", "argument --max-new-tokens: expected a whole number from 1 to 4294967295, got '0'"),
        (
            "chat run --max-new-tokens many",
            "argument --max-new-tokens: expected a whole number from 1 to 4294967295, got 'many'",
        ),
        ("chat run --temperature hot", "argument --temperature: expected a number of at least 0, got 'hot'"),
        ("chat run --temperature nan", "argument --temperature: expected a number of at least 0, got 'nan'"),
        ("chat run --top-k -1", "argument --top-k: expected a whole number from 0 to 4294967295, got '-1'"),
        ("chat run --seed -1", "argument --seed: expected a whole number from 0 to 4294967295, got '-1'"),
        ("eval run --show -3", "argument --show: expected a whole number from 0 to 4294967295, got '-3'"),
        (
            "train r.yaml --train.lr=3",
            "unrecognized arguments: --train.lr=3. Keys of the recipe are given as words: train.lr=3",
        ),
        ("merge run", "the following arguments are required: FOLDER"),
    ],
)
def test_a_command_that_is_none_is_refused(words, message, here, trimtab):
    before = tree(here)
    done = trimtab(*words.split())
    assert done.code == 2
    assert done.err.splitlines()[-1].endswith(f"error: {message}")
    assert tree(here) == before


def test_the_real_command_fails_without_a_traceback_unless_it_is_asked_for(here, trimtab):
    done = command("show", "nope", cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "trimtab: nope: no such folder.\n")
    with pytest.raises(RecipeError):  # and Python shows its traceback
        trimtab("show", "nope", "--debug")


# Disks


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def test_a_disk_that_is_full_from_the_start_leaves_nothing(disk, here, trimtab):
    (disk / "filler").write_bytes(bytes(256 * 1024))
    done = trimtab("train", "r.yaml", f"output={disk}/run")
    assert re.fullmatch(
        rf"trimtab: output: the run needs \d+ MB at most, and 0 MB are free in {disk}/run: free some, or choose another folder\n",
        done.err,
    )
    assert done.code == 6
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_keeps_what_was_whole(disk, here, trimtab, monkeypatch):
    monkeypatch.setattr(preflight, "_disk", lambda *_: Finding("disk", "good", "it is filled while the run goes on"))
    done = trimtab("train", "r.yaml", f"output={disk}/run", "method.rank=256", "train.epochs=1")
    folder = disk / "run"
    assert re.fullmatch(
        rf"trimtab: {folder}/checkpoints/step-000001: cannot write: Error while serializing: I/O error: No space left on device "
        r"\(os error 28\)\. 0\.\d MB are free there: free some, or choose another folder\.\n",
        done.err,
    )
    assert done.code == 6
    assert state_of(folder)["status"] == "failed"
    assert state_of(folder)["error"] == done.err.removeprefix("trimtab: ").rstrip()
    assert sorted(tree(disk)) == [
        f"run{name}"
        for name in ("", "/checkpoints", "/data.json", "/lock", "/metrics.jsonl", "/recipe.yaml", "/report.html", "/run.json")
    ]
    assert trimtab("show", folder).code == 0
    assert "ended by an error" in trimtab("show", folder).out


def test_a_merge_that_does_not_fit_leaves_nothing(disk, here, trimtab):
    (disk / "filler").write_bytes(bytes(200_000))
    done = trimtab("merge", "--force", "run", disk / "merged")
    assert done.code == 6
    assert done.err.startswith(f"trimtab: {disk}/merged")
    assert "No space left on device" in done.err
    assert files.TEMPORARY not in done.err
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_disk_that_can_only_be_read_is_named(disk, here, trimtab):
    make_read_only(disk)
    done = trimtab("train", "r.yaml", f"output={disk}/run")
    assert done.err == f"trimtab: {disk}/run: cannot write: Read-only file system. Choose a folder that you may write to.\n"
    assert done.code == 6
    done = trimtab("merge", "--force", "run", disk / "run")
    assert done.err == f"trimtab: {disk}/run: cannot write: Read-only file system. Choose a folder that you may write to.\n"
    assert done.code == 6


def test_an_output_that_cannot_be_written_out_is_an_error(here, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["show", "run", "--json"]) == 6
    assert capfd.readouterr().err == "trimtab: standard output: No space left on device.\n"


def test_a_reader_that_leaves_is_no_error(here):
    done = subprocess.run(
        f"{sys.executable} -m trimtab show run --json | head -n 1", shell=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


# The way it is meant to be used


def test_a_run_from_beginning_to_end(world, here, trimtab):
    """Trained by the real command in the fixture; the rest here."""
    said = (here / "said.txt").read_text()
    for part in (
        "37,792 parameters, frozen",
        "30 examples: 30 used, 0 rejected",
        "26 training examples (",
        "target tokens), 4 validation",
        "26 steps of 8 examples in 8 epochs, learning rate 0.02",
    ):
        assert part in said
    assert said.endswith(
        "adapter     step 26, in run/adapter\nChat with it:    trimtab chat run\nLook inside:     trimtab show run\n"
        "Read the report: run/report.html\n"
    )
    assert sorted(path.name for path in (here / "run").iterdir()) == [
        "adapter", "checkpoints", "data.json", "losses.json", "metrics.jsonl", "recipe.yaml", "report.html", "run.json",
    ]  # fmt: skip
    assert not any(files.TEMPORARY in path for path in tree(here))

    state = json.loads(trimtab("show", "run", "--json").out)
    assert state["status"] == "done"
    assert state["adapter"]["verified"] is True
    assert state["best"]["step"] == state["last"]["step"] == 26
    assert state["best"]["eval_loss"] < 1.5
    steps = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["kind"] == "train"]
    assert state["tokens"] == sum(step["tokens"] for step in steps)
    assert 0 < state["computed_tokens"] == sum(step["computed"] for step in steps) < state["tokens"]
    assert f"tokens      {state['tokens']:,} tokens, {state['computed_tokens']:,} processed" in said
    page = trimtab("show", "run").out
    assert f"{state['tokens']:,}, {state['computed_tokens']:,} processed" in page
    assert page.splitlines()[0].split() == ["run", "run:", "done,", "without", "a", "certificate"]
    assert "trimtab chat run" in page
    assert "every hash in its manifest" in page
    assert trimtab("show", "run/adapter").code == trimtab("show", "run/checkpoints/step-000026").code == 0

    scores = json.loads(trimtab("eval", "run", "--json").out)
    assert list(scores) == [
        "data", "eval", "rows", "loss", "loss_interval", "perplexity", "metrics", "exact_match", "exact_match_interval", "stopped",
        "cut_by_context", "answers",
    ]  # fmt: skip
    assert scores["data"] == "held-out examples of run"
    assert scores["rows"] == 4
    assert scores["loss"] == pytest.approx(state["best"]["eval_loss"], rel=1e-6)
    compared = json.loads(trimtab("eval", "run", "--json", "--base", "--data", "rows.jsonl").out)
    assert compared["rows"] == compared["base"]["rows"] == 30
    assert compared["loss"] < compared["base"]["loss"] - 3
    table = trimtab("eval", "run", "--base", "--show", "2").out
    assert "held-out examples of run: 4 examples, 95 % intervals" in table
    assert "Is " in table

    question = ("--prompt", ROWS[3]["prompt"])
    answered = trimtab("chat", "run", *question)
    assert (answered.code, answered.err) == (0, "")
    assert answered.out == "yes\n"
    both = trimtab("chat", "run", "--base", *question).out
    assert both.startswith("[base] ")
    assert both.endswith(f"[adapter] {answered.out}")
    assert not both.startswith(f"[base] {answered.out}")

    merged = trimtab("merge", "--force", "run", "merged")
    assert (merged.code, merged.err) == (0, "")
    assert merged.out.startswith(
        "Merged 14 matrices into merged (float32). Loaded again by Transformers, its logits differ from "
    )
    assert merged.out.endswith("the most likely token is the same at 100.0% of positions.\n")
    assert trimtab("chat", "merged", *question).out == answered.out


def test_a_conversation_goes_on_until_it_is_ended(here, trimtab, monkeypatch):
    asked, answer = [], api.stream

    def listening(base, talk, **settings):
        asked.append([(m["role"], m["content"]) for m in talk])
        return answer(base, talk, **settings)

    monkeypatch.setattr(api, "stream", listening)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is 3 even?\n\nIs 4 even?\n/new\nIs 5 even?\n/quit\nIs 6 even?\n"))
    done = trimtab("chat", "run", "--system", "Be short.", "--max-new-tokens", "4")
    assert (done.code, done.err) == (0, "")
    assert [[content for _, content in talk if content.startswith(("Is", "Be"))] for talk in asked] == [
        ["Be short.", "Is 3 even?"],
        ["Be short.", "Is 3 even?", "Is 4 even?"],
        ["Be short.", "Is 5 even?"],
    ]
    assert all(talk[0] == ("system", "Be short.") for talk in asked)
    assert [role for role, _ in asked[1]] == ["system", "user", "assistant", "user"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert trimtab("chat", "run").code == 0  # the end of the input ends it


def test_a_model_without_a_template_continues_a_text_and_forgets_it(here, trimtab, monkeypatch):
    assert trimtab("chat", "plain", "--prompt", "Is 3", "--max-new-tokens", "3").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is 3\nIs 4\n/quit\n"))
    done = trimtab("chat", "plain", "--max-new-tokens", "3")
    assert (done.code, done.err) == (0, 2 * "trimtab: the answer was cut off after 3 tokens (--max-new-tokens).\n")


def test_the_runs_recipe_repeats_the_run_to_the_last_bit_from_anywhere(world, here, trimtab, monkeypatch):
    """The first was made by another process, from a relative recipe."""
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert trimtab("train", world / "run" / "recipe.yaml", f"output={elsewhere}/again").code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "trimtab.json"):
        assert (elsewhere / "again" / "adapter" / name).read_bytes() == (world / "run" / "adapter" / name).read_bytes(), name
    before, after = (Recipe.read(run / "recipe.yaml") for run in (world / "run", elsewhere / "again"))
    assert after == before.model_copy(update={"output": elsewhere / "again"})
    assert (elsewhere / "again" / "data.json").read_bytes() == (world / "run" / "data.json").read_bytes()
    done = trimtab("train", here / "run" / "recipe.yaml", f"output={elsewhere}/other", "train.seed=1")
    assert done.code == 0
    assert not torch.equal(tensors(elsewhere / "other" / "adapter")[A], tensors(elsewhere / "again" / "adapter")[A])


def test_the_held_out_rows_are_found_again_from_anywhere(here, trimtab, monkeypatch):
    loss = json.loads(trimtab("eval", "run", "--json").out)["loss"]
    monkeypatch.chdir("/")
    done = trimtab("eval", here / "run", "--json")
    assert done.code == 0
    assert json.loads(done.out)["loss"] == loss


def test_what_was_trained_in_bfloat16_is_used_in_bfloat16(here, trimtab):
    assert trimtab("train", "r.yaml", "output=new", "model.dtype=bfloat16", "train.epochs=1").code == 0
    assert trimtab("chat", "new", "--prompt", "x", "--max-new-tokens", "2").err == ""
    assert trimtab("eval", "new", "--json").err == ""
    assert trimtab("merge", "--force", "new", "merged").err == ""


def test_an_empty_folder_that_is_there_is_filled(here, trimtab):
    (here / "new").mkdir()
    assert trimtab("train", "r.yaml", "output=new", "train.epochs=1").code == 0
    assert (here / "new" / "adapter").is_dir()


@pytest.mark.parametrize("name", ["a [b] c", "[bold]x[/]", "ä 中 '", "[/]", "a\\"])
def test_a_folder_may_have_any_name(name, here, trimtab):
    done = trimtab("train", "r.yaml", f"output={json.dumps(name, ensure_ascii=False)}", "train.epochs=1")
    assert (done.code, done.err) == (0, "")
    adapter, chat, show, report = done.out.splitlines()[-4:]
    assert adapter.endswith(f"in {name}/adapter")
    assert chat == f"Chat with it:    trimtab chat {shlex.quote(name)}"
    assert show == f"Look inside:     trimtab show {shlex.quote(name)}"
    assert report == f"Read the report: {name}/report.html"
    assert f"{name}/report.html" in trimtab("show", name).out
    assert trimtab("report", name).out == f"Read the report: {name}/report.html\n"
    merged = trimtab("merge", "--force", name, f"{name} merged")
    assert f"into {name} merged (float32)" in merged.out


def test_other_rows_are_read_as_the_runs_own_were(here, trimtab):
    """With its columns, or by their names; and the advice for rows that are called otherwise works as it is printed."""
    write_rows(here / "own.jsonl", [{"asked": f"Is {n} a number?", "said": "yes", "images": "x"} for n in range(30)])
    write_rows(here / "odd.jsonl", [{"q": f"Is {n} a number?", "a": "yes"} for n in range(5)])
    columns = "data.columns={prompt: asked, completion: said}"
    done = trimtab("train", "r.yaml", "data.train=own.jsonl", columns, "data.ignore=[images]", "output=new", "train.epochs=0.3")
    assert done.code == 0, done.err
    write_rows(here / "more.jsonl", [{"asked": "Is 3 a number?", "said": "yes", "images": "y"}] * 3)
    for data, rows in (("more.jsonl", 3), ("rows.jsonl", 30)):
        done = trimtab("eval", "new", "--data", data, "--json")
        assert (done.code, json.loads(done.out or "{}").get("rows")) == (0, rows), done.err
    refused = trimtab("eval", "new", "--data", "odd.jsonl")
    assert refused.code == 3
    assert "odd.jsonl:1: has no column 'asked', which data.columns says is the prompt; it has q, a" in refused.err
    for target in ("new", "run", "run/adapter", "tiny"):
        words = ["--data", "odd.jsonl", "data.columns={prompt: q, completion: a}", "--json"]
        done = trimtab("eval", target, *words)
        assert (done.code, json.loads(done.out or "{}").get("rows")) == (0, 5), done.err
    refused = trimtab("eval", "run", "--data", "odd.jsonl")
    advice = re.findall(r"data\.columns\S*=\S+", refused.err.replace(")", ""))
    assert (refused.code, bool(advice)) == (3, True), refused.err
    refused = trimtab("eval", "run", "--data", "rows.jsonl", "train.lr=3")
    assert (refused.code, refused.err) == (
        2,
        "trimtab: train.lr=3: of a recipe's keys, eval takes only data.columns, data.prompt, data.completion, data.system, "
        "data.drop_system, data.ignore, data.train_on, and of eval: temperature, top_p, top_k, repetition_penalty, stop, seed, "
        "metrics, function, max_new_tokens.\n",
    )  # fmt: skip
    refused = trimtab("eval", "run", "data.ignore=[x]")
    assert (refused.code, "says how the examples of a file are read, and a run's own are read as they were" in refused.err) == (
        2,
        True,
    )


def test_metrics_and_settings_are_the_runs_unless_words_say_otherwise(here, trimtab):
    plain = json.loads(trimtab("eval", "run", "--json").out)
    words = ("eval.metrics=[f1,{name: regex, pattern: '.'}]", "eval.max_new_tokens=2", "eval.repetition_penalty=1.5")
    done = trimtab("eval", "run", "--json", "--base", *words)
    found = json.loads(done.out)
    assert (plain["metrics"], found["metrics"]) == ({"exact_match": 1.0}, {"f1": 1.0, "regex": 1.0, "regex_found": 1.0})
    assert found["eval"] == plain["eval"] | {
        "metrics": [{"name": "f1"}, {"name": "regex", "pattern": ".", "match": "first"}], "max_new_tokens": 2, "repetition_penalty": 1.5,
    }  # fmt: skip
    assert max(answer["tokens"] for answer in found["answers"]) <= 2
    assert found["difference"].keys() == {"loss", "f1", "regex", "regex_found"}
    assert found["difference"]["loss"]["value"] == pytest.approx(found["loss"] - found["base"]["loss"])
    assert json.loads(trimtab("eval", "run", "--json", "eval.metrics=[]").out)["answers"] == []
    refused = trimtab("eval", "run", "eval.metrics=[]", "--show", "1")
    assert (refused.code, refused.err) == (2, "trimtab: --show: with eval.metrics=[], no answers are generated.\n")
    refused = trimtab("eval", "run", "eval.metrics=[rogue]")
    assert (refused.code, "eval.metrics.0.name: no such choice: 'rogue'. Did you mean 'rouge'?" in refused.err) == (2, True)
    table = trimtab("eval", "run", "--base", "eval.metrics=[f1]").out
    assert "difference" in table
    assert "not distinguishable" in table


def test_a_function_that_a_run_names_is_executed_only_if_the_user_names_it(here, trimtab):
    shutil.copytree(here / "run", here / "sent")
    (here / "own.py").write_text("open('ran', 'w').close()\ndef own(answer, expected):\n    return answer.index('never')\n")
    recipe = (here / "sent" / "recipe.yaml").read_text()
    (here / "sent" / "recipe.yaml").write_text(recipe.replace("function: null", f"function: {here / 'own.py'}:own"))
    done = trimtab("eval", "sent", "--json")
    assert (done.code, (here / "ran").exists(), "function_error" in json.loads(done.out)) == (0, False, False)
    assert "names the function HERE/own.py:own, which is not executed" in done.err
    done = trimtab("eval", "sent", "--json", "eval.function=own.py:own")
    assert (done.code, (here / "ran").exists()) == (2, True)
    assert "eval.function: executing HERE/own.py (sha256 " in done.err
    found = json.loads(done.out)
    assert len(found["answers"]) == found["rows"]
    assert "own failed on HERE/rows.jsonl:" in done.err
    assert done.err.splitlines()[-1].startswith("trimtab: eval.function: own failed on ")


# Broken off


def state_of(run):
    return json.loads((run / "run.json").read_text())


GOES_ON = "; the same command resumes from there"


class Interrupting(RunObserver):
    """Presses Ctrl-C when something happens."""

    def __init__(self, when, number=0):
        self.when, self.number = when, number

    def on_plan(self, *_):
        self.press("planned", 0)

    def logged(self, kind, step, values):
        self.press("stepped" if kind == "train" else "evaluated", step)

    def press(self, what, number):
        if (what, number) == (self.when, self.number):
            raise KeyboardInterrupt


def interrupted(output, when, number=0, every=10):
    recipe = Recipe.read(Path("r.yaml"), [f"output={output}", f"train.evaluate_every={every}"])
    with pytest.raises(KeyboardInterrupt) as caught:
        run_recipe(recipe, Interrupting(when, number))
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "times"),
    [(signal.SIGINT, 5), (signal.SIGTERM, 1), (signal.SIGHUP, 2)],
    ids=lambda one: getattr(one, "name", one),
)
def test_a_run_that_is_interrupted_keeps_the_adapter_as_it_stood(number, times, here, trimtab):
    """The real command, and a real signal at no particular moment, or several by an impatient hand."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored, by us and by what we start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup
    words = [
        "train",
        "r.yaml",
        "output=new",
        "train.epochs=2000",
        "train.rows_per_step=2",
        "train.evaluate_every=100000",
        "data.eval=0",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "trimtab", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log = here / "new" / "metrics.jsonl"
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until and not (log.exists() and log.read_text().count("\n") >= 5):
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    state = state_of(here / "new")
    step = state["last"]["step"]
    assert (
        err
        == f"trimtab: interrupted: the adapter after step {step} is in new/checkpoints/step-{step:06d}; the same command resumes from there.\n"
    )
    assert state["status"] == "interrupted"
    assert "Talk to it" not in out
    assert len(log.read_text().splitlines()) == step >= 5
    assert not any(files.TEMPORARY in path for path in tree(here))
    assert trimtab("chat", here / "new" / state["last"]["folder"], "--prompt", "x", "--max-new-tokens", "2").code == 0
    assert f"new: interrupted after step {step} of " in trimtab("show", "new").out
    for words in (
        ["chat", "new", "--prompt", "x"],
        ["merge", "--force", "new", "merged"],
        ["eval", "new", "--data", "rows.jsonl", "--json"],
    ):
        done = trimtab(*words)
        said = f"trimtab: new is unfinished: this is its adapter after step {step} of {state['steps']}.\n"
        cut = "trimtab: the answer was cut off because the model's context is full.\n" if words[0] == "chat" else ""
        assert (done.code, done.err) == (0, said + cut)
    assert json.loads(done.out)["rows"] == 30
    done = trimtab("combine", "--force", "new=1", "both")
    assert done.err == (
        "trimtab: new is a run without a finished adapter. Finish it with the command that trains it, or use its newest "
        f"checkpoint: new/checkpoints/step-{step:06d}.\n"
    )
    assert done.code == 4
    assert trimtab("combine", "--force", f"new/checkpoints/step-{step:06d}=1", "both").code == 0
    shutil.rmtree("new/checkpoints")
    assert trimtab("chat", "new", "--prompt", "x").err == (
        "trimtab: new is a run without a finished adapter. Finish it with the command that trains it.\n"
    )


@pytest.mark.parametrize(
    ("when", "number", "every"), [("stepped", 21, 20), ("evaluated", 20, 10), ("evaluated", 0, 20), ("evaluated", 20, 20)]
)
def test_what_an_interruption_keeps_is_what_the_run_had_after_that_step(when, number, every, here):
    """Step 20 in a run that was interrupted right then, and in one that saved it on its way, or was about to, or just had."""
    assert interrupted("first", "stepped", 20) == "the adapter after step 20 is in first/checkpoints/step-000020" + GOES_ON
    step = max(number, 20)
    assert (
        interrupted("second", when, number, every)
        == f"the adapter after step {step} is in second/checkpoints/step-{step:06d}{GOES_ON}"
    )
    assert_same_tensors(tensors(here / "first/checkpoints/step-000020"), tensors(here / "second/checkpoints/step-000020"))
    if step == 21:
        assert not torch.equal(
            tensors(here / "second/checkpoints/step-000021")[A], tensors(here / "first/checkpoints/step-000020")[A]
        )


@pytest.mark.parametrize("name", ["new", "a [b] c", "it's: new #1"])
def test_a_changed_recipe_is_refused_with_a_command_that_works_as_it_is_printed(name, here, trimtab):
    interrupted(json.dumps(name), "stepped", 20)
    words = ["train", "r.yaml", "train.lr=1e-3", override("output", name), "train.epochs=1", "data.columns={prompt: prompt}"]
    refused = trimtab(*words)
    assert refused.code == 2
    assert "  train.lr: 0.02 in the run, 0.001 now\n" in refused.err
    command = refused.err.splitlines()[-1]
    assert shlex.split(command) == ["trimtab", *words[:3], *words[4:], override("output", f"{name}-2")]
    assert trimtab(*shlex.split(command)[1:]).code == 0
    refused = trimtab(*shlex.split(command)[1:])
    assert (refused.code, "exists already, as a finished run, and is not overwritten" in refused.err) == (6, True)
    assert shlex.split(refused.err.splitlines()[-1])[-1] == override("output", f"{name}-3")


def test_an_interruption_just_after_saving_finds_the_adapter_saved(here, monkeypatch):
    save = checkpoints.save_adapter

    def saved(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_adapter", saved)
    assert interrupted("new", "nothing") == f"the adapter after step 10 is in new/checkpoints/step-000010{GOES_ON}"
    assert state_of(here / "new")["last"]["step"] == 10


@pytest.mark.parametrize("written", [False, True])
def test_an_interruption_while_the_state_is_written_loses_nothing(written, here, monkeypatch):
    """It is then written again; what is said to have been saved has been."""
    write, calls = checkpoints.write_state, []

    def interrupted_once(states, state):
        calls.append(state.step)
        folder = write(states, state) if written or len(calls) != 2 else None
        if len(calls) == 2:
            raise KeyboardInterrupt
        return folder

    monkeypatch.setattr(checkpoints, "write_state", interrupted_once)
    assert interrupted("new", "nothing") == f"the adapter after step 20 is in new/checkpoints/step-000020{GOES_ON}"
    assert calls == [10, 20, 20]
    assert [path.name for path in saved_states(here / "new" / "states")] == ["step-000020", "step-000010"]
    assert [state_of(here / "new")[which]["step"] for which in ("last", "best")] == [20, 20], "whose loss has been measured"


def test_an_interruption_of_an_update_says_what_was_saved_before(here, monkeypatch):
    step, taken = torch.optim.AdamW.step, []

    def interrupts(*given):
        taken.append(1)
        if len(taken) == 15:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupts)
    assert interrupted("new", "nothing") == f"the adapter after step 10 is in new/checkpoints/step-000010{GOES_ON}"


def test_an_interruption_before_the_first_step_has_nothing_to_keep(here, monkeypatch):
    before = tree(here)
    assert interrupted("new", "planned") == ""
    assert tree(here) == before

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    assert interrupted("new", "nothing") == "nothing has been saved yet; the same command starts again"
    assert state_of(here / "new")["status"] == "interrupted"
    assert not (here / "new" / "checkpoints").exists()


def test_a_run_that_blows_up_says_which_step_and_keeps_what_was_saved(here, trimtab):
    words = ("train.lr=1e30", "train.warmup=0", "train.clip=null", "data.eval=0", "train.evaluate_every=1")
    done = trimtab("train", "r.yaml", "output=new", *words)
    assert done.code == 5
    assert re.match(
        r"trimtab: After step \d+, the model gives .*rows\.jsonl:\d+ a log-probability of NaN or Inf, so it is not saved\.",
        done.err,
    )
    assert done.err.endswith("Lower train.lr.\n")
    state = state_of(here / "new")
    assert state["status"] == "failed"
    assert state["error"].replace(str(here), "HERE") == done.err.removeprefix("trimtab: ").rstrip("\n")
    assert not any((here / "new" / name).exists() for name in ("adapter", "checkpoints", "states"))
    done = trimtab("train", "r.yaml", "output=newer", *words[:3], "train.evaluate_every=1")  # its held-out rows show it first
    assert done.code == 5
    assert re.fullmatch(
        r"trimtab: The loss on .*rows\.jsonl:\d+ is not finite: the weights of the model or of an adapter are broken\.\n",
        done.err,
    )


# Quick to start


def test_help_is_quick_and_imports_nothing_heavy(here):
    times = []
    for words in (
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["eval", "--help"],
        ["chat", "--help"],
        ["merge", "--help"],
        ["show", "--help"],
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-X", "importtime", "-m", "trimtab", *words], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert done.stdout.startswith(("usage: trimtab", "trimtab 0."))
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "trimtab" in imported
        assert not imported & {"torch", "transformers", "numpy", "pydantic", "yaml", "rich", "safetensors", "huggingface_hub"}
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_every_error_has_the_exit_code_that_the_command_returns(here, monkeypatch, trimtab):
    def kinds(kind):
        yield kind
        for inner in kind.__subclasses__():
            yield from kinds(inner)

    for kind in kinds(TrimtabError):

        def fail(*_, kind=kind):
            raise kind("a message [with] odd {characters}")

        monkeypatch.setattr(commands.show, "run", fail)
        done = trimtab("show", "run")
        assert (done.code, done.err) == (kind.exit_code, "trimtab: a message [with] odd {characters}\n")
    assert {kind.exit_code for kind in kinds(TrimtabError)} == {1, 2, 3, 4, 5, 6, 7}


def test_an_adapter_goes_onto_the_base_that_is_given(here):
    assert load_model("run", "tiny").base.source == str(here / "tiny")


def test_a_base_that_has_moved_is_named_by_model(here, trimtab):
    assert trimtab("train", "r.yaml", "output=new", "train.epochs=1").code == 0
    (here / "tiny").rename(here / "moved")
    for words in (
        ["chat", "new", "--prompt", "x", "--max-new-tokens", 1],
        ["merge", "--force", "new", "merged"],
        ["verify", "new/adapter"],
    ):
        done = trimtab(*words)
        assert (done.code, "was trained on HERE/tiny, which is no longer there" in done.err) == (
            7 if words[0] == "verify" else 2,
            True,
        ), done.err
        assert "--model FOLDER" in done.err
        assert trimtab(*words, "--model", "moved").code == 0


def test_methods_lists_what_each_would_train_on_a_model(here, trimtab):
    listed = json.loads(trimtab("methods", "./tiny", "--json").out)["methods"]
    assert [one["name"] for one in listed] == Method.names()
    model = Base.load("./tiny").model
    for one in listed:
        assert set(one) == {
            "name",
            "summary",
            "parameters",
            "refused",
            "mergeable",
            "identity_at_init",
            "positions",
            "objectives",
            "peft",
        }
        assert (one["parameters"] is None) == (one["refused"] is not None)
        assert one["objectives"] == ["cpo", "dpo", "kto", "orpo", "sft", "simpo"]
        if one["refused"] is None:
            assert one["parameters"] == Method.pick(one["name"]).parameter_count(model)
    by_name = {one["name"]: one for one in listed}
    assert (by_name["lora"]["mergeable"], by_name["lora"]["positions"], by_name["lora"]["peft"]) == (True, 0, "LORA")
    assert (by_name["prefix"]["mergeable"], by_name["prefix"]["positions"]) == (False, 20)
    page = trimtab("methods", "./tiny")
    assert (page.code, page.err) == (0, "")
    assert f"{by_name['lora']['parameters']:,}" in page.out
    assert trimtab("methods", "nowhere").code == 2


def test_methods_says_which_modules_a_recipe_would_replace_without_reading_weights(here, trimtab):
    (here / "tiny" / "model.safetensors").write_bytes(b"not read")
    words = ("method.rank=3", "method.targets=[q_proj, mlp.down_proj]", "method.ranks={layers.0.mlp.down_proj: 2}")
    facts = json.loads(trimtab("methods", "tiny", *words, "--json").out)
    adapter = attach(Base.load(str(here / "plain")).model, Method.pick(facts["method"]))
    assert facts["parameters"] == sum(p.numel() for p in adapter.parameters().values())
    assert {one["module"]: one["tensors"] for one in facts["replaced"]} == {
        path: {name: list(p.shape) for name, p in layer.own_parameters().items()} for path, layer in adapter.layers.items()
    }
    page = trimtab("methods", "tiny", *words).out
    assert "lora on tiny: rank 3" in page
    assert re.search(
        r"model\.layers\.\[0-1\]\.self_attn\.q_proj \(Linear 32→32\) +2 · 192 = 384\n  A 3×32, B 32×3: 3·\(32 \+ 32\) = 192",
        page,
    )
    assert re.search(r"model\.layers\.0\.mlp\.down_proj \(Linear 64→32\) +1 · 192 = 192\n  A 2×64, B 32×2", page)
    assert page.rstrip().endswith(f"= {facts['parameters']:,}")
    assert trimtab("methods", "r.yaml", "method=prefix", "method.tokens=5").out.startswith("prefix on ")
    assert max(map(len, trimtab("methods", "tiny").out.splitlines())) <= 80
    for words, message in (
        (["tiny", "method.targets=[qproj]"], "targets: 'qproj' matches no module"),
        (["tiny", "method.rnk=3"], "method.rnk: no such key. Did you mean 'rank'?"),
        (["tiny", "plain"], "methods: expected one model, got tiny and plain."),
        (["nowhere/at-all/", "method=ia3"], "no such file or folder"),
    ):
        done = trimtab("methods", *words)
        assert (done.code, message in done.err) == (2, True), done.err


@pytest.mark.parametrize("name", Method.names())
def test_every_method_can_be_looked_at_on_a_model_without_values(name, here, trimtab):
    facts = trimtab(
        "methods", "tiny", f"method={name}", *{"tokens": ["method.tokens=[a]"], "miss": ["method.rank=8"]}.get(name, [])
    )
    assert (facts.code, facts.err) == (0, "")
    assert "trainable params: " in facts.out


def test_combine_makes_one_adapter_of_several(here, trimtab):
    done = trimtab("combine", "--force", "run=0.5", "run=0.5", "both")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("both is exactly their weighted sum: lora, rank ")
    question = ("--prompt", ROWS[3]["prompt"])
    assert trimtab("chat", "both", *question).out == trimtab("chat", "run", *question).out
    assert "its weighted" not in trimtab("combine", "--force", "run=1", "half", "--rank", "1").out
    assert "their weighted sum with an error of " in trimtab("combine", "--force", "run=1", "small", "--rank", "1").out
    for words, code, message in (
        ("combine run=1 both", 6, "exists already"),
        ("combine tiny=1 new", 2, "tiny is neither a run nor an adapter folder, so it has nothing to combine."),
        ("combine nowhere=1 new", 2, "nowhere is neither a run nor an adapter folder"),
    ):
        refused = trimtab(*words.split())
        assert (refused.code, message in refused.err) == (code, True), refused.err
        assert not (here / "new").exists()
