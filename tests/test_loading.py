"""What is loaded is read whole: nothing is made up at random, and nothing left out silently."""

import json
import shutil

import pytest
import torch
import transformers
from families import tiny
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from templates import saved_base
from worlds import CHATML, RECIPE, make_model, write_rows

from trimtab.api import fit
from trimtab.base import Base
from trimtab.base.loading import read_model
from trimtab.core.errors import ArtifactError, DataError, UnsupportedModel
from trimtab.data.example import TokenRow
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

MIXTRAL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=4,
)  # fmt: skip


def saved(model, folder, change=lambda tensors: None):
    """The model's folder, with other tensors in it."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def added(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


def refused(folder, **settings):
    with pytest.raises(ArtifactError) as caught:
        Base.load_folder(folder, torch.float32, torch.device("cpu"), with_tokenizer=False, **settings)
    return str(caught.value)


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL))


LACKING = {
    "a matrix": ("llama", without("model.layers.1.mlp.down_proj.weight"), "model.layers.1.mlp.down_proj.weight: missing"),
    "a norm": ("llama", without("model.norm.weight"), "model.norm.weight: missing"),
    "a bias": ("gpt2", without("transformer.h.0.attn.c_attn.bias"), "transformer.h.0.attn.c_attn.bias: missing"),
    "an untied head": ("llama", without("lm_head.weight"), "lm_head.weight: missing"),
    "both ends": ("llama-tied", without("model.embed_tokens.weight"), "model.embed_tokens.weight: missing"),
    "a bias too many": (
        "llama", added("model.layers.0.self_attn.q_proj.bias", 32), "model.layers.0.self_attn.q_proj.bias: unexpected"
    ),
    "a layer too many": ("llama", added("model.layers.2.mlp.up_proj.weight", 48, 32), "model.layers.2.mlp.up_proj.weight: unexpected"),
    "a head of another task": ("llama", added("v_head.summary.weight", 1, 32), "v_head.summary.weight: unexpected"),
    "another shape": (
        "llama", added("model.layers.0.mlp.up_proj.weight", 32, 32),
        "model.layers.0.mlp.up_proj.weight: has shape (32, 32), expected (48, 32)",
    ),
    "more tokens than it says": ("llama", added("model.embed_tokens.weight", 99, 32), "has shape (99, 32), expected (97, 32)"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "change", "words"), LACKING.values(), ids=LACKING)
def test_a_folder_that_does_not_hold_the_models_tensors_is_refused_by_name(family, change, words, tmp_path, capfd):
    said = refused(saved(tiny(family), tmp_path / "model", change))
    assert words in said
    assert f"{tmp_path / 'model'} does not hold exactly the tensors of " in said
    assert "LOAD REPORT" not in capfd.readouterr().err  # said once


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_so_is_one_that_is_quantized_while_it_is_read(quantize, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = saved(tiny("llama"), tmp_path / "model", without("model.layers.1.mlp.down_proj.weight"))
    assert "model.layers.1.mlp.down_proj.weight: missing" in refused(folder, quantize=quantize)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.block_sparse_moe.experts.2.w1.weight", "layers.0.mlp.experts.gate_up_proj: cannot be put together"),
        (
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            "experts.down_proj: has shape (3, 32, 48), expected (4, 32, 48)",
        ),
        ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight: missing"),
    ],
)
def test_so_is_one_whose_tensors_are_put_together_from_several(name, words, tmp_path):
    assert words in refused(saved(mixtral(), tmp_path / "model", without(name)))


def old_buffers(tensors):
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)


def unprefixed(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)


WHOLE = {
    "as it is saved": ("llama", None),
    "a tied head that is saved as well": ("llama-tied", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
    "a tied head alone": ("llama-tied", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})),
    "rotary frequencies of old": ("llama", added("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),
    "masks of old": ("gpt2", old_buffers),
    "names of old, without the prefix": ("gpt2", unprefixed),
}  # fmt: skip


@pytest.mark.parametrize(("family", "change"), WHOLE.values(), ids=WHOLE)
def test_what_is_right_is_loaded(family, change, tmp_path):
    folder = saved(tiny(family), tmp_path / "model", change or (lambda tensors: None))
    loaded = Base.load_folder(folder, torch.float32, torch.device("cpu"), with_tokenizer=False).model
    for name, tensor in tiny(family).state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


SAMPLED = ("bloom", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "glm4", "gpt_neox", "gptj", "mixtral", "olmo2",
           "opt", "phi", "qwen2_moe", "qwen3_next", "rwkv", "smollm3", "stablelm", "starcoder2")  # fmt: skip
"""All 196 causal language models of Transformers 5.24 were tried once: docs/decisions/020."""


@pytest.mark.parametrize("kind", SAMPLED)
def test_no_family_is_refused_wrongly(kind, tmp_path):
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, word_embed_proj_dim=32, ffn_dim=48, n_routed_experts=4, num_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8, pad_token_id=0,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(kind)
    for name in sizes.keys() & config.to_dict().keys():
        setattr(config, name, sizes[name])
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[2:4]
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = read_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_text_model_can_be_read_out_of_one_that_sees(tmp_path):
    config = {**tiny("llama").config.to_dict(), "vision_config": {"hidden_size": 8}}
    folder = saved(tiny("llama"), tmp_path / "model", added("vision_model.patches.weight", 8, 8))
    (folder / "config.json").write_text(json.dumps(config))
    Base.load_folder(folder, torch.float32, torch.device("cpu"), with_tokenizer=False)
    saved(tiny("llama"), folder, added("model.layers.0.self_attn.q_proj.bias", 32))
    (folder / "config.json").write_text(json.dumps(config))
    assert "model.layers.0.self_attn.q_proj.bias: unexpected" in refused(folder)


# A model that somebody loaded themselves


def test_a_model_in_memory_that_was_not_read_whole_is_refused(tmp_path):
    read = transformers.AutoModelForCausalLM.from_pretrained
    folder = saved(tiny("llama"), tmp_path / "model")
    Base(read(folder)), Base(read(folder).to(torch.bfloat16)), Base(tiny("llama"))
    saved(tiny("llama"), folder, without("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(
        ArtifactError, match=r"read from files, except for:\n  model\.layers\.1\.mlp\.down_proj\.weight: not from its"
    ):
        Base(read(folder))
    larger = read(saved(tiny("llama"), tmp_path / "other"))
    larger.resize_token_embeddings(99)
    with pytest.raises(ArtifactError, match=r"lm_head\.weight: not from its files"):
        Base(larger)
    larger.save_pretrained(tmp_path / "larger")
    Base(read(tmp_path / "larger"))  # as the message says


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantized_one_is_not_taken_for_one_that_is_made_up(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{kind}": True})
    folder = saved(tiny("llama"), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    Base(model)
    model.save_pretrained(tmp_path / "stored")
    Base.load_folder(tmp_path / "stored", torch.float32, torch.device("cpu"), with_tokenizer=False)


# GGUF


def gguf_of(folder, path, change=lambda tensors: None, **fields):
    """The Llama in a folder as a GGUF file, by the format's own library."""
    tensors, writer = load_file(folder / "model.safetensors"), GGUFWriter(path, "llama")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
             "lm_head": "output", "model.layers": "blk"}  # fmt: skip
    for name in list(tensors):
        tensor, heads = tensors.pop(name), {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # as llama.cpp has the two halves of a rotated pair
            tensor = tensor.view(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        tensors[name] = tensor.contiguous()
    change(tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    (
        writer.add_context_length(128),
        writer.add_embedding_length(32),
        writer.add_block_count(2),
        writer.add_feed_forward_length(64),
    )
    (
        writer.add_head_count(4),
        writer.add_head_count_kv(2),
        writer.add_rope_dimension_count(8),
        writer.add_layer_norm_rms_eps(1e-6),
    )
    writer.add_name("tiny"), writer.add_rope_freq_base(10000.0)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens), writer.add_bos_token_id(0), writer.add_eos_token_id(1)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_chat_template(CHATML)
    for key, value in fields.items():
        getattr(writer, key)(value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    make_model(folder := tmp_path_factory.mktemp("models") / "tiny", 0)
    return folder


def test_a_gguf_file_is_the_model_that_it_was_made_of(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    ours, theirs = Base.load(str(gguf_of(folder, tmp_path / "tiny.gguf"))), Base.load(str(folder))
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name
    assert ours.encode(["a number?"])[0].ids == theirs.encode(["a number?"])[0].ids


@pytest.mark.parametrize(
    ("change", "fields", "error", "words"),
    [
        (without("blk.1.ffn_down.weight"), {}, ArtifactError, "model.layers.1.mlp.down_proj.weight: missing"),
        (added("rope_freqs.weight", 4), {}, UnsupportedModel, "rope_freqs.weight: not read"),
        (added("blk.0.attn_q.bias", 32), {}, UnsupportedModel, "blk.0.attn_q.bias: not read"),
        (lambda _: None, {"add_rope_scaling_type": "YARN"}, UnsupportedModel, "llama.rope.scaling.type (yarn): not read"),
    ],
)
def test_a_gguf_file_that_is_not_read_whole_is_refused(change, fields, error, words, folder, tmp_path, monkeypatch):
    from gguf import RopeScalingType

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    fields = {name: getattr(RopeScalingType, value) for name, value in fields.items()}
    with pytest.raises(error) as caught:
        Base.load(str(gguf_of(folder, tmp_path / "tiny.gguf", change, **fields)))
    assert words in str(caught.value)
    assert not any((tmp_path / "cache" / "gguf").iterdir())


# Tokenizers


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    saved_base(tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        Base.load(str(tmp_path / "tiny"))


@pytest.fixture
def larger(world, tmp_path):
    """A base whose tokenizer has two tokens for which its model has no embedding."""
    folder = shutil.copytree(world / "tiny", tmp_path / "larger")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "<pad>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_with_tokens_that_the_model_has_no_embedding_for_are_refused(larger, tmp_path, monkeypatch, trimtab):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Is {n} a number?", "completion": "<think>yes" if n == 3 else "yes"} for n in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("model: tiny", "model: larger").replace("epochs: 8", "epochs: 1"))
    for command in ("check", "train"):
        done = trimtab(command, "r.yaml")
        assert done.code == 3
        assert "rows.jsonl:4: holds token 300 ('<think>'), and the model has embeddings for 300 tokens only" in done.err
    assert trimtab("train", "r.yaml", "data.bad_rows=skip").code == 0
    refused = trimtab("chat", "larger", "--prompt", "say <pad>", "--max-new-tokens", 2)
    assert "holds token 301 ('<pad>')" in refused.err


def test_nor_are_rows_trained_that_somebody_has_made(larger):
    base = Base.load(str(larger))
    adapter = attach(base.model, LoRA(rank=2))
    rows = [TokenRow([0, 5, 300, 1], [2, 3], "mine:1", 4)]
    with pytest.raises(DataError, match="mine:1: holds token 300"):
        next(fit(base, adapter, rows))


def test_a_new_token_of_an_adapters_is_embedded_by_it(larger):
    base = Base.load(str(larger))
    base.add_tokens(["<new>"])
    assert base.embedding_problem(base.encode(["a <new> one"])[0].ids) is None
    assert base.embedding_problem(base.encode(["a <pad> one"])[0].ids) is not None


def test_what_was_tokenized_for_a_larger_model_is_not_taken_from_the_cache(world, larger):
    """The same tokenizer, and a model that has more embeddings."""
    base, model = Base.load(str(larger)), transformers.AutoModelForCausalLM.from_pretrained(larger)
    model.resize_token_embeddings(302)
    model.save_pretrained(larger)
    other = Base.load(str(larger))
    assert base.fingerprint["tokenizer"] == other.fingerprint["tokenizer"]
    assert base.tokenizing_hash != other.tokenizing_hash
