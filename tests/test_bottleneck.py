"""Bottleneck adapters are their equations, in whole blocks of every family, and the `adapters` library computes the same of them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, perturb, random_rows, tiny
from safetensors.torch import load_file, save_file

from trimtab.base import Base
from trimtab.core.errors import ArtifactError, NotMergeable, RecipeError, UnsupportedModel
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, save_adapter
from trimtab.engine import pack_logprobs
from trimtab.methods import Routing, active, attach, routed
from trimtab.methods._adapterhub import _reduction
from trimtab.methods.bottleneck import BottleneckAdapter
from trimtab.report.folders import folder_facts

IDS = torch.tensor(random_rows(7, 7))
KINDS = ("houlsby", "pfeiffer", "parallel")
THEIRS = Path(__file__).parent / "fixtures" / "adapters_library"

FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
}

ATTENTION = {"gpt2": "attn.c_proj"}
BLOCKS = {  # the block's output from its input, what attention made of it, and the MLP
    "llama": lambda b, x, a, mlp: (r := x + a) + mlp(b.post_attention_layernorm(r)),
    "phi3": lambda b, x, a, mlp: (r := x + a) + mlp(b.post_attention_layernorm(r)),
    "gpt2": lambda b, x, a, mlp: (r := x + a) + mlp(b.ln_2(r)),
    "gemma2": lambda b, x, a, mlp: (r := x + b.post_attention_layernorm(a)) + b.post_feedforward_layernorm(
        mlp(b.pre_feedforward_layernorm(r))
    ),
    "cohere": lambda b, x, a, mlp: x + a + mlp(b.input_layernorm(x)),
    "granite": lambda b, x, a, mlp: (r := x + a * b.residual_multiplier)
    + mlp(b.post_attention_layernorm(r)) * b.residual_multiplier,
}  # fmt: skip


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def attached(model, name="default", seed=0, **hyperparameters):
    adapter = attach(model, BottleneckAdapter(**{"width": 5, **hyperparameters}), name=name)
    perturb(adapter.parameters(), seed=seed)
    return adapter


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def network(layer, h, activation="relu"):
    """up(act(down(h))), a token at a time."""
    D, c, U, u = (layer.own_parameters()[name] for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
    return torch.stack([torch.stack([U @ FORMULAS[activation](D @ v + c) + u for v in row]) for row in h])


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_its_equation_in_float64(family, kind):
    model = tiny(family, torch.float64)
    adapter = attached(model, kind=kind, scale=1.7)
    place = ATTENTION.get(family, "self_attn.o_proj")
    seen = {}
    block, path = blocks(model)[1], next(p for p in adapter.layers if p.endswith(".1.mlp")).removesuffix(".mlp")
    output = block.get_submodule(place)
    output = getattr(output, "base", output)
    output.register_forward_hook(lambda module, args, out: seen.update(attention=out))
    block.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    logits(model)

    def mlp(z):
        y = block.mlp.base(z)
        return y + 1.7 * network(adapter.layers[f"{path}.mlp"], z if kind == "parallel" else y)

    attention = seen["attention"]
    if kind == "houlsby":
        attention = attention + 1.7 * network(adapter.layers[f"{path}.{place}"], attention)
    with torch.no_grad():
        expected = BLOCKS[family](block, seen["x"], attention, mlp)
        bare = BLOCKS[family](block, seen["x"], seen["attention"], block.mlp.base)
    out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out - bare).abs().max() > 1e-2


@pytest.mark.parametrize("activation", FORMULAS)
def test_each_activation_is_its_formula(activation):
    adapter = attached(tiny("llama", torch.float64), activation=activation, scale=0.5)
    layer = adapter.layers["model.layers.1.mlp"]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    y = layer.base(x)
    torch.testing.assert_close(layer(x), y + 0.5 * network(layer, y, activation), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_adapters_and_the_count_is_the_formula(family):
    for kind, each in zip(KINDS, (2, 1, 1), strict=True):
        model = tiny(family)
        adapter = attach(model, BottleneckAdapter(kind=kind, width=6))
        assert len(adapter.layers) == each * 2
        assert sum(p.numel() for p in adapter.parameters().values()) == each * 2 * (2 * 32 * 6 + 6 + 32)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_all_of_it_learns(kind):
    model = tiny("llama")
    before = logits(model)
    adapter = attach(model, BottleneckAdapter(kind=kind))
    assert torch.equal(logits(model), before)
    perturb(adapter.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.count_nonzero(p.grad) > 0 for p in adapter.parameters().values())


SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MOE = SMALL | dict(
    num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2
)  # fmt: skip


def mixture(family):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "moe_intermediate_size": 16} if family == "qwen3_moe" else {"num_local_experts": 4}
    if family == "gpt_oss":
        experts["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.AutoConfig.for_model(family, **{**MOE, **experts})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_experts_that_hands_on_its_routers_scores_still_does(kind):
    model = mixture("gpt_oss")
    before = logits(model)
    adapter = attach(model, BottleneckAdapter(kind=kind, width=5))
    assert torch.equal(logits(model), before)
    perturb(adapter.parameters())
    layer = adapter.layers["model.layers.0.mlp"]
    x = torch.randn(1, 6, 32)
    out, scores = layer(x)
    y, plain_scores = layer.base(x)
    assert torch.equal(scores, plain_scores)
    with torch.no_grad():
        torch.testing.assert_close(out, y + network(layer, x if kind == "parallel" else y), rtol=1e-4, atol=1e-5)
        with routed(Routing([adapter.switch, None, adapter.switch, None, None, None])):
            mixed, _ = layer(x)
    assert torch.equal(mixed[:, [1, 3, 4, 5]], y[:, [1, 3, 4, 5]])
    torch.testing.assert_close(mixed[:, [0, 2]], out[:, [0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: tiny("gemma2"), lambda: mixture("qwen3_moe")])
def test_rows_of_several_adapters_in_one_batch_equal_the_rows_alone(make):
    model = make()
    for seed, kind in enumerate(KINDS):
        attached(model, kind, seed, kind=kind)
    rows = [TokenRow(ids, list(range(1, len(ids))), "row") for ids in random_rows(9, 6, 7, 5)]
    owners = ["parallel", None, "houlsby", "pfeiffer"]
    with torch.no_grad():
        together = pack_logprobs(model, pack_flat(rows), owners)
        for one, row, owner in zip(together, rows, owners, strict=True):
            with active(model, *([owner] if owner else [])):
                assert float(one) == pytest.approx(float(pack_logprobs(model, pack_flat([row]))), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers.0 of OPTForCausalLM has no MLP"),
        ("bloom", {}, "transformer.h.0.mlp of BloomForCausalLM takes hidden_states, residual "),
    ],
)
def test_a_model_without_a_place_for_it_is_refused(family, sizes, message):
    config = transformers.AutoConfig.for_model(family, **SMALL, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedModel) as caught:
        attach(model, BottleneckAdapter())
    assert str(caught.value).startswith(message)
    assert list(model.state_dict()) == keys


def test_a_block_that_is_not_like_the_others_is_refused_by_name():
    model = tiny("llama")
    model.model.layers[1].self_attn.out_proj = torch.nn.Linear(32, 32)
    assert attach(model, BottleneckAdapter(), name="only the MLP").layers
    with pytest.raises(UnsupportedModel) as caught:
        attach(model, BottleneckAdapter(kind="houlsby"))
    assert str(caught.value) == (
        "model.layers.1 of LlamaForCausalLM has 2 attention output projections, and a bottleneck adapter needs one in every "
        "block. Looked for: Wo, c_proj, dense, o_proj, out_proj. Found: self_attn.o_proj, self_attn.out_proj."
    )
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModel, match="has 3 layers by its configuration, and no lists of so many modules"):
        attach(model, BottleneckAdapter(), name="another")


def test_it_is_no_change_of_weights():
    layer = attached(tiny("llama")).layers["model.layers.0.mlp"]
    with pytest.raises(NotMergeable, match="has an activation between its two matrices"):
        layer.merge()


def test_the_width_is_given_or_the_models_divided():
    assert attach(tiny("llama"), BottleneckAdapter(reduction=8)).layers["model.layers.0.mlp"].down.out_features == 4
    assert attach(tiny("llama"), BottleneckAdapter(reduction=100)).layers["model.layers.0.mlp"].down.out_features == 1
    assert attach(tiny("llama"), BottleneckAdapter()).layers["model.layers.0.mlp"].down.out_features == 64
    with pytest.raises(RecipeError, match="width and reduction are two measures of one thing: give one of them"):
        BottleneckAdapter(width=4, reduction=8)


@pytest.mark.parametrize("values", [{"width": 0}, {"reduction": 0}, {"scale": 0.0}, {"activation": "swish"}, {"kind": "both"}])
def test_hyperparameters_out_of_range_are_refused(values):
    with pytest.raises(RecipeError, match=f"^{next(iter(values))}: expected "):
        BottleneckAdapter(**values)


# The `adapters` library


def base_of(family):
    return Base.load_folder(THEIRS / family / "base", torch.float32, torch.device("cpu"), with_tokenizer=False)


@pytest.fixture
def theirs(tmp_path):
    """A copy of what the library saved, after the MLP, for Llama."""
    return Path(shutil.copytree(THEIRS / "llama" / "after_mlp", tmp_path / "theirs"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("double_seq_bn", BottleneckAdapter(kind="houlsby", width=4, activation="silu")),
        ("after_mlp", BottleneckAdapter(kind="pfeiffer", width=5, activation="gelu", scale=2.5)),
    ],
)
def test_we_load_the_librarys_and_save_it_as_the_library_would(family, name, expected, tmp_path):
    given, base = load_file(THEIRS / family / "logits.safetensors"), base_of(family)
    adapter = load_adapter(base, THEIRS / family / name)
    assert adapter.method == expected
    torch.testing.assert_close(logits(base.model, given["ids"]), given[name], rtol=1e-5, atol=1e-5)
    assert (given[name] - given["base"]).abs().max() > 1
    save_adapter(base, adapter, tmp_path / "ours")
    mine, its = (load_file(folder / "adapter.safetensors") for folder in (tmp_path / "ours", THEIRS / family / name))
    assert {key.replace(".adapters.trimtab.", f".adapters.{name}.") for key in mine} == its.keys()
    assert all(torch.equal(t, its[key.replace(".adapters.trimtab.", f".adapters.{name}.")]) for key, t in mine.items())
    mine, its = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "ours", THEIRS / family / name)
    )
    same = {"model_type", "model_class", "hidden_size", "version"}
    assert {key: mine[key] for key in same} == {key: its[key] for key in same}
    assert mine["modules"] == {}
    assert mine["config"].keys() <= its["config"].keys()
    widths = {16 // one["config"].pop("reduction_factor") for one in (mine, its)}
    assert widths == {expected.width}
    its["config"]["non_linearity"] = its["config"]["non_linearity"].replace("swish", "silu")
    assert mine["config"].items() <= {key: its["config"].get(key) for key in mine["config"]}.items()
    assert isinstance(mine["config"]["scaling"], float)  # the library takes nothing else for a number
    again = base_of(family)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again.model, given["ids"]), logits(base.model, given["ids"]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_comes_back(family, kind, tmp_path):
    base = Base(tiny(family))
    adapter = attached(base.model, kind=kind, scale=2.0, activation="gelu_tanh")
    save_adapter(base, adapter, tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter.safetensors").exists() == (kind != "parallel")
    again = Base(tiny(family))
    assert load_adapter(again, tmp_path / "ours").method == adapter.method
    assert torch.equal(logits(again.model), logits(base.model))
    (tmp_path / "ours" / "trimtab.json").unlink()
    again = Base(tiny(family))
    if kind == "parallel":  # which no other library computes, so nothing else says what it is
        with pytest.raises(ArtifactError, match="Trimtab has no method for PEFT's TRIMTAB_BOTTLENECK"):
            load_adapter(again, tmp_path / "ours")
    else:
        assert load_adapter(again, tmp_path / "ours").method == adapter.method
        assert torch.equal(logits(again.model), logits(base.model))


def test_modules_of_other_names_come_back_too(tmp_path):
    config = transformers.AutoConfig.for_model("gpt_neox", **SMALL, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    base = Base(transformers.AutoModelForCausalLM.from_config(config).eval())
    adapter = attached(base.model, kind="houlsby")
    save_adapter(base, adapter, tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert stored["modules"] == {
        f"gpt_neox.layers.{n}.attention_adapters": f"gpt_neox.layers.{n}.attention.dense" for n in (0, 1)
    }
    before = logits(base.model)
    adapter.detach()
    load_adapter(base, tmp_path / "ours")
    assert torch.equal(logits(base.model), before)


@pytest.mark.parametrize(("name", "key"), [("seq_bn", "original_ln_before: True"), ("par_bn", "is_parallel: True")])
def test_what_the_library_computes_from_the_residual_stream_is_refused_by_name(name, key):
    with pytest.raises(ArtifactError) as caught:
        load_adapter(base_of("llama"), THEIRS / "llama" / name)
    assert f"asks for what Trimtab does not do here: {key}. A bottleneck adapter" in str(caught.value)


@pytest.mark.parametrize("change", [{"non_linearity": "relu"}, {"scaling": 1.0}])
def test_reading_another_activation_or_scale_would_show(change, theirs):
    """The negative control of the comparison with the library's logits."""
    edit(theirs, config=change)
    given, base = load_file(THEIRS / "llama" / "logits.safetensors"), base_of("llama")
    load_adapter(base, theirs)
    assert (logits(base.model, given["ids"]) - given["after_mlp"]).abs().max() > 0.1


def edit(folder, *, config=None, top=None, tensors=None):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"] |= config or {}
    path.write_text(json.dumps(content | (top or {})))
    if tensors is not None:
        changed = load_file(folder / "adapter.safetensors")
        tensors(changed)
        save_file(changed, folder / "adapter.safetensors")


DOWN = "model.layers.0.output_adapters.adapters.after_mlp.adapter_down.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"scaling": "learned"}}, "scaling: 'learned'"),
        ({"config": {"non_linearity": "mish"}}, "non_linearity: 'mish'"),
        ({"config": {"original_ln_after": False}}, "original_ln_after: False"),
        ({"config": {"leave_out": [1]}}, r"leave_out: \[1\]"),
        ({"config": {"output_adapter": False, "mh_adapter": True}}, "output_adapter: False"),
        ({"config": {"architecture": "lora", "r": 8}}, "architecture: 'lora'; r: 8"),
        ({"config": {"new_in_version_2": True}}, "new_in_version_2: True"),
        ({"top": {"config": None}}, "does not describe the adapter"),
        ({"top": {"version": "0.1"}}, "it has no peft_type"),
        ({"tensors": lambda t: t.pop(DOWN)}, r"layers\.0\.mlp\.down\.weight: missing"),
        ({"tensors": lambda t: t.update(odd=torch.zeros(1))}, "not a bottleneck adapter's: odd"),
        ({"tensors": lambda t: t.update({DOWN: torch.zeros(3, 16)})}, r"bottlenecks of 2 widths \(\[3, 5\]\)"),
        ({"tensors": lambda t: t.update({DOWN: t[DOWN] * math.inf})}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(change, message, theirs):
    edit(theirs, **change)
    base = base_of("llama")
    keys = list(base.model.state_dict())
    with pytest.raises(ArtifactError, match=message):
        load_adapter(base, theirs)
    assert list(base.model.state_dict()) == keys


def test_a_pickle_or_a_head_beside_it_is_refused_with_what_to_do(theirs):
    (theirs / "head_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"holds a head beside the adapter .* save it with with_head=False"):
        load_adapter(base_of("llama"), theirs)
    (theirs / "adapter.safetensors").rename(theirs / "pytorch_adapter.bin")
    with pytest.raises(ArtifactError, match=r"pytorch_adapter\.bin, a pickle, which is never read: .* use_safetensors=True"):
        load_adapter(base_of("llama"), theirs)


def test_it_can_be_shown_unverified():
    facts = folder_facts(THEIRS / "llama" / "after_mlp")["adapter"]
    assert (facts["verified"], facts["method"]["name"], facts["tensors"]) == (False, "adapters", 8)


def test_the_library_finds_the_width_from_the_reduction():
    for hidden in (16, 49, 576, 4096):
        for width in range(1, 2 * hidden, max(1, hidden // 200)):
            assert int(hidden // _reduction(hidden, width)) == width
