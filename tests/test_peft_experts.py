"""The real PEFT library computes what we do for LoRA on fused experts, its `target_parameters`; both ways."""

import json

import pytest
import torch
from families import perturb, random_rows
from mixtures import MIXTURES, mixture
from safetensors.torch import load_file, save_file

from trimtab import attach
from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.deploy import load_adapter, save_adapter
from trimtab.methods.dora import DoRA
from trimtab.methods.ia3 import IA3
from trimtab.methods.lora import LoRA
from trimtab.methods.miss import MiSS

peft = pytest.importorskip("peft")

IDS = torch.tensor(random_rows(11, 11))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def same(ours, theirs):
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=2e-5)


OURS = {
    "everything": LoRA(rank=3, alpha=5.0, dropout=0.1),
    "ranks": LoRA(rank=4, alpha=6.0, rank_stabilized=True, ranks={"down_proj": 2, r"experts\..*": 3}, alphas={"down_proj": 2.5}),
    "one-matrix": LoRA(rank=3, targets=["experts.down_proj", r".*layers\.1.*\.(gate_)?up_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", OURS)
def test_peft_loads_ours(name, family, tmp_path):
    model, method = mixture(family), OURS[name]
    if family == "nemotron_h" and name != "one-matrix":  # PEFT refuses out_proj of its state-space layers
        method = method.model_copy(update={"targets": ("attention", "experts", r"shared_experts\..*")})
    adapter = attach(model, method)
    perturb(adapter.parameters(), 0.1)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert any(".experts." in target for target in config["target_parameters"])
    theirs = peft.PeftModel.from_pretrained(mixture(family), tmp_path / "adapter")
    same(theirs, model)
    assert (logits(theirs) - logits(mixture(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("asked", [["UP", "down_proj"], ["down_proj"], ["experts.UP"]], ids=str)
def test_we_load_pefts(asked, family, tmp_path):
    up = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    asked = [name.replace("UP", up) for name in asked]
    patterns = {"rank_pattern": {r"experts\.down_proj": 2}, "alpha_pattern": {rf".*1.*{up}": 3}} if len(asked) == 2 else {}
    target = "q_b_proj" if family == "deepseek_v3" else "q_proj"
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=[target], target_parameters=asked, task_type="CAUSAL_LM", use_rslora=True, **patterns
    )
    theirs = peft.get_peft_model(mixture(family), config).eval()
    perturb({n: p for n, p in theirs.named_parameters() if "lora_" in n}, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    base = Base(mixture(family))
    adapter = load_adapter(base, tmp_path / "theirs")
    same(base.model, theirs)
    assert (logits(base.model) - logits(mixture(family))).abs().max() > 1e-2
    save_adapter(base, adapter, tmp_path / "ours")
    same(peft.PeftModel.from_pretrained(mixture(family), tmp_path / "ours"), theirs)


def test_the_layout_is_pefts_and_no_other(tmp_path):
    """Experts of B by rank, the second parameter wrapped around the first: in any other order the tensors fit as well."""
    model = mixture("mixtral")
    perturb(attach(model, LoRA(rank=3)).parameters(), 0.1)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("0.mlp.experts.lora_B.weight"))
    save_file(tensors | {key: tensors[key].unflatten(1, (4, 3)).mT.flatten(1).contiguous()}, file)
    theirs = peft.PeftModel.from_pretrained(mixture("mixtral"), tmp_path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() > 1e-2


@pytest.mark.parametrize("method", [DoRA(rank=3), MiSS(rank=4), IA3()], ids=lambda method: method.name)
def test_what_peft_has_no_form_for_is_ours_alone_and_pefts_refuses_it(method, tmp_path):
    model = mixture("olmoe")
    perturb(attach(model, method).parameters(), 0.1)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == f"TRIMTAB_{method.name.upper()}"
    with pytest.raises((ValueError, KeyError), match="TRIMTAB"):
        peft.PeftModel.from_pretrained(mixture("olmoe"), tmp_path / "adapter")
    base = Base(mixture("olmoe"))
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base.model), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(target_parameters=["experts.down_proj"]), r"names 1 parameters of .*experts \(down_proj\), and there are"),
        (lambda c, t: c.update(r=5), r"has the shape \(16, 32\), which is not of experts with factors of rank 5"),
        (lambda c, t: c.update(r=2), r"A: has shape \(8, 2, 32\), expected \(4, 2, 32\)"),
        (lambda c, t: c["target_parameters"].append("router.odd"), r"target_parameters: .*no tensors for router.odd"),
        (lambda c, t: t.pop(next(n for n in t if ".experts.base_layer.lora_A" in n)), r"experts.gate_up_proj.A: missing"),
    ],
)  # fmt: skip
def test_an_adapter_of_pefts_that_does_not_fit_is_refused(change, message, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(mixture("olmoe"), config).save_pretrained(tmp_path / "theirs")
    where, file = tmp_path / "theirs" / "adapter_config.json", tmp_path / "theirs" / "adapter_model.safetensors"
    settings, tensors = json.loads(where.read_text()), load_file(file)
    settings["target_parameters"] = sorted(settings["target_parameters"])
    change(settings, tensors)
    where.write_text(json.dumps(settings))
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(Base(mixture("olmoe")), tmp_path / "theirs")


def test_a_router_of_pefts_is_refused_by_name(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"], task_type="CAUSAL_LM")
    peft.get_peft_model(mixture("olmoe"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=r"model.layers.0.mlp.gate"):
        load_adapter(Base(mixture("olmoe")), tmp_path / "theirs")


def test_a_mixture_without_the_interface_is_one_for_peft(tmp_path):
    """PEFT goes by the model's type: it would take LongCat's dense MLPs for its experts, which we leave."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    torch.manual_seed(0)
    model, plain = (
        LongcatFlashForCausalLM(
            LongcatFlashConfig(
                vocab_size=97, hidden_size=32, ffn_hidden_size=48, expert_ffn_hidden_size=16, num_layers=1, num_attention_heads=4,
                n_routed_experts=4, moe_topk=2, zero_expert_num=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
                v_head_dim=8, head_dim=8, max_position_embeddings=64,
            )
        ).eval()
        for _ in range(2)
    )  # fmt: skip
    plain.load_state_dict(model.state_dict())
    base = Base(model.requires_grad_(False))
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    assert any("mlps.0.gate_proj" in path for path in adapter.layers)
    same(model, peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
