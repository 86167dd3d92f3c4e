"""(IA)³, BitFit and LayerNorm tuning: their equations, what they find in a model, and PEFT's and merged equals of them."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, perturb, random_rows, tiny

from trimtab.base import Base
from trimtab.core.errors import ArtifactError, NoSuchModule, NotMergeable, RecipeError
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.methods import attach
from trimtab.methods.bitfit import BitFit
from trimtab.methods.ia3 import IA3
from trimtab.methods.layernorm import LayerNormTuning

peft = pytest.importorskip("peft")

IDS = torch.tensor(random_rows(11, 11))
pytestmark = pytest.mark.filterwarnings(  # PEFT's own
    "ignore:Detected that the base layer has no bias term:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore::FutureWarning",
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def layer_of(method, family, path, dtype=torch.float64):
    layer = attach(tiny(family, dtype), method).layers[path]
    perturb(layer.own_parameters())
    return layer


def lasts(method, family):
    """The adapted modules of the first block and outside the blocks, by the last part of their paths."""
    return [path.rpartition(".")[2] for path in method.sites(tiny(family)) if ".1." not in path]


# Equations


def test_ia3_is_its_equations_in_float64():
    """Liu et al. 2022, section 3.3: l_k ⊙ k and l_v ⊙ v in attention, W₂ (l_ff ⊙ γ(W₁ x)) in the feed-forward layer."""
    layer = layer_of(IA3(), "qwen2", "model.layers.0.self_attn.k_proj")
    x, (w, b, scale) = torch.randn(2, 5, 32, dtype=torch.float64), (layer.base.weight, layer.base.bias, layer.scale)
    expected = torch.stack([torch.stack([scale * (w @ v + b) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    layer = layer_of(IA3(), "qwen2", "model.layers.0.mlp.down_proj")
    x, (w, scale) = torch.randn(2, 5, 48, dtype=torch.float64), (layer.base.weight, layer.scale)
    expected = torch.stack([torch.stack([w @ (scale * v) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_ia3_scales_a_bfloat16_base_in_float32():
    """1.003 is 1 in bfloat16; of most numbers, 1.003 times is still another bfloat16 number or the same by rounding."""
    layer = layer_of(IA3(), "llama", "model.layers.0.self_attn.k_proj", torch.bfloat16)
    layer.scale.data.fill_(1.003)
    x = torch.randn(50, 32).bfloat16()
    assert torch.equal(layer(x), (layer.base(x).float() * 1.003).bfloat16())
    assert not torch.equal(layer(x), layer.base(x))


def test_bitfit_is_its_equation_in_float64():
    layer = layer_of(BitFit(), "llama", "model.layers.0.mlp.up_proj")
    x, (w, bias) = torch.randn(2, 5, 32, dtype=torch.float64), (layer.base.weight, layer.bias)
    expected = torch.stack([torch.stack([w @ v + bias for v in row]) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    layer = layer_of(BitFit(), "gpt2", "transformer.ln_f")
    w, b, bias = layer.base.weight, layer.base.bias, layer.bias
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = w * (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() + b + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_layernorm_tuning_is_the_norms_equation_with_other_weights():
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    layer = layer_of(LayerNormTuning(), "gpt2", "transformer.h.0.ln_1")
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), layer.weight * normal + layer.bias, rtol=1e-12, atol=1e-12)
    root = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for family, shift in (("llama", 0), ("gemma2", 1)):  # Gemma's norms multiply by 1 + weight
        layer = layer_of(LayerNormTuning(), family, "model.norm")
        expected = (layer.weight + shift) * x / root
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # these norms compute in float32


# What they find


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_finds_keys_values_and_the_ends_of_feed_forward_layers(family):
    expected = {"gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj", "down_proj"]}.get(family, ["k_proj", "v_proj", "down_proj"])
    assert sorted(lasts(IA3(), family)) == sorted(expected)
    (attention, *_), layers = IA3().sites(tiny(family)), attach(tiny(family), IA3()).layers
    assert [path for path, layer in layers.items() if layer.on_inputs] == [path for path in layers if ".mlp." in path]
    assert ".mlp." not in attention


def test_ia3_finds_feed_forward_layers_under_other_names():
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
        )
    )
    assert [path.rpartition(".")[2] for path in IA3().sites(model)] == ["k_proj", "v_proj", "fc2"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm", "norm"]),
        ("qwen3", ["q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm"]),
        ("gpt2", ["ln_1", "ln_2", "ln_f"]),
        ("cohere", ["input_layernorm", "norm"]),
        (
            "gemma3",
            [
                "q_norm",
                "k_norm",
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
                "norm",
            ],
        ),
    ],
)
def test_layernorm_tuning_finds_the_norms(family, expected):
    assert lasts(LayerNormTuning(), family) == expected


def test_norms_of_heads_whose_weight_is_a_matrix_are_found():
    config = tiny("cohere").config
    config.use_qk_norm = True
    model = transformers.CohereForCausalLM(config)
    found = LayerNormTuning().sites(model)
    assert [path.rpartition(".")[2] for path in found if ".0." in path] == ["q_norm", "k_norm", "input_layernorm"]
    assert model.model.layers[0].self_attn.k_norm.weight.ndim == 2


def test_bitfit_finds_matrices_and_norms_that_have_a_bias():
    assert lasts(BitFit(), "gpt2") == ["ln_1", "c_attn", "c_proj", "ln_2", "c_fc", "c_proj", "ln_f"]
    assert lasts(BitFit(), "llama") == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert lasts(BitFit(targets=["mlp", "ln_f"]), "gpt2") == ["c_fc", "c_proj", "ln_f"]


# Refusals


def moe():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=97, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_experts=4
        )
    )


def latent():
    """DeepSeek's attention makes keys and values in ways that no scale of a matrix's outputs is."""
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (
            moe,
            lambda: BitFit(),
            r"targets: all includes model\.layers\.0\.mlp\.experts\.gate_up_proj, which holds .* 4 experts",
        ),
        (latent, lambda: IA3(), r"outputs: auto finds no keys and values in DeepseekV3ForCausalLM"),
        (lambda: tiny("llama"), lambda: IA3(outputs=["k_porj"]), r"outputs: 'k_porj' matches no module"),
        (lambda: tiny("llama"), lambda: IA3(inputs=["self_attn"]), r"inputs: 'self_attn' names .* a LlamaAttention"),
        (
            lambda: tiny("llama"),
            lambda: IA3(outputs=["down_proj"]),
            r"inputs: model.layers.0.mlp.down_proj is among `outputs` too",
        ),
        (lambda: tiny("llama"), lambda: IA3(outputs=[], inputs=[]), r"both empty"),
        (
            lambda: tiny("llama"),
            lambda: LayerNormTuning(targets="q_proj"),
            r"(?s)targets: 'q_proj' names none of.*post_attention_",
        ),
        (lambda: tiny("llama"), lambda: BitFit(targets="norm"), r"targets: 'norm' names none of"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(make, method, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(RecipeError, match=message):
        attach(model, method())
    assert list(model.state_dict()) == keys


def test_named_targets_do_without_what_cannot_be_found():
    assert IA3(inputs=[]).sites(moe()) == [f"model.layers.0.self_attn.{name}_proj" for name in "kv"]
    assert BitFit(targets="q_proj").sites(moe()) == ["model.layers.0.self_attn.q_proj"]
    assert issubclass(NoSuchModule, RecipeError)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [("attention", "auto"), (["auto", "q_proj"], []), ([r".*(up|gate)_proj"], "mlp.down_proj"), ([], "all-linear")]
)  # fmt: skip
def test_ia3_scales_the_side_that_was_asked_for(outputs, inputs):
    layers = attach(tiny("llama"), IA3(outputs=outputs, inputs=inputs)).layers
    on_outputs = {path.rpartition(".")[2] for path, layer in layers.items() if not layer.on_inputs}
    on_inputs = {path.rpartition(".")[2] for path, layer in layers.items() if layer.on_inputs}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (on_outputs, on_inputs) in (
        ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"down_proj"}),
        ({"q_proj", "k_proj", "v_proj"}, set()),
        ({"up_proj", "gate_proj"}, {"down_proj"}),
        (set(), everything),
    )
    assert all(layer.scale.shape == (layer.base.weight.shape[layer.on_inputs],) for layer in layers.values())


# PEFT

METHODS = {
    "ia3": lambda family: IA3(),
    "ia3-some": lambda family: IA3(outputs=["layers.1.self_attn.o_proj", "up_proj"], inputs=["layers.0.self_attn.o_proj"]),
    "layernorm": lambda family: LayerNormTuning(),
    "bitfit": lambda family: BitFit(),
}
CASES = [(n, f) for n in METHODS for f in FAMILIES if (n, f) != ("bitfit", "gpt2") and (n != "ia3-some" or f == "llama")]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_peft_loads_ours(name, family, tmp_path):
    base = Base(tiny(family))
    adapter = attach(base.model, METHODS[name](family))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(base.model), rtol=1e-5, atol=1e-5)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2
    again = load_adapter(other := Base(tiny(family)), tmp_path / "adapter")
    assert again.method == adapter.method
    assert torch.equal(logits(other.model), logits(base.model))
    (tmp_path / "adapter" / "trimtab.json").unlink()  # and without our own words, by PEFT's alone
    load_adapter(other := Base(tiny(family)), tmp_path / "adapter")
    assert torch.equal(logits(other.model), logits(base.model))


def config_of_pefts(kind, family):
    names = {"gpt2": ("c_attn", "mlp.c_proj", "ln_2"), "phi3": ("qkv_proj", "down_proj", "post_attention_layernorm")}
    attention, down, norm = names.get(family, ("v_proj", "down_proj", "input_layernorm"))
    if kind == "ia3":
        return peft.IA3Config(target_modules=[attention, down], feedforward_modules=[down], task_type="CAUSAL_LM")
    if kind == "layernorm":
        last = "ln_f" if family == "gpt2" else "norm"
        return peft.LNTuningConfig(target_modules=[last if family == "cohere" else norm, last], task_type="CAUSAL_LM")
    return peft.BeftConfig(target_modules=[attention, down], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("kind", "family"), [(k, f) for k in ("ia3", "layernorm", "bitfit") for f in FAMILIES if (k, f) != ("bitfit", "gpt2")]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
def test_we_load_pefts(kind, family, tmp_path):
    theirs = peft.get_peft_model(tiny(family), config_of_pefts(kind, family)).eval()
    perturb({n: p for n, p in theirs.named_parameters() if "ia3_" in n or "ln_tuning_" in n or "beft_" in n})
    theirs.save_pretrained(tmp_path / "theirs")
    base = Base(tiny(family))
    adapter = load_adapter(base, tmp_path / "theirs")
    assert adapter.method.name == kind
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(base.model) - logits(tiny(family))).abs().max() > 1e-2
    save_adapter(base, adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


def test_peft_refuses_biases_that_it_has_no_place_for_by_name(tmp_path):
    base = Base(tiny("gpt2"))
    adapter = attach(base.model, BitFit())
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_BITFIT"):
        peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "adapter")
    load_adapter(other := Base(tiny("gpt2")), tmp_path / "adapter")
    assert torch.equal(logits(other.model), logits(base.model))


@pytest.mark.parametrize("kind", ["ia3", "layernorm", "bitfit"])
def test_what_we_would_compute_differently_is_refused(kind, tmp_path):
    config = config_of_pefts(kind, "llama")
    config.modules_to_save = ["lm_head"]
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match="modules_to_save"):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


def test_an_adapter_of_pefts_on_modules_that_are_no_norms_is_refused(tmp_path):
    peft.get_peft_model(tiny("llama"), peft.LNTuningConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=r"self_attn\.q_proj' names none of the modules"):
        load_adapter(Base(tiny("llama")), tmp_path / "theirs")


# Merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [IA3(), LayerNormTuning()], ids=lambda method: method.name)
def test_merged_it_is_a_plain_model_with_equal_logits(method, family, tmp_path):
    base = Base(tiny(family))
    perturb((adapter := attach(base.model, method)).parameters())
    before = logits(base.model)
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)
    assert (before - logits(tiny(family))).abs().max() > 1e-2
    assert torch.equal(logits(base.model), before)


@pytest.mark.parametrize(("family", "targets"), [("gpt2", "all"), ("qwen2", ["q_proj", "k_proj", "v_proj"])])
def test_biases_are_merged_into_those_that_the_architecture_has(family, targets, tmp_path):
    base = Base(tiny(family))
    perturb((adapter := attach(base.model, BitFit(targets=targets))).parameters())
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), logits(base.model), rtol=1e-4, atol=1e-4)
    assert (logits(plain) - logits(tiny(family))).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "where"), [("llama", "self_attn.q_proj"), ("qwen2", "self_attn.o_proj")])
def test_a_bias_with_nowhere_to_go_is_refused_and_nothing_is_written(family, where, tmp_path):
    base = Base(tiny(family))
    with pytest.raises(NotMergeable, match=rf"model\.layers\.0\.{where} has no bias in this architecture"):
        merge(base, attach(base.model, BitFit()), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_is_scaled_with_its_outputs_is_merged_scaled():
    layer = layer_of(IA3(), "qwen2", "model.layers.0.self_attn.v_proj")
    layer.base.bias.data.normal_()
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = F.linear(x, layer.scale[:, None] * layer.base.weight, layer.scale * layer.base.bias)
    torch.testing.assert_close(layer.merge()(x), expected, rtol=1e-12, atol=1e-12)
