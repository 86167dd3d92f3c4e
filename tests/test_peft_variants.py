"""The real PEFT library computes what we do for LoRA's options, at the model's ends, and for DoRA, MiSS and OFT; both ways."""

import json

import pytest
import torch
from families import perturb, random_rows, tiny
from safetensors.torch import load_file

from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.deploy import load_adapter, save_adapter
from trimtab.methods import attach
from trimtab.methods.dora import DoRA
from trimtab.methods.lora import LoRA
from trimtab.methods.miss import MiSS
from trimtab.methods.oft import OFT

peft = pytest.importorskip("peft")

IDS = torch.tensor(random_rows(11, 11))
TARGETS = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}
ENDS = {"gpt2": ["wte", "lm_head"]}
LORA_FAMILIES = ["qwen2", "gemma3", "phi3", "gpt2"]
LINEAR_FAMILIES = ["qwen2", "gemma3", "phi3"]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}:UserWarning")  # PEFT's own
    for words in (
        "fan_in_fan_out is set",
        "Model has `tie_word_embeddings=True`",
        "Setting `save_embedding_layers`",
        "Unable to fetch remote file",
        "Could not find a config file",
        "Invalid `oft_block_size`",
    )
] + [pytest.mark.filterwarnings("ignore::FutureWarning")]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def targets_of(family, more=()):
    return [*TARGETS.get(family, ["q_proj", "down_proj"]), *more]


def same(ours, theirs):
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=2e-5)


def with_adapter(family, method, folder, size=0.2):
    """Our model with a perturbed adapter, which is saved too."""
    base = Base(tiny(family))
    adapter = attach(base.model, method)
    perturb(adapter.parameters(), size)
    save_adapter(base, adapter, folder)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2
    return base.model


def pefts(family, config, folder, size=0.2):
    """PEFT's model with a perturbed adapter, which is saved too."""
    theirs = peft.get_peft_model(tiny(family), config).eval()
    perturb({n: p for n, p in theirs.named_parameters() if p.requires_grad}, size)
    theirs.save_pretrained(folder)
    return theirs


def there_and_back(family, config, tmp_path, size=0.2):
    """PEFT's adapter in ours, and ours of it in PEFT's again; our method."""
    theirs = pefts(family, config, tmp_path / "theirs", size)
    base = Base(tiny(family))
    adapter = load_adapter(base, tmp_path / "theirs")
    same(base.model, theirs)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2
    save_adapter(base, adapter, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours"), theirs)
    return adapter.method


OURS = {
    "rslora": lambda t: LoRA(rank=4, alpha=6.0, rank_stabilized=True, targets=t),
    "patterns": lambda t: LoRA(rank=4, alpha=6.0, ranks={t[0]: 2}, alphas={t[1]: 2.5}, targets=t),
    "pissa": lambda t: LoRA(rank=4, alpha=6.0, init="pissa", rank_stabilized=True, ranks={t[0]: 2}, targets=t),
    "dora": lambda t: DoRA(rank=4, alpha=6.0, targets=t),
    "dora-patterns": lambda t: DoRA(rank=4, ranks={t[0]: 2}, alphas={t[1]: 2.5}, rank_stabilized=True, targets=t),
}


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_peft_loads_ours(name, family, tmp_path):
    ours = with_adapter(family, OURS[name](targets_of(family)), tmp_path / "adapter")
    same(ours, peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter"))


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize(
    "asked",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"DOWN": 2}},
        {"alpha_pattern": {r".*1\..*FIRST": 3}, "rank_pattern": {"FIRST": 3}},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"FIRST": 2}, "alpha_pattern": {"DOWN": 11}},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_we_load_pefts(asked, family, tmp_path):
    targets = targets_of(family)
    words = json.dumps(asked).replace("FIRST", targets[0]).replace("DOWN", targets[1])
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **json.loads(words))
    method = there_and_back(family, config, tmp_path)
    assert method.name == ("dora" if "use_dora" in asked else "lora")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_the_ends_of_a_model_go_both_ways(kind, family, tmp_path):
    targets = targets_of(family, ENDS.get(family, ["embed_tokens", "lm_head"]))
    ours = with_adapter(family, kind(rank=4, alpha=6.0, targets=targets), tmp_path / "adapter", 0.1)
    same(ours, peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter"))
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=kind is DoRA, task_type="CAUSAL_LM")
    assert there_and_back(family, config, tmp_path, 0.1).name == kind.__module__.rpartition(".")[2]
    if family != "gpt2":  # whose embeddings' name PEFT does not know as such
        saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        assert "base_model.model.model.embed_tokens.base_layer.weight" in saved  # or nothing was checked


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_the_bases_own_tensors_in_pefts_file_must_be_our_bases(targets, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    pefts("llama", config, tmp_path / "theirs")
    other = Base(tiny("llama"))
    path = "model.embed_tokens" if targets == ["embed_tokens"] else "lm_head"
    with torch.no_grad():
        other.model.get_submodule(path).weight[5, 5] += 1e-3
    keys = list(other.model.state_dict())
    with pytest.raises(ArtifactError, match=f"it holds the base model's {path}.weight from its training"):
        load_adapter(other, tmp_path / "theirs")
    assert list(other.model.state_dict()) == keys
    load_adapter(Base(tiny("llama")), tmp_path / "theirs")


# MiSS and OFT


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
@pytest.mark.parametrize("rank", [5, 8])  # 5 divides no matrix's inputs
def test_miss_goes_both_ways(rank, family, tmp_path):
    ours = with_adapter(family, MiSS(rank=rank), tmp_path / "adapter")
    same(ours, peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter"))
    config = peft.MissConfig(r=rank, target_modules=targets_of(family), miss_dropout=0.1, task_type="CAUSAL_LM")
    method = there_and_back(family, config, tmp_path)
    assert (method.name, method.rank, method.dropout) == ("miss", rank, 0.1)


@pytest.mark.parametrize("init", ["bat", "mini"])
def test_the_other_modes_of_pefts_miss_are_refused_by_name(init, tmp_path):
    config = peft.MissConfig(r=8, mini_r=8, init_weights=init, target_modules=["q_proj"], task_type="CAUSAL_LM")
    pefts("llama", config, tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=f"does not do here: init_weights: '{init}'"):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
@pytest.mark.parametrize("cayley", ["neumann", "exact"])
@pytest.mark.parametrize("shared", [False, True])
def test_oft_goes_both_ways(shared, cayley, family, tmp_path):
    ours = with_adapter(family, OFT(block_size=8, shared=shared, cayley=cayley), tmp_path / "adapter")
    same(ours, peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter"))
    config = peft.OFTConfig(
        oft_block_size=8,
        block_share=shared,
        use_cayley_neumann=cayley == "neumann",
        target_modules=targets_of(family),
        task_type="CAUSAL_LM",
    )
    method = there_and_back(family, config, tmp_path)
    assert (method.name, method.block_size, method.shared, method.cayley) == ("oft", 8, shared, cayley)


@pytest.mark.parametrize("asked", [{"oft_block_size": 24}, {"oft_block_size": 0, "r": 2}], ids=str)
def test_the_block_size_that_peft_has_chosen_is_read_off_the_tensors(asked, tmp_path):
    config = peft.OFTConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **asked)
    assert there_and_back("llama", config, tmp_path).block_size == 16
    config = peft.OFTConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **asked)
    pefts("llama", config, tmp_path / "mixed")
    with pytest.raises(ArtifactError, match=r"oft_block_size: PEFT has made it \[16, 24\] in different matrices"):
        load_adapter(Base(tiny("llama")), tmp_path / "mixed")


@pytest.mark.parametrize("asked", [{"coft": True}, {"num_cayley_neumann_terms": 7}], ids=str)
def test_what_oft_does_not_do_is_refused_by_name(asked, tmp_path):
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM", **asked)
    pefts("llama", config, tmp_path / "theirs")
    ((key, value),) = asked.items()
    with pytest.raises(ArtifactError, match=f"does not do here: {key}: {value}"):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


@pytest.mark.parametrize("method", [MiSS(rank=8), OFT(block_size=8)], ids=lambda method: method.name)
def test_where_peft_has_no_such_method_it_refuses_ours_and_we_load_it(method, tmp_path):
    """GPT-2's Conv1D."""
    ours = with_adapter("gpt2", method, tmp_path / "adapter")
    with pytest.raises(KeyError, match=f"TRIMTAB_{method.name.upper()}"):
        peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "adapter")
    again = Base(tiny("gpt2"))
    assert load_adapter(again, tmp_path / "adapter").method == method
    assert torch.equal(logits(again.model), logits(ours))
