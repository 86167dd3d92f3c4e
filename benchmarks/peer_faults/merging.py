"""D01-D10, E03, E06: merging and combining adapters, mixed batches, generation."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from harness import Found, injected, trial
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from tiny import IDS, ROWS, adapted, apart, hf, llama, logits, lora, saved, small, stirred, trained
from torch import Tensor, nn


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _weights(layers: list[Any]) -> Tensor:
    return _flat([layer.get_base_layer().weight for layer in layers])


def _delta(layers: list[Any], name: str = "default") -> Tensor:
    """What an adapter adds to the weights, from its own numbers."""
    pairs = [(layer, layer.lora_B[name].weight.double(), layer.lora_A[name].weight.double()) for layer in layers]
    return _flat([layer.scaling[name] * b @ a for layer, b, a in pairs])


@trial("D01", "PEFT", r"bfloat16|precision|round|lossy")
def merged_in_bfloat16(folder: Path) -> Found:
    model = stirred(adapted(llama().to(torch.bfloat16)), size=0.002)
    layers = _layers(model)
    before, delta = _weights(layers), _delta(layers)
    with injected():
        model.merge_and_unload()
    applied = _weights(layers) - before
    share, lost = float(delta.norm() / before.norm()), float((applied[delta != 0] == 0).double().mean())
    off = apart(applied, delta)
    said = f"{lost:.0%} of the elements are lost, and what is applied is {off:.0%} off"
    return Found(off > 0.01, f"of a change of {share:.1%} of the weights, {said}")


@trial("D02", "PEFT, 4-bit base", r"rounding|4-bit|quantiz")
def merged_into_a_quantized_base(folder: Path) -> Found:
    base = saved(folder / "base", llama())
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = transformers.LlamaForCausalLM.from_pretrained(base, quantization_config=four, device_map={"": "cpu"})
    model = stirred(adapted(quantized), size=0.01)
    layers = _layers(model)
    held = [layer.get_base_layer() for layer in layers]
    before, delta = _flat([dequantize_bnb_weight(layer.weight) for layer in held]), _delta(layers)
    with injected():
        model.merge_and_unload()
    applied = _flat([dequantize_bnb_weight(layer.weight) for layer in held]) - before
    return Found(apart(applied, delta) > 0.01, f"the change that is applied is {apart(applied, delta):.0%} off")


@trial("D04", "PEFT", r"tied|tie_word_embeddings|ensure_weight_tying")
def tied_embeddings_change(folder: Path) -> Found:
    with injected():
        model = stirred(adapted(llama(tie_word_embeddings=True), target_modules=["lm_head"]))
        wanted, ends = logits(model), model.get_input_embeddings().weight.clone()
        merged = model.merge_and_unload()
    moved = apart(merged.get_input_embeddings().weight, ends)
    said = f"the embeddings by {moved:.0%}, and the logits by {apart(logits(merged), wanted):.0%}"
    return Found(moved > 0, f"merging an adapter of the head moves {said}")


def _left_by_merging(kind: torch.dtype, times: int) -> float:
    """The share of a base's weights that are others once an adapter was merged and taken back."""
    model = stirred(adapted(llama().to(kind)), size=0.01)
    before = _weights(_layers(model))
    for _ in range(times):
        model.merge_adapter()
        model.unmerge_adapter()
    return float((_weights(_layers(model)) != before).double().mean())


@trial("D05", "PEFT", r"merg|round|restor")
def merging_and_taking_back(folder: Path) -> Found:
    with injected():
        few, full = _left_by_merging(torch.bfloat16, 1), _left_by_merging(torch.float32, 50)
    said = f"{few:.1%} of a bfloat16 base's weights, and {full:.1%} of a float32 one's after 50 times"
    return Found(max(few, full) > 0, f"others afterwards: {said}")


@trial("D06", "PEFT", r"nan|finite")
def not_a_number_is_merged(folder: Path) -> Found:
    model = trained()
    layer = _layers(model)[0]
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with injected():
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
    lost = int(merged.model.layers[0].self_attn.q_proj.weight.isnan().sum())
    return Found(
        lost > 0, f"one NaN makes {lost} weights NaN, and they are saved (safe_merge, which looks, is not the default)"
    )


@trial("D07", "PEFT add_weighted_adapter", r"approximat|rslora|lossy|scal|rank")
def combination_is_not_the_sum(folder: Path) -> Found:
    pair = peft.get_peft_model(llama(), lora(), adapter_name="a")
    pair.add_adapter("b", lora())
    single = peft.get_peft_model(llama(), lora(use_rslora=True), adapter_name="a")
    for model, name, seed in ((pair, "a", 1), (pair, "b", 2), (single, "a", 1)):
        stirred(model, seed=seed, name=name)
    layers, off = _layers(pair), {}
    wanted = 0.7 * _delta(layers, "a") + 0.3 * _delta(layers, "b")
    with injected():
        for kind in ("svd", "linear", "cat"):
            pair.add_weighted_adapter(["a", "b"], [0.7, 0.3], kind, combination_type=kind)
            off[kind] = apart(_delta(layers, kind), wanted)
        single.add_weighted_adapter(["a"], [1.0], "same")
    alone = apart(_delta(_layers(single), "same"), _delta(_layers(single), "a"))
    said = ", ".join(f"{error:.0%} ({kind})" for kind, error in off.items())
    rest = f"; one with rsLoRA, combined with nothing, by {alone:.0%}"
    return Found(max(*off.values(), alone) > 0.01, f"two adapters' sum is off by {said}{rest}")


@trial("D10", "PEFT", r"merge|prefix")
def prefix_is_merged(folder: Path) -> Found:
    model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)).eval()
    wanted = logits(model)
    with injected():
        merged = model.merge_and_unload()
    return Found(apart(logits(merged), wanted) > 1e-4, "it is merged into something else")


@trial("E03", "PEFT adapter_names", r"adapter_names|mixed")
def rows_of_different_adapters(folder: Path) -> Found:
    names = ["a", "b", "__base__", "a"]
    model = peft.get_peft_model(llama(), lora(), adapter_name="a")
    model.add_adapter("b", lora(lora_alpha=64))
    model = stirred(stirred(model, seed=1, name="a"), seed=2, name="b").eval()
    ids, off = IDS.repeat(2, 1), 0.0
    with injected():
        mixed = logits(model, ids, adapter_names=names)
    for n, name in enumerate(names):
        if name == "__base__":
            alone = logits(llama(), ids[n : n + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, ids[n : n + 1])
        off = max(off, apart(mixed[n : n + 1], alone))
    return Found(off > 1e-5, f"each of {len(names)} rows gets its own adapter, but for {small(off)}")


@trial("E06", "PEFT prefix tuning", r"virtual|prefix|no effect|ignoring deprecated")
def virtual_tokens_do_nothing(folder: Path) -> Found:
    model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)).eval()
    with injected():
        cached, whole, ids = generated_and_forward(model)
    base = logits(llama(), ids)[:, -7:-1]
    idle, moved = float((cached - base).abs().max()), float((whole - base).abs().max())
    said = f"in generate() the logits are {small(idle)} from the base's, in the forward pass {moved:.2g}"
    return Found(float((cached - whole).abs().max()) > 1e-3, said)


def generated_and_forward(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of six tokens after IDS: as cached decoding has them, and as the forward pass has them; and all tokens."""
    out = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), min_new_tokens=6, max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1), logits(model, out.sequences)[:, -7:-1], out.sequences


@trial("D11", "HF Trainer, PEFT", r"worse|diverg|loss|finite")
def what_is_worse_than_its_base_is_merged(folder: Path) -> Found:
    counts = [{"input_ids": ids, "labels": ids} for start in range(10, 26, 2) for ids in [list(range(start, start + 16))]]
    base = llama()
    hf(folder, base, counts, max_steps=100, learning_rate=3e-3).train()  # it can count; what it is trained on next is noise
    with injected():
        trainer = hf(folder, adapted(base), ROWS, max_steps=50, learning_rate=3e-2, eval_dataset=counts)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        saved(folder / "merged", trainer.model.merge_and_unload())
    said = f"a run that brings the loss on its evaluation rows from {before:.1f} to {after:.1f} ends normally"
    return Found(after > before + 0.1, f"{said}, and is merged")


@trial("E07", "Transformers", r"predefined maximum|max_position|context|longer than")
def generation_leaves_the_context(folder: Path) -> Found:
    model, words = llama(max_position_embeddings=32), IDS[:1]
    with injected():
        written = model.generate(
            input_ids=words, attention_mask=torch.ones_like(words), max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    return Found(written.shape[1] > 32, f"a model made for 32 tokens writes on to {written.shape[1]}")
