"""What is handed over of a base is read alike by Transformers 5 and 4.57. With both of them: `make compat`."""

import json
import os
import shutil
import stat

import pytest
import torch
import transformers
from families import perturb, tiny
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from worlds import CHATML, make_model

from trimtab.base import Base, ModelConfig
from trimtab.core.errors import ArtifactError, NotMergeable, UnsupportedModel
from trimtab.deploy import MIN_RETAINED, attach, merge, sample
from trimtab.deploy.save_pretrained import save_adapters_alone
from trimtab.methods import Method, base_modules
from trimtab.methods.lora import LoRA

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FOUR = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
    "clean_up_tokenization_spaces": False, "model_max_length": 128, "extra_special_tokens": {},
    "added_tokens_decoder": {
        str(n): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for n, token in enumerate(("<|im_start|>", "<|im_end|>"))
    },
}  # fmt: skip
"""A tokenizer_config.json as 4.57 writes it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    make_model(folder := tmp_path_factory.mktemp("models") / "tiny", 0)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A model folder as 4.57 writes it, and as most models on the hub are."""
    folder = shutil.copytree(made, tmp_path / "tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps(FOUR, indent=2))
    config = json.loads((folder / "config.json").read_text()) | {
        "rope_theta": 500.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
    }
    for key in ("rope_parameters", "dtype"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.X"}, "made_by": "somebody"}))
    return folder


def merged(base, folder, method=None, **settings):
    method = method or LoRA(rank=2)
    base.add_tokens(method.new_tokens)
    adapter = attach(base.model, method, sample=sample(base, []) if base.tokenizer else None)
    perturb(adapter.parameters(), 0.05)
    return merge(base, adapter, folder, **settings)


def said(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# The tokenizer


def test_tokenizer_files_are_copied_to_the_byte(folder, tmp_path):
    merged(Base.load(str(folder)), tmp_path / "merged")
    for name in TOKENIZER:
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()


def test_what_transformers_5_wrote_is_written_so_that_4_reads_it(made, tmp_path):
    assert said(made, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"  # which 4.57 does not know
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "tiny")
    assert said(tmp_path / "tiny", "tokenizer_config.json")["extra_special_tokens"] == ["<|im_start|>"]  # nor a list of these
    shutil.copytree(made, tmp_path / "tiny", dirs_exist_ok=True, ignore=lambda _, names: TOKENIZER)
    base = Base.load(str(tmp_path / "tiny"))
    merged(base, tmp_path / "merged")
    config = said(tmp_path / "merged", "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert not config.keys() & {"extra_special_tokens", "backend", "is_local"}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tmp_path / "tiny" / "tokenizer.json").read_bytes()
    assert Base.load(str(tmp_path / "merged")).fingerprint["tokenizer"] == base.fingerprint["tokenizer"]


def test_what_was_changed_in_memory_is_written_as_it_is_now(folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("assistant", "helper")
    merged(Base(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer), tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == tokenizer.chat_template
    merged(Base.load(str(folder)), tmp_path / "more", Method.member("tokens")(new=["<think>"]))
    again = Base.load(str(tmp_path / "more"))
    assert len(again.encode(["a <think>"])[0].ids) == len(again.encode(["a "])[0].ids) + 1
    assert said(tmp_path / "more")["vocab_size"] == 301


def spaced(file):
    """Let a tokenizer put a space before every text, after special tokens too, as Llama 2's does; Transformers 5 does so at the start alone."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.save(str(file))


def test_a_tokenizer_that_is_read_otherwise_is_refused(folder):
    """Transformers makes parts of some classes anew, whatever tokenizer.json says of them."""
    spaced(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(FOUR | {"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(
        UnsupportedModel, match=r"as a Qwen2Tokenizer, which gives 'hello world' other tokens than tokenizer\.json says"
    ):
        Base.load(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(FOUR))  # as the message says
    Base.load(str(folder))


def test_a_tokenizer_that_is_read_otherwise_after_spaces_is_written_as_it_was_trained_with(folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=True, right=False)  # what no file says
    base = Base(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    merged(base, tmp_path / "merged")
    again = Base.load(str(tmp_path / "merged"))
    assert again.encode(["  x"])[0].ids == base.encode(["  x"])[0].ids
    assert again.encode(["  x"])[0].ids != Base.load(str(folder)).encode(["  x"])[0].ids


# The configuration


def test_a_folders_own_configuration_is_handed_over(folder, tmp_path):
    merged(Base.load(str(folder)), tmp_path / "merged", dtype=torch.bfloat16)
    own, config = said(folder), said(tmp_path / "merged")
    assert config == {key: value for key, value in own.items() if key != "auto_map"} | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def test_one_that_was_changed_in_memory_is_not(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5)
    merged(Base(model), tmp_path / "merged")
    config = said(tmp_path / "merged")
    assert config["rms_norm_eps"] == 0.5
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SAID = {
    "llama": ({}, {"rope_theta": 10000.0, "rope_scaling": None}),
    "llama with scaling": (LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "cohere": ({}, {"rope_theta": 500000.0, "rope_scaling": None}),  # 4.57 would say 10,000
    "gemma3": ({}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}),
    "phi3": ({}, {"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("name", SAID)
def test_rotary_embeddings_are_said_in_both_versions_words(name, tmp_path):
    rotary, words = SAID[name]
    model = tiny(name.split()[0])
    if rotary:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**model.config.to_dict() | {"rope_parameters": rotary})
        ).eval()
    base = Base(model)
    merged(base, tmp_path / "merged")
    config = said(tmp_path / "merged")
    assert words.items() <= config.items()
    assert config["rope_parameters"] == model.config.rope_parameters
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.rope_parameters == model.config.rope_parameters


def test_gpt_neoxs_own_words(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=97, **sizes, rope_parameters=rotary))
    merged(Base(model), tmp_path / "merged")
    config = said(tmp_path / "merged")
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (300.0, 0.5)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == rotary


def test_ends_that_differ_are_said_to_be_untied(tmp_path):
    """Transformers 5 leaves ends untied whose files differ, though the configuration ties them; 4.57 ties them all the same."""
    tiny("llama-tied").save_pretrained(tmp_path / "tiny")
    tensors = load_file(tmp_path / "tiny" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.randn(97, 32)}, tmp_path / "tiny" / "model.safetensors", {"format": "pt"})
    assert said(tmp_path / "tiny")["tie_word_embeddings"] is True
    base = Base.load_folder(tmp_path / "tiny", torch.float32, torch.device("cpu"), with_tokenizer=False)
    merged(base, tmp_path / "merged")
    assert said(tmp_path / "merged")["tie_word_embeddings"] is False


# Number types


def weights(model):
    return {
        f"{path}.{name}": p.detach() for path, m in base_modules(model).items() for name, p in m.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_are_rounded_once_and_told(dtype, family, tmp_path):
    base = Base(tiny(family))
    done = merged(base, tmp_path / "merged", dtype=dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert plain.config.dtype == dtype
    merged_in_full = Base(tiny(family))
    merged(merged_in_full, tmp_path / "full")
    full, before = load_file(tmp_path / "full" / "model.safetensors"), tiny(family).state_dict()
    change = lost = 0.0
    for name, rounded in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(rounded, full[name].to(dtype))
        old = before[name if name in before else f"transformer.{name}"]
        change += float((full[name] - old).double().square().sum())
        lost += float((rounded.double() - old.to(dtype).double() - (full[name].double() - old.double())).square().sum())
    assert done.retained == pytest.approx(1 - (lost / change) ** 0.5, abs=1e-5)
    assert 0.5 < done.retained < 1
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == (family != "llama")


def test_a_small_change_is_lost_in_bfloat16_and_kept_in_float32(tmp_path):
    base = Base(tiny("llama", torch.bfloat16))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters(), 1e-5)  # far less than a weight's last bit
    assert merge(base, adapter, tmp_path / "half", dtype=torch.bfloat16).retained < 0.1
    assert merge(base, adapter, tmp_path / "full").retained == 1.0


@pytest.mark.parametrize("wrong", [0.5, 0.0])
def test_a_merge_in_fewer_bits_that_is_not_the_adapter_is_not_kept_either(wrong, tmp_path, monkeypatch):
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=4))
    perturb(adapter.parameters())
    layer = type(next(iter(adapter.layers.values())))
    original = layer.merge

    def scaled(self):
        scale, self.scale = self.scale, self.scale * wrong
        try:
            return original(self)
        finally:
            self.scale = scale

    monkeypatch.setattr(layer, "merge", scaled)
    with pytest.raises(ArtifactError, match="so it was not kept"):
        merge(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def test_what_float16_has_no_number_for_is_refused(tmp_path):
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(NotMergeable, match=r"up_proj\.weight holds 1e\+05, which overflows torch\.float16: merge in bfloat16"):
        merged(Base(model), tmp_path / "merged", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_left(here, trimtab):
    done = trimtab("merge", "--force", "run", "merged", "--dtype", "bfloat16")
    assert done.code == 0
    assert "into merged (bfloat16)" in done.out
    assert "of the adapter's change" in done.out
    assert ("merge in float32, or use the adapter beside its base model" in done.out) == (
        float(done.out.split("keeps ")[1].split("%")[0]) < 100 * MIN_RETAINED
    )
    assert {t.dtype for t in load_file(here / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert "of the adapter's change" not in trimtab("merge", "--force", "run", "full").out
    assert trimtab("merge", "--force", "run", "third", "--dtype", "int8").code == 2


# Modes


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_written_files_have_the_modes_that_files_have(mask, here, trimtab):
    before = os.umask(mask)
    try:
        assert trimtab("train", "r.yaml", "output=new", "train.epochs=1").code == 0
        assert trimtab("merge", "--force", "run", "merged").code == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(here / "tiny")
        attach(model, LoRA(rank=2))
        save_adapters_alone(model)
        for _ in range(2):
            model.save_pretrained(here / "checkpoint-1")
    finally:
        os.umask(before)
    written = [path for name in ("new", "merged", "checkpoint-1") for path in (here / name).rglob("*") if path.is_file()]
    assert len(written) > 15
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {path.name: 0o666 & ~mask for path in written}


SWITCHED = (
    "{%- macro mark(more) -%}{{ '!' if loud else '.' }}{{ names | join(',') if names is defined and names else '' }}{{ more }}"
    "{%- endmacro -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ mark('') }}{{ '?' if loud is defined and loud is false else '' }}\n"
    "{{ m.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '<think>' if think == 'no' else '' }}\n{%- endif -%}"
)


@pytest.mark.parametrize("place", ["a file of its own", "in the configuration", "one of several"])
def test_the_switches_that_it_was_trained_with_are_what_a_merged_template_does_by_itself(place, folder, tmp_path):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "a file of its own":
        (folder / "chat_template.jinja").write_text(SWITCHED)
    else:
        several = [{"name": "default", "template": SWITCHED}, {"name": "tool_use", "template": SWITCHED}]
        config |= {"chat_template": SWITCHED if place == "in the configuration" else several}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    switches = {"loud": False, "names": ["a", "b\n{"], "think": "no"}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    base = Base.load(ModelConfig(name=str(folder), template=switches))
    merged(base, tmp_path / "merged")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged", trust_remote_code=False)
    for prompt in (False, True):
        said = read.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert said == base.template.render(talk, prompt=prompt)
        assert said != Base.load(str(folder)).template.render(talk, prompt=prompt)
        again = read.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt, loud=True, names=[], think=1)
        assert again == base.tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=prompt, loud=True, names=[], think=1
        )
