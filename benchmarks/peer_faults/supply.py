"""F01-F07: files of others, and other versions."""

import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from harness import Found, Refused, injected, refusal, trial
from merging import generated_and_forward
from tiny import ROWS, adapted, chat, hf, llama, saved, sft, tokenizer, trained
from trl.trainer.utils import print_prompt_completions_sample

WEIGHTS = "adapter_model.safetensors"
PATIENCE_S = 5


class Payload:
    """What runs when a pickle of it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def _judged(refusals: dict[str, str | None], what: str) -> Found:
    """Refused if everything was; otherwise what was taken."""
    taken = [name for name, said in refusals.items() if said is None]
    if not taken:
        raise Refused(f"{len(refusals)} of {len(refusals)}: {next(iter(refusals.values()))}")
    return Found(True, f"{what}: {', '.join(taken)}")


@trial("F01", "PEFT, HF Trainer", r"pickle|weights_only|unsafe")
def pickle_runs_code(folder: Path) -> Found:
    hf(folder, adapted(llama()), ROWS, max_steps=1, save_strategy="steps", save_steps=1).train()
    refusals = {}
    for name in ("adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        place = shutil.copytree(folder / "run" / "checkpoint-1", folder / name / "checkpoint-1")
        torch.save({"x": Payload()}, place / name)
        if name == "adapter_model.bin":
            (place / WEIGHTS).unlink()
        goes_on = hf(folder / name, adapted(llama()), ROWS, max_steps=2)
        said = refusal(lambda run=goes_on, cut=place: run.train(resume_from_checkpoint=str(cut)))
        refusals[name] = None if (folder / "ran").exists() else said or "it is not read"
    return _judged(refusals, "code in these has run")


@trial("F02", "PEFT", r"import|security|megatron")
def configuration_runs_code(folder: Path) -> Found:
    saved(folder / "adapter", trained())
    (folder / "payload.py").write_text('open("ran", "w")\n', encoding="utf-8")
    sys.path.insert(0, str(folder))  # as where a script or a notebook runs
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"megatron_config": {"x": 1}, "megatron_core": "payload"}))
    with injected():
        peft.PeftModel.from_pretrained(llama(), str(folder / "adapter"))
    return Found((folder / "ran").exists(), "a module that the configuration names is imported")


@trial("F03", "Transformers", r"trust_remote_code|custom code")
def model_folder_runs_code(folder: Path) -> Found:
    model = folder / "model"
    model.mkdir()
    (model / "other.py").write_text(f'open({str(folder / "ran")!r}, "w")\n', encoding="utf-8")
    auto = {"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.OtherModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto}), encoding="utf-8")
    with injected():
        transformers.AutoModelForCausalLM.from_pretrained(model)
    return Found((folder / "ran").exists(), "code in the folder has run")


class Endless(Exception):
    """The template is still being rendered."""


@contextmanager
def _patience() -> Iterator[None]:
    def enough(*_: Any) -> None:
        raise Endless

    signal.signal(signal.SIGALRM, enough)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@trial("F04", "Transformers", r"template|sandbox|limit")
def template_runs_for_ever(folder: Path) -> Found:
    question = chat("hello")["messages"]
    python = refusal(lambda: tokenizer("{{ ''.__class__.__mro__ }}").apply_chat_template(question, tokenize=False))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    try:
        with injected(), _patience():
            tokenizer(loops).apply_chat_template(question, tokenize=False)
        endless = False
    except Endless:
        endless = True
    said = "reaching for Python is refused" if python else "a template reaches Python's classes"
    loops = f"still run after {PATIENCE_S} s" if endless else "end"
    return Found(python is None or endless, f"{said}; two loops, one in the other, {loops}")


def _malformed(content: bytes) -> dict[str, bytes]:
    """A file of tensors, broken in its structure in several ways."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    first, second = [name for name in header if name != "__metadata__"][:2]

    def file(changed: dict[str, Any], rest: bytes = data) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + rest

    def entry(**changes: Any) -> dict[str, Any]:
        return header | {first: header[first] | changes}

    return {
        "cut": content[:-100],
        "empty": b"",
        "longer": content + b"more",
        "a header without end": (1 << 40).to_bytes(8, "little") + content[8:],
        "a header that is no JSON": content[:8] + b"x" + content[9:],
        "another shape": file(entry(shape=[1, 1])),
        "an unknown type": file(entry(dtype="F33")),
        "offsets outside": file(entry(data_offsets=[0, 1 << 40])),
        "overlapping tensors": file(entry(data_offsets=header[second]["data_offsets"])),
    }


@trial("F05", "PEFT", r"header|invalid|corrupt")
def malformed_file_of_tensors(folder: Path) -> Found:
    path = Path(saved(folder, trained())) / WEIGHTS
    refusals = {}
    for name, content in _malformed(path.read_bytes()).items():
        path.write_bytes(content)
        refusals[name] = refusal(lambda: peft.PeftModel.from_pretrained(llama(), str(folder)))
    return _judged(refusals, "loaded")


@trial("F06", "TRL SFTTrainer, datasets", r"cache|checksum|hash|corrupt")
def cache_is_trusted(folder: Path) -> Found:
    (folder / "rows.json").write_text('{"text": "hello world"}\n{"text": "the answer is 42"}\n', encoding="utf-8")

    def tokens() -> list[int]:
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.json"), split="train")
        return sft(folder, adapted(llama()), rows).train_dataset[0]["input_ids"]

    first, changed = tokens(), 0
    other = [token + 1 for token in first]
    for path in Path(os.environ["HF_HOME"]).rglob("*.arrow"):
        content = path.read_bytes()
        new = content
        for kind in ("<i4", "<i8"):
            new = new.replace(np.array(first, kind).tobytes(), np.array(other, kind).tobytes())
        if new != content:
            path.write_bytes(new)
            changed += 1
    assert changed, "no cache holds the tokens"
    with injected():
        again = tokens()
    return Found(again != first, "tokens that were changed in the cache are what is learned next")


@trial("F07", "PEFT prompt tuning, Transformers", r"version .*(requir|support)|incompatib|upgrade|ignoring deprecated")
def another_version_breaks_a_method(folder: Path) -> Found:
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)).eval()
    with injected():
        cached, whole, _ = generated_and_forward(model)
    off = float((cached - whole).abs().max())
    asked = next(line for line in importlib.metadata.requires("peft") or () if line.startswith("transformers"))
    return Found(off > 1e-3, f'PEFT asks for "{asked}"; with this one, cached decoding is {off:.2g} from the forward pass')


@trial("F08", "TRL's command", r"\brandom\b|import|working directory")
def file_beside_it_is_imported(folder: Path) -> Found:
    saved(folder / "base", llama())
    saved(folder / "base", tokenizer())
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text('{"text": "hello"}\n' * 8, encoding="utf-8")
    (folder / "random.py").write_text(f'open({str(folder / "ran")!r}, "w")\n', encoding="utf-8")
    command = [str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", "base", "--dataset_name", "rows"]
    settings = ["--output_dir", "run", "--max_steps", "1", "--use_cpu", "--report_to", "none", "--bf16", "false", "--use_peft"]
    done = subprocess.run([*command, *settings], cwd=folder, capture_output=True, text=True, check=False)
    ran = (folder / "ran").exists()
    assert ran or done.returncode == 0, done.stderr
    return Found(ran, f"`trl sft` in a folder with a file random.py {'imports it' if ran else 'leaves it alone'}")


@trial("F09", "TRL, log_completions", r"control|escape")
def text_steers_the_terminal(folder: Path) -> Found:
    with injected(), redirect_stdout(io.StringIO()) as shown:
        print_prompt_completions_sample(["hello"], ["\x1b]0;mine\x07\x1b[2J"], {"right": [0.0]}, [0.0], 1)
    raw = sum(code in shown.getvalue() for code in ("\x1b]0;", "\x1b[2J"))
    return Found(raw > 0, f"of a text that sets the terminal's title and clears it, {raw} of 2 codes reach the terminal")
