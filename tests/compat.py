"""Merged folders, read by Transformers 4.57 and by the one that is installed here: tokens and logits are the same.

    python tests/compat.py OTHER        OTHER: the Python of an environment with torch and transformers 4.57; `make compat` makes one

Bases are written by 4.57, as models on the hub are: Llama, GPT-2 and Qwen 2, each with its own class of tokenizer. Here they are
merged with an adapter in every way that decides what files are written; the real model, which comes as GGUF, is merged too.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Json = dict[str, Any]

TEXTS = [
    "hello world", "  two  spaces, and trailing  ", "2+2=4, 12345 and 3.14", "def f(x):\n    return x\n\n\n# done", "naïve café, Straße",
    "你好，世界。", "tabs\tand\r\nlines", "don't I'LL", "a <|im_end|> b<|im_start|>", "[INST] x [/INST]", "</s>", "e\u0301\u00e9 😀", "<think>x",
]  # fmt: skip
CHAT = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]])
NEAR = 1e-4
"""How far logits may be apart, as a share of the largest: the same weights, in another version's order of operations."""


# Bases, as 4.57 writes them


def _bytes(specials: tuple[str, ...], qwen: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 4, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def _pieces(specials: tuple[str, ...]) -> Tokenizer:
    """As Llama 2's: `▁` for a space, and bytes for what no piece is for."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained.train_from_iterator(
        [line for text in TEXTS for line in text.split("\n")], trainers.BpeTrainer(vocab_size=120, show_progress=False)
    )
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in sorted(trained.get_vocab()):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def write_bases(folder: Path) -> None:
    """Run by 4.57."""
    t = transformers
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=128, initializer_range=0.2)  # fmt: skip
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    chat = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    bases: dict[str, tuple[Any, Callable[[int], Any]]] = {
        "llama": (
            t.LlamaTokenizerFast(tokenizer_object=_pieces(("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")), **chat),
            lambda n: t.LlamaForCausalLM(t.LlamaConfig(**sizes, vocab_size=n, rope_theta=500.0, rope_scaling=llama3)),
        ),
        "gpt2": (
            t.GPT2TokenizerFast(tokenizer_object=_bytes(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), qwen=False), **chat),
            lambda n: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)),
        ),
        "qwen2": (
            t.Qwen2TokenizerFast(
                tokenizer_object=_bytes(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), qwen=True), eos_token="<|im_end|>", **chat
            ),
            lambda n: t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, vocab_size=n, rope_theta=1e6, tie_word_embeddings=True)),
        ),
    }  # fmt: skip
    for name, (tokenizer, make) in bases.items():
        tokenizer.chat_template = CHATML
        torch.manual_seed(0)
        make(len(tokenizer) + 3).save_pretrained(folder / name)  # padded, as many are
        tokenizer.save_pretrained(folder / name)


# Merged folders, as Trimtab writes them


def _ways(folder: Path) -> Iterator[tuple[str, Any, Any, torch.dtype]]:
    """A case's name, a base, a method, and the number type to merge in."""
    from trimtab.base import Base
    from trimtab.methods import Method

    lora = Method.member("lora")(rank=2)
    for name in ("llama", "gpt2", "qwen2"):
        place = folder / name
        yield f"{name}, from its folder", Base.load(str(place)), lora, torch.float32
        yield f"{name}, from its folder, in bfloat16", Base.load(str(place)), lora, torch.bfloat16
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model.save_pretrained(folder / f"{name}-5"), tokenizer.save_pretrained(folder / f"{name}-5")
        yield f"{name}, from a folder that Transformers 5 wrote", Base.load(str(folder / f"{name}-5")), lora, torch.float32
        tokenizer.chat_template = CHATML + "{# another #}"
        yield f"{name}, held in memory, with another template", Base(model, tokenizer), lora, torch.float32
        yield f"{name}, with a new token", Base.load(str(place)), Method.member("tokens")(new=["<think>"]), torch.float32
    yield "SmolLM2-135M-Instruct, from GGUF", Base.load("smollm2-135m-instruct"), lora, torch.float32


def write_merged(folder: Path) -> None:
    """Run here."""
    from trimtab.deploy import attach, merge, sample

    cases = {}
    for number, (name, base, method, dtype) in enumerate(_ways(folder)):
        base.add_tokens(method.new_tokens)
        adapter = attach(base.model, method, sample=sample(base, []))
        generator = torch.Generator().manual_seed(0)
        for tensor in adapter.parameters().values():
            tensor.data.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        merge(base, adapter, folder / f"merged-{number}", dtype=dtype)
        cases[f"merged-{number}"] = {"name": name, **_said(base.tokenizer), "eos": list(base.stop_ids)}
        with torch.no_grad():
            logits = base.model(input_ids=IDS, use_cache=False).logits.float().contiguous()
        save_file({"logits": logits}, folder / f"merged-{number}.safetensors")
    (folder / "cases.json").write_text(json.dumps(cases))


def _said(tokenizer: Any) -> Json:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else ""
    ids = [tokenizer(text).input_ids for text in [*TEXTS, chat]]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": chat,
    }


def read_merged(folder: Path) -> None:
    """Run by both. Writes what is wrong with each case; nothing, if it is read as it was written."""
    found = {}
    for place, case in json.loads((folder / "cases.json").read_text()).items():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / place)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder / place, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            with torch.no_grad():
                ours = model.eval()(input_ids=IDS, use_cache=False).logits
            theirs = load_file(folder / f"{place}.safetensors")["logits"]
            apart = float((ours - theirs).abs().max() / theirs.abs().max())
            wrong = [key for key, value in _said(tokenizer).items() if value != case[key]]
            wrong += [f"{key}: {sorted(map(str, names))[:2]}" for key, names in info.items() if names]
            eos = model.generation_config.eos_token_id
            wrong += ["eos_token_id"] if (eos if isinstance(eos, list) else [eos]) != case["eos"] else []
            wrong += [f"logits {apart:.1e} apart"] if not apart <= (2e-2 if "bfloat16" in case["name"] else NEAR) else []
            found[case["name"]] = {"apart": apart, "wrong": wrong}
        except Exception as error:  # whatever it says is what is wrong
            found[case["name"]] = {
                "apart": None,
                "wrong": [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"],
            }
    (folder / f"read-{transformers.__version__}.json").write_text(json.dumps(found))


def main() -> int:
    other, environment = sys.argv[1], {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder:
        for python, step in ((other, "bases"), (sys.executable, "merged"), (other, "read"), (sys.executable, "read")):
            subprocess.run([python, __file__, step, folder], env=environment, check=True)
        results = {
            path.stem.removeprefix("read-"): json.loads(path.read_text()) for path in sorted(Path(folder).glob("read-*.json"))
        }
    bad = 0
    for version, cases in results.items():
        for name, case in cases.items():
            bad += bool(case["wrong"])
            apart = "" if case["apart"] is None else f"logits {case['apart']:.0e} apart"
            print(f"{'wrong' if case['wrong'] else 'right':6} {version:8} {name:50} {apart:20} {'; '.join(case['wrong'])}")
    print(f"{sum(map(len, results.values())) - bad} of {sum(map(len, results.values()))} are read as they were written")
    return int(bad > 0 or len(results) != 2)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"bases": write_bases, "merged": write_merged, "read": read_merged}[sys.argv[1]](Path(sys.argv[2]))
    else:
        sys.exit(main() if shutil.which(sys.argv[1]) else f"{sys.argv[1]} is no Python")
