"""The real PEFT library loads our adapters, and we load its; logits are the same both ways."""

import json

import pytest
import torch
from families import FAMILIES, perturb, random_rows, tiny
from safetensors.torch import load_file, save_file

from trimtab.base import Base
from trimtab.core.errors import ArtifactError
from trimtab.deploy import load_adapter, save_adapter
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

peft = pytest.importorskip("peft")

IDS = torch.tensor(random_rows(11, 11))
TARGETS = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning", "ignore::FutureWarning")  # PEFT's own


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def some_targets(family):
    return TARGETS.get(family, ["q_proj", "down_proj"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("everything", [True, False])
def test_peft_loads_ours(family, everything, tmp_path):
    base = Base(tiny(family))
    adapter = attach(base.model, LoRA(rank=4, alpha=6.0, targets="all-linear" if everything else some_targets(family)))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(base.model), rtol=1e-5, atol=1e-5)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_pefts(family, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=some_targets(family), lora_dropout=0.1, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny(family), config).eval()
    perturb({n: p for n, p in theirs.named_parameters() if "lora_" in n})
    theirs.save_pretrained(tmp_path / "theirs")
    base = Base(tiny(family))
    adapter = load_adapter(base, tmp_path / "theirs")
    assert (adapter.method.rank, adapter.method.alpha, adapter.method.dropout) == (4, 7.0, 0.1)
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=1e-5, atol=1e-5)
    # And back: what we save of it, PEFT reads as the same.
    save_adapter(base, adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


def test_only_some_layers_survive_the_way_to_peft(tmp_path):
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=2, targets=[r".*layers\.1\..*", "layers.0.self_attn.q_proj"]))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]
    assert "model.layers.1.self_attn.k_proj" in config["target_modules"]
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(base.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},  # which changes the base
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5, 6]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=lambda asked: "-".join(map(str, *asked.items())),
)
def test_what_we_would_compute_differently_is_refused(asked, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **asked)
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    base = Base(tiny("llama"))
    with pytest.raises(ArtifactError) as caught:
        load_adapter(base, tmp_path / "theirs")
    assert next(iter(asked)) in str(caught.value)
    assert attach(base.model, LoRA())  # the model was left as it was


@pytest.mark.parametrize(
    "asked",
    [
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "lora_ga"},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"ensure_weight_tying": True},
        {"use_qalora": True},
        {"a_key_of_tomorrow": 1},
    ],
    ids=lambda asked: "-".join(map(str, *asked.items())),
)
def test_a_key_that_asks_for_more_is_refused_by_name(asked, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    ((key, value),) = asked.items()
    with pytest.raises(ArtifactError) as caught:
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")
    assert f"asks for what Trimtab does not do here: {key}: {value!r}." in str(caught.value)


def _edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
            "layers.0.self_attn.q_proj.A: missing",
        ),
        (lambda t: t.update(odd=torch.zeros(1)), "holds a tensor that is not LoRA's: odd"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
            "'model.layers.9.self_attn.q_proj' matches no module",
        ),
        (lambda t: t.update({n: v.T.contiguous() for n, v in t.items() if "layers.1" in n and "lora_B" in n}), "has shape"),
        (lambda t: t.update({n: v * float("inf") for n, v in t.items() if "lora_A" in n}), "not finite"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_an_adapter_of_pefts_that_does_not_fit_is_refused(change, message, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    _edit(tmp_path / "theirs", change)
    base = Base(tiny("llama"))
    keys = list(base.model.state_dict())
    with pytest.raises(ArtifactError) as caught:
        load_adapter(base, tmp_path / "theirs")
    assert message in str(caught.value)
    assert list(base.model.state_dict()) == keys


@pytest.fixture
def ours(tmp_path):
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_saving_twice_gives_the_same_bytes(ours, tmp_path):
    base = Base(tiny("llama"))
    adapter = load_adapter(base, ours)
    save_adapter(base, adapter, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "trimtab.json"):
        assert (tmp_path / "again" / name).read_bytes() == (ours / name).read_bytes()


def test_an_adapter_of_another_base_is_refused_with_what_differs(ours):
    with pytest.raises(ArtifactError, match=r"was trained on another base than .* different weights"):
        load_adapter(Base(tiny("llama", seed=1)), ours)
    with pytest.raises(ArtifactError, match="different config"):
        load_adapter(Base(tiny("mistral")), ours)
    with pytest.raises(ArtifactError, match="different weights"):
        load_adapter(Base(tiny("llama", torch.bfloat16)), ours)


def test_every_flipped_bit_is_noticed(ours):
    """Of the weights file all through, in steps; of the JSON files in every byte."""
    for name, stride in (("adapter_model.safetensors", 211), ("adapter_config.json", 1)):
        path = ours / name
        content = path.read_bytes()
        for at in range(0, len(content), stride):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(ArtifactError):
                load_adapter(Base(tiny("llama")), ours)
        path.write_bytes(content)
    load_adapter(Base(tiny("llama")), ours)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_refused_by_name(ours, name):
    (ours / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_adapter(Base(tiny("llama")), ours)


def test_a_pickle_is_never_read(ours):
    (ours / "adapter_model.safetensors").rename(ours / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="a pickle, which is never read"):
        load_adapter(Base(tiny("llama")), ours)


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", "eight"), ("lora_alpha", -1), ("r", 0), ("lora_dropout", 2)])
def test_a_configuration_of_pefts_out_of_range_is_refused(key, value, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=r"theirs: (alpha|rank|dropout): expected "):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")
