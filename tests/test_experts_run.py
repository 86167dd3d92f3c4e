"""A mixture of experts from a recipe to a certified run and a merged model, and what is said of what stays frozen."""

import json

import pytest
import torch
import transformers

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = "2 × Qwen3MoeTopKRouter (router, which chooses the experts)"


@pytest.fixture
def mixture_here(here):
    """The world's tokenizer with a mixture of experts in the place of its model."""
    torch.manual_seed(0)
    size = json.loads((here / "tiny" / "config.json").read_text())["vocab_size"]
    config = transformers.Qwen3MoeConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(here / "tiny")
    return here


def words(text):
    return " ".join(text.split())


def test_a_run_says_what_it_leaves_learns_is_certified_and_merged(mixture_here, trimtab):
    done = trimtab("train", "r.yaml", "certify=true", "output=mix", "train.epochs=2")
    assert done.code == 0, done.err
    assert f"not adapted, frozen: {FROZEN}" in words(done.out + done.err)
    record = json.loads((mixture_here / "mix" / "certificate.json").read_text())
    assert record["passed"] is True
    assert trimtab("merge", "mix", "merged").code == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(mixture_here / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(mixture_here / "tiny")
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert {name.rpartition(".")[2] for name in changed} == {"weight", "gate_up_proj", "down_proj"}
    assert not any(".mlp.gate." in name for name in changed)


def test_check_and_methods_say_it_too(mixture_here, trimtab):
    assert f"not adapted, frozen: {FROZEN}" in words(trimtab("check", "r.yaml", "--json").out)
    shown = words(trimtab("methods", "tiny", "method=lora").out)
    assert f"Not adapted, frozen: {FROZEN}." in shown
    assert "gate_up_proj.A 4×32×32" in shown
    assert "frozen" not in trimtab("methods", "tiny", "method=lora", "method.targets=attention").out
