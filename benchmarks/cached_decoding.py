"""Whether an adapter gives the same logits in cached generation as in a forward pass, in PEFT and in Trimtab, on the real model.

    python benchmarks/cached_decoding.py [--steps 64]

Each method's adapter is made by Trimtab (initialized from real text, then perturbed at random), saved in PEFT's format, and loaded
by both. Both answer one question by greedy decoding with a cache, and the logits of every step are compared with those of one forward
pass over the same tokens. "acts" is how much the adapter changes the base model's logits, in generation and in the forward pass.
Needs `pip install peft`.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trimtab
from trimtab.data import Segment, lay_out
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import Cache, DecodeLayout, PackLayout, PrefillLayout

MODEL = "smollm2-135m-instruct"
QUESTION = "Write three sentences about the sea."
TEXT = "You are a patient teacher. Answer in short and simple words, and never use a list."
METHODS = {"lora": {"rank": 8}, "prefix": {"width": 64}, "ptuning_v2": {}, "prompt": {}, "ptuning": {"width": 64}}


@torch.no_grad()
def of_trimtab(model: Any, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens from Trimtab's cache, and each step's logits."""
    cache, head = Cache(), head_of(model)
    layout = PrefillLayout(lay_out([prompt]), cache, torch.device("cpu"))
    hidden = hidden_states(model, torch.tensor(prompt), torch.arange(len(prompt)), layout)[-1:]
    ids, logits = list(prompt), []
    for _ in range(steps):
        logits.append(head.logits(hidden)[0])
        ids.append(int(logits[-1].argmax()))
        decode = DecodeLayout(cache)
        hidden = hidden_states(model, torch.tensor(ids[-1:]), cache.lengths, decode)
        decode.advance()
    return ids, torch.stack(logits)


@torch.no_grad()
def whole(model: Any, ids: list[int], start: int) -> Tensor:
    """The logits of one forward pass of Trimtab's for what comes after `start` tokens."""
    layout = PackLayout((Segment(0, len(ids), -1),))
    return head_of(model).logits(hidden_states(model, torch.tensor(ids), torch.arange(len(ids)), layout))[start - 1 : -1]


@torch.no_grad()
def of_peft(model: Any, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """The same from PEFT's `generate`, which is Transformers'."""
    row = torch.tensor([prompt])
    out = model.generate(
        input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return prompt + out.sequences[0, -steps:].tolist(), torch.cat(out.logits)


@torch.no_grad()
def whole_of_peft(model: Any, ids: list[int], start: int) -> Tensor:
    row = torch.tensor([ids])
    return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(ids) :][start - 1 : -1]


def compare(name: str, settings: dict[str, Any], steps: int) -> None:
    import peft

    base = trimtab.load(MODEL)
    prompt = base.encode([base.template.render([{"role": "user", "content": QUESTION}], prompt=True)])[0].ids
    rows = base.encode([TEXT])
    adapter = trimtab.attach(base.model, trimtab.method(name, **settings), sample=trimtab.sample(base, rows))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        trimtab.save_adapter(base, adapter, Path(folder) / "adapter")
        theirs = peft.PeftModel.from_pretrained(trimtab.load(MODEL).model, Path(folder) / "adapter").eval()
    found = [("PEFT", *of_peft(theirs, prompt, steps)), ("Trimtab", *of_trimtab(base.model, prompt, steps))]
    for library, ids, decoded in found:
        forced = whole_of_peft(theirs, ids, len(prompt)) if library == "PEFT" else whole(base.model, ids, len(prompt))
        with adapter.disabled():
            bare = whole(base.model, ids, len(prompt))
        error = (decoded - forced).abs().amax(dim=1)
        moved = [float((logits - bare).abs().max()) for logits in (decoded, forced)]
        print(
            f"| {name} | {library} | {float(error[0]):.2g} | {float(error.max()):.2g} | {moved[0]:.2g} | {moved[1]:.2g} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| method | library | cached − forward, first step | largest of all steps | acts in generation | acts in forward |")
    print("|---|---|---|---|---|---|")
    for method, given in METHODS.items():
        compare(method, given, arguments.steps)
