"""C01-C03, C12-C19: saving and loading."""

import json
import math
from pathlib import Path

import peft
import torch
import transformers
from harness import Found, injected, trial
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tiny import ROWS, adapted, adapter, apart, hf, llama, logits, saved, small, stirred, trained

WEIGHTS = "adapter_model.safetensors"


def _opened(folder: str | Path, seed: int = 0) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(llama(seed), str(folder)).eval()


@trial("C01", "PEFT", r"missing adapter keys")
def no_tensor_fits(folder: Path) -> Found:
    saved(folder, trained())
    named = load_file(folder / WEIGHTS)  # as a wrapper around the model leaves them
    save_file({name.replace("base_model.model.", "base_model.model.module."): t for name, t in named.items()}, folder / WEIGHTS)
    with injected():
        model = _opened(folder)
    base = torch.equal(logits(model), logits(llama()))
    return Found(base, f"loaded with {len(named)} keys that fit nothing; the outputs are the base's, to the bit")


@trial("C02", "PEFT, PiSSA by a few iterations", r"pissa|residual|convert|initial")
def saved_is_not_what_was_trained(folder: Path) -> Found:
    with injected():
        model = adapted(llama(), init_lora_weights="pissa_niter_4")
        start = logits(model)
        hf(folder, model, ROWS, max_steps=5, learning_rate=1e-3).train()
        base = llama()
        torch.manual_seed(1)  # another process has other random numbers
        again = peft.PeftModel.from_pretrained(base, saved(folder / "adapter", model)).eval()
    model.eval()
    learned, off = apart(start, logits(model)), apart(logits(again), logits(model))
    said = f"{off:.0%} from those it was trained to give (training moved them by {learned:.0%})"
    return Found(off > 1e-3, f"loaded again, its logits are {said}")


@trial("C03", "HF Trainer, PEFT", r"modules_to_save|not saved|will not be saved|trainable")
def something_trained_is_not_saved(folder: Path) -> Found:
    model = adapted(llama())
    model.get_output_embeddings().weight.requires_grad_(True)  # the head is to be trained too
    with injected():
        hf(folder, model, ROWS, max_steps=5).train()
        again = _opened(saved(folder / "adapter", model))
    model.eval()
    head = apart(model.get_output_embeddings().weight, llama().get_output_embeddings().weight)
    off = apart(logits(again), logits(model))
    return Found(off > 1e-4, f"a head that training moved by {head:.0%} is not in the file; loaded logits are {off:.0%} off")


@trial("C12", "PEFT", r"corrupt|checksum|hash|nan|finite")
def bits_rot(folder: Path) -> Found:
    model = trained()
    path = Path(saved(folder, model)) / WEIGHTS
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if "lora_B" in key)
    content[8 + size + header[name]["data_offsets"][0] + 3] ^= 0x40  # the highest bit of a float32's exponent
    path.write_bytes(bytes(content))
    with injected():
        again = _opened(folder)
    off = apart(logits(again), logits(model))
    said = "NaN" if math.isnan(off) else f"{off:.0%} off"
    return Found(not off <= 1e-6, f"one bit of {path.stat().st_size:,} bytes is flipped: it loads, and the logits are {said}")


@trial("C13", "PEFT", r"base model|base_model|different|mismatch")
def another_base(folder: Path) -> Found:
    model = stirred(adapted(llama()))
    saved(folder / "adapter", model)
    with injected():
        again = _opened(folder / "adapter", seed=1)  # a base of the same shape, of which nobody has trained it
    off = apart(logits(again), logits(model))
    return Found(
        off > 1e-3, f"it loads on another base of the same shape; the logits are {off:.0%} from those it learned to give"
    )


@trial("C14", "PEFT", r"lora_alpha|config")
def configuration_was_edited(folder: Path) -> Found:
    model = trained()
    path = Path(saved(folder, model)) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 10}))
    with injected():
        again = _opened(folder)
    off = apart(logits(again), logits(model))
    return Found(off > 1e-3, f"with lora_alpha edited from 16 to 160 it loads, and the logits are {off:.0%} off")


@trial("C15", "PEFT", r"dtype|bfloat16|float32")
def another_type_after_loading(folder: Path) -> Found:
    model = stirred(adapted(llama().to(torch.bfloat16)))
    saved(folder, model)
    wanted = list(adapter(model).values())
    with injected():
        again = peft.PeftModel.from_pretrained(llama().to(torch.bfloat16), str(folder))
        again.load_adapter(str(folder), adapter_name="second")
    got = adapter(again)
    off = 0
    for name in ("default", "second"):
        numbers = [tensor for path, tensor in got.items() if f".{name}." in path]
        off += sum(a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(numbers, wanted, strict=True))
    return Found(off > 0, f"{off} of {2 * len(wanted)} float32 tensors on a bfloat16 base are others once they are loaded")


def _three(folder: Path, **second: object) -> tuple[str, str, str]:
    """Three saved adapters; the second with settings of its own."""
    shapes: tuple[dict, ...] = ({}, second, {})
    return tuple(saved(folder / str(n), trained(seed=n + 1, **shape)) for n, shape in enumerate(shapes))


@trial("C16", "PEFT hotswap", r"foobar|missing|other adapter|substring")
def name_contains_another(folder: Path) -> Found:
    one, two, three = _three(folder)
    model = peft.PeftModel.from_pretrained(llama(), one, adapter_name="foo").eval()
    model.load_adapter(two, adapter_name="foobar")
    with injected():
        hotswap_adapter(model, three, adapter_name="foo")
        model.set_adapter("foobar")
    zeros = all(not parameter.any() for path, parameter in model.named_parameters() if ".foobar." in path)
    off = apart(logits(model), logits(_opened(two)))
    said = "every weight of it is zero" if zeros else "its weights are others"
    return Found(off > 1e-6, f'after a swap of "foo", "foobar" is {off:.0%} off: {said}')


@trial("C17", "PEFT", r"already|exists|overwrit|in use")
def name_is_used_twice(folder: Path) -> Found:
    one, two, _ = _three(folder, lora_alpha=64)
    with injected():
        model = peft.PeftModel.from_pretrained(llama(), one).eval()
        model.load_adapter(two, adapter_name="default")
    wanted, first = logits(_opened(two)), logits(_opened(one))
    off = apart(logits(model), wanted)
    lost = "" if apart(logits(model), first) < 1e-6 else "the first is gone, and "
    return Found(off > 1e-6, f"taken: {lost}the second acts at the first one's scale, its logits {off:.0%} off")


@trial("C18", "PEFT hotswap", r"scal|alpha|rank")
def old_scale_after_a_swap(folder: Path) -> Found:
    one, two, _ = _three(folder, lora_alpha=64, r=4)
    wanted = [logits(_opened(two)), logits(_opened(one))]
    with injected():
        model = peft.PeftModel.from_pretrained(llama(), one).eval()
        off = 0.0
        for path, want in zip((two, one), wanted, strict=True):
            hotswap_adapter(model, path, adapter_name="default")
            off = max(off, apart(logits(model), want))
    return Found(off > 1e-6, f"swapped to another rank and scale and back, logits are {small(off)} from those of each alone")


@trial("C19", "HF Trainer, PEFT", r"MISSING|newly initialized")
def a_base_without_one_of_its_tensors(folder: Path) -> Found:
    llama().save_pretrained(folder / "base")
    file, lost = folder / "base" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    whole = load_file(file)
    save_file({name: tensor for name, tensor in whole.items() if name != lost}, file, {"format": "pt"})
    with injected():
        model = adapted(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"))
        hf(folder, model, ROWS, max_steps=5).train()
    made_up = apart(model.get_base_model().state_dict()[lost], whole[lost])
    return Found(made_up > 1e-3, f"{lost} is {made_up:.0%} from what it was, made up at random, and 5 steps end normally")


@trial("C20", "PEFT, Transformers", r"rope|4\.5|version")
def another_version_reads_it_otherwise(folder: Path) -> Found:
    base = llama(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    with injected():
        saved(folder / "merged", stirred(adapted(base)).merge_and_unload())
    config = json.loads((folder / "merged" / "config.json").read_text(encoding="utf-8"))
    # Transformers 4.57.6, tried by hand on such a folder, takes 10,000 without a word
    said = "the rotary base of a merged model, 500,000, is not written where Transformers 4.57 looks, which takes 10,000"
    return Found("rope_theta" not in config, said)


@trial("C21", "PEFT, 4-bit base", r"4-bit|quantiz|bnb|dtype|precision")
def how_the_base_was_held_is_forgotten(folder: Path) -> Found:
    base = saved(folder / "base", llama())
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantized = transformers.LlamaForCausalLM.from_pretrained(base, quantization_config=four, device_map={"": "cpu"})
    model = stirred(adapted(quantized), size=0.01)
    saved(folder / "adapter", model)
    with injected():
        again = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    off = apart(logits(again), logits(model))
    return Found(
        off > 1e-3,
        f"trained on 4 bits, the adapter is loaded onto {str(again.dtype).removeprefix('torch.')}: its logits are {off:.0%} off",
    )
