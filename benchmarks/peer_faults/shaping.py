"""A21-A25: settings of an adapter."""

import re
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from harness import Found, Refused, injected, refusal, trial
from tiny import adapted, apart, llama, logits, saved, small, stirred, trained


@trial("A21", "PEFT", r"scal|alpha|rslora")
def another_scale_in_use(folder: Path) -> Found:
    shapes: list[dict[str, Any]] = [
        {}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"v_proj": 64}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 64}},
    ]  # fmt: skip
    worst = 0.0
    with injected():
        for number, shape in enumerate(shapes):
            model = trained(**shape)
            wanted = logits(model)
            again = peft.PeftModel.from_pretrained(llama(), saved(folder / str(number), model)).eval()
            worst = max(worst, apart(logits(again), wanted), apart(logits(again.merge_and_unload()), wanted))
    return Found(
        worst > 1e-4, f"loaded or merged, {len(shapes)} kinds of scale give what training gave, but for {small(worst)}"
    )


IMPOSSIBLE: list[tuple[str, Any]] = [
    ("lora_alpha", 0), ("lora_alpha", -16), ("lora_alpha", float("nan")), ("lora_dropout", -0.5), ("lora_dropout", 1.5),
    ("r", 0), ("r", -8), ("r", 2.5),
]  # fmt: skip


@trial("A22", "PEFT", r"alpha|dropout|range|positive|invalid")
def settings_out_of_range(folder: Path) -> Found:
    refusals = {f"{key}={value}": refusal(lambda k=key, v=value: adapted(llama(), **{k: v})) for key, value in IMPOSSIBLE}
    taken = [setting for setting, said in refusals.items() if said is None]
    if not taken:
        raise Refused(next(iter(refusals.values())) or "")
    with injected():
        idle = stirred(adapted(llama(), lora_alpha=0))
    base = torch.equal(logits(idle), logits(llama()))
    said = "; with lora_alpha=0 the outputs are the base's, to the bit" if base else ""
    return Found(True, f"{len(taken)} of {len(IMPOSSIBLE)} are taken ({', '.join(taken)}){said}")


@trial("A23", "PEFT", r"v_porj|target_modules")
def target_that_matches_nothing(folder: Path) -> Found:
    with injected():
        model = adapted(llama(), target_modules=["q_proj", "v_porj"])
    touched = {path.split(".lora_")[0].rsplit(".", 1)[-1] for path, _ in model.named_parameters() if "lora_" in path}
    return Found(len(touched) < 2, f'of "q_proj" and "v_porj", {" and ".join(sorted(touched))} is adapted')


def _frozen_experts(model: transformers.PreTrainedModel) -> float:
    """The share of a model's parameters that are experts without an adapter, when all linear layers are asked for."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    experts = {path: parameter.numel() for path, parameter in model.named_parameters() if ".experts." in path}
    layer = re.compile(r"layers\.\d+")
    with injected():
        model = adapted(model, target_modules="all-linear")
    reached = {layer.search(path).group() for path, _ in model.named_parameters() if ".experts." in path and "lora_" in path}
    return sum(size for path, size in experts.items() if layer.search(path).group() not in reached) / whole


@trial("A24", "PEFT", r"expert|target_parameters|fused|3-?D|nn\.Parameter")
def experts_stay_frozen(folder: Path) -> Found:
    sizes = {
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
    }  # fmt: skip
    qwen = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=64, num_experts=8)
    oss = transformers.GptOssConfig(**sizes, num_local_experts=8)
    shares = {
        "Qwen3-MoE": _frozen_experts(transformers.Qwen3MoeForCausalLM(qwen)),
        "gpt-oss": _frozen_experts(transformers.GptOssForCausalLM(oss)),
    }
    said = " and ".join(f"{share:.0%} of a tiny {name}" for name, share in shares.items())
    return Found(any(shares.values()), f'with "all-linear", {said} are experts without an adapter')


@trial("A25", "PEFT", r"second time|already")
def two_adapters_on_one_base(folder: Path) -> Found:
    base = llama()
    first = stirred(adapted(base))
    wanted = logits(first)
    with injected():
        adapted(base)
    off = apart(logits(first), wanted)
    return Found(off > 1e-6, f"the first adapter's logits move by {off:.0%} when a second is put on the base")
