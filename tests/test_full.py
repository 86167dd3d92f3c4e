"""Full fine-tuning is what plain torch does with a model whose parameters require gradients, to the last digits."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, logprob_alone, perturb, random_rows, tiny
from kinds import KINDS, kind
from torch import nn

from trimtab.base import Base
from trimtab.base.fingerprint import own_weights
from trimtab.core.errors import ArtifactError, NoSuchModule, RecipeError, UnsupportedModel
from trimtab.data import pack_all, pack_flat
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import ensure_checked, generate, pack_logprobs
from trimtab.engine.patching import unfused
from trimtab.evaluate.reference import HALF_TOLERANCE, TOLERANCE, logprob_tolerance
from trimtab.methods import attach
from trimtab.methods.full import Full
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

IDS = torch.tensor(random_rows(11, 11))
ROWS = [
    TokenRow(ids, list(range(start, len(ids))), f"row:{n}", len(ids))
    for n, (ids, start) in enumerate(zip(random_rows(9, 14, 3, 11), (7, 2, 2, 1), strict=True))
]
LEARNED = sum(len(row.target_indices) for row in ROWS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def plain_loss(model):
    """The mean over the learned tokens of rows alone, by the model's own forward pass."""
    return -sum(logprob_alone(model, row.ids, row.target_indices) for row in ROWS) / LEARNED


def moe(dtype=torch.float32):
    """A mixture of experts, whose weights are 3-D parameters, and whose router is no linear layer."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    config._experts_implementation = "eager" if dtype == torch.float64 else None  # the default has no float64
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model.eval().requires_grad_(False).to(dtype)


READ = ["gated DeltaNet", "KDA", "Mamba 1", "Mamba 2 with limits", "short convolution", "masks with learned numbers"]
"""Models with layers that have weights of their own, or read those of convolutions without calling them."""


def checked(name, dtype=torch.float64):
    model = kind(name, dtype).requires_grad_(False)
    ensure_checked(model)
    return model


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: tiny("gpt2", torch.float64), 1e-10),
        *((lambda name=name: checked(name), 1e-3) for name in READ),
        *((lambda family=family: tiny(family, torch.float64), 1e-6) for family in ("llama-tied", "qwen2", "gemma2", "phi3")),
        (lambda: moe(torch.float64), 1e-6),  # as in the others, its norms compute in float32
    ],
)
def test_gradients_of_all_parameters_are_those_of_the_plain_model(make, tolerance):
    plain = make().requires_grad_(True)
    plain_loss(plain).backward()
    adapter = attach(make(), Full())
    pack = pack_flat(ROWS)
    SFT().loss(pack_logprobs(adapter.model, pack), pack, 0.0).div(LEARNED).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert adapter.parameters().keys() == expected.keys()
    for name, parameter in adapter.parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    assert all(p.grad is None for layer in adapter.layers.values() for p in layer.base.parameters(recurse=False))


@pytest.mark.parametrize("name", ["chunks, counted tokens", "head sizes by layer, shared keys"])
def test_copies_act_in_norms_that_layers_by_hand_call(name):
    """Which compute by the module that they stand in, or by its twin with the copies."""
    model = KINDS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    adapter = attach(model.eval().requires_grad_(False).double(), Full())
    perturb(adapter.parameters(), 0.1)
    pack, found = pack_flat(ROWS), []
    for computed in (nullcontext, unfused):
        with computed():
            pack_logprobs(model, pack).sum().backward()
        found.append({name: parameter.grad for name, parameter in adapter.parameters().items()})
        for parameter in adapter.parameters().values():
            parameter.grad = None
    assert [name for name, gradient in found[0].items() if gradient is None] == []
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_steps_of_the_training_loop_are_plain_torchs(family):
    plain = tiny(family, torch.float64).requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        plain_loss(plain).backward()
        optimizer.step()
    base = Base(tiny(family, torch.float64))
    adapter = attach(base.model, Full())
    settings = TrainConfig(schedule="constant", warmup=0.0, clip=None, weight_decay=0.1)
    list(train(base, adapter, SFT(), [pack_all(ROWS, 20)] * 3, settings, 1e-3))
    before = tiny(family, torch.float64).state_dict()
    for name, parameter in plain.named_parameters():
        assert (parameter - before[name]).abs().max() > 1e-3, name
        # Adam divides by the gradient's size: where that is all but zero, a rounding error decides.
        close = torch.isclose(adapter.parameters()[name], parameter, rtol=1e-6, atol=1e-8)
        assert close.double().mean() > 0.98, name
    torch.testing.assert_close(logits(base.model), logits(plain), rtol=1e-4, atol=1e-4)
    with adapter.disabled():
        assert torch.equal(logits(base.model), logits(tiny(family, torch.float64)))


def test_tied_matrices_share_one_parameter_and_others_none():
    layers = attach(tiny("llama-tied"), Full()).layers
    assert layers["lm_head"].weight is layers["model.embed_tokens"].weight
    layers = attach(tiny("llama"), Full()).layers
    assert layers["lm_head"].weight is not layers["model.embed_tokens"].weight


def test_on_a_bfloat16_base_it_is_the_model_whose_weights_are_the_rounded_masters():
    base = Base(tiny("llama-tied", torch.bfloat16))
    adapter = attach(base.model, Full())
    perturb(adapter.parameters(), 0.02)
    rounded = tiny("llama-tied", torch.bfloat16)
    rounded.load_state_dict({name: p.bfloat16() for name, p in adapter.parameters().items()}, strict=False)
    assert torch.equal(logits(base.model), logits(rounded))
    assert not torch.equal(next(iter(adapter.parameters().values())), rounded.model.embed_tokens.weight.float())


@pytest.mark.parametrize("name", ["gated DeltaNet", "short convolution"])
def test_weights_that_the_model_reads_itself_are_those_that_act_now(name):
    model, untouched = kind(name, torch.bfloat16), kind(name, torch.bfloat16)
    adapter = attach(model, Full())
    perturb(adapter.parameters(), 0.02)
    rounded = copy.deepcopy(untouched)
    rounded.load_state_dict({name: p.bfloat16() for name, p in adapter.parameters().items()}, strict=False)
    assert torch.equal(logits(model), logits(rounded))
    with adapter.disabled():
        assert torch.equal(logits(model), logits(untouched))
    assert not torch.equal(logits(model), logits(untouched))


@pytest.mark.parametrize("name", READ)
def test_answers_are_those_of_the_model_with_these_weights(name):
    """Layers that carry state keep it from one token to the next, whichever weights they have."""
    model, plain, prompts = checked(name, torch.float32), checked(name, torch.float32), [row.ids for row in ROWS]
    adapter = attach(model, Full())
    perturb(adapter.parameters(), 0.1)
    plain.load_state_dict(dict(adapter.parameters()), strict=False)
    with adapter.disabled():
        before = generate(model, prompts, (), max_new_tokens=8)
    answers = generate(model, prompts, (), max_new_tokens=8)
    assert answers == generate(plain, prompts, (), max_new_tokens=8)
    assert answers != before


def test_rows_of_several_adapters_are_refused_where_the_model_reads_weights_itself():
    model = kind("short convolution")
    for name in "ab":
        perturb(attach(model, Full(), name=name).parameters())
    with pytest.raises(UnsupportedModel, match=r"reads weight of Conv1d itself, for rows of several adapters"), torch.no_grad():
        pack_logprobs(model, pack_flat(ROWS), ["a", None, "b", "a"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, HALF_TOLERANCE), (torch.float32, TOLERANCE)])
def test_references_are_compared_with_the_precision_of_the_base(dtype, tolerance):
    base = Base(tiny("llama", dtype))
    attach(base.model, Full())
    assert logprob_tolerance(base) == tolerance


def test_the_base_is_never_touched_while_the_adapter_runs():
    """Another thread may be running it."""
    model = tiny("llama")
    own = model.model.layers[0].mlp.down_proj
    seen = []
    own.register_forward_hook(lambda module, *_: seen.append((module.weight, own.weight)))
    weight = own.weight
    layer = attach(model, Full(targets="down_proj")).layers["model.layers.0.mlp.down_proj"]
    logits(model)
    (used, left_alone), *_ = seen
    assert (used is layer.weight, left_alone is weight) == (True, True)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("values", "trained"),
    [
        ({"targets": "mlp"}, lambda path: ".mlp." in path),
        ({"targets": ["layers.1", "model.norm"]}, lambda path: ".layers.1." in path or path == "model.norm"),
        ({"targets": r".*(q|k)_proj"}, lambda path: path.endswith(("q_proj", "k_proj"))),
        ({"freeze": ["embed_tokens", "lm_head"]}, lambda path: path not in ("model.embed_tokens", "lm_head")),
        ({"targets": "self_attn", "freeze": r".*\.0\..*"}, lambda path: ".layers.1.self_attn." in path),
    ],
)
def test_names_and_expressions_choose_modules_with_all_that_is_in_them(family, values, trained):
    model = tiny(family)
    method = Full(**values)
    holders = [path for path, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert method.sites(model) == [path for path in holders if trained(path)]
    adapter = attach(model, method)
    perturb(adapter.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters().values())


def test_what_is_tied_is_trained_or_frozen_together():
    ends = {"model.embed_tokens", "lm_head"}
    tied = tiny("llama-tied")
    assert set(Full(targets="embed_tokens").sites(tied)) == ends
    assert ends.isdisjoint(Full(freeze="lm_head").sites(tied))
    assert Full(targets="embed_tokens").sites(tiny("llama")) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"targets": "q_porj"}, NoSuchModule, r"targets: 'q_porj' names none of the modules of LlamaForCausalLM"),
        ({"freeze": ["lm_head", "wpe"]}, NoSuchModule, r"freeze: 'wpe' names none of the modules"),
        ({"freeze": "model", "targets": "mlp"}, RecipeError, r"freeze: leaves nothing to train"),
        ({"targets": []}, RecipeError, r"targets: "),
        ({"freeze": "(x"}, RecipeError, r"freeze: '\(x' is neither a module name nor a regular expression"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        attach(tiny("llama"), Full(**values))


def test_quantized_weights_are_refused_by_name():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.down_proj\.weight is quantized"):
        attach(model, Full())
    assert attach(model, Full(freeze="layers.1.mlp.down_proj")).layers


def test_lora_on_top_adds_to_the_trained_weights_in_either_order():
    path, x = "model.layers.0.self_attn.q_proj", torch.randn(3, 32)
    for order in (("full", "lora"), ("lora", "full")):
        model = tiny("qwen2")
        methods = {"full": Full(), "lora": LoRA(rank=2, alpha=4.0)}
        layers = {name: attach(model, methods[name], name=name).layers[path] for name in order}
        for number, name in enumerate(order):
            perturb(layers[name].own_parameters(), seed=number)
            layers[name].switch.on = True
        weight, bias = layers["full"].weight, layers["full"].bias
        expected = F.linear(x, weight + 2.0 * layers["lora"].B @ layers["lora"].A, bias)
        torch.testing.assert_close(model.get_submodule(path)(x), expected, rtol=1e-5, atol=1e-5)


def test_two_that_retrain_the_same_weights_do_not_act_at_once():
    model = tiny("llama")
    first = attach(model, Full(), name="first")
    perturb(attach(model, Full(), name="second").parameters())
    logits(model)
    first.enable()
    with pytest.raises(RecipeError, match="cannot act at once"):
        logits(model)


@pytest.mark.parametrize("make", [lambda: tiny("gpt2"), lambda: tiny("llama-tied"), moe])
def test_rows_of_one_batch_each_with_their_own_weights_are_the_rows_alone(make):
    model = make()
    for seed, name in enumerate("ab"):
        perturb(attach(model, Full(), name=name).parameters(), seed=seed)
    owners = ["a", None, "b", "a"]
    with torch.no_grad():
        mixed = pack_logprobs(model, pack_flat(ROWS), owners)
        alone = torch.cat([pack_logprobs(model, pack_flat([row]), [one]) for row, one in zip(ROWS, owners, strict=True)])
        others = pack_logprobs(model, pack_flat(ROWS), ["b", "a", None, "b"])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    assert (mixed - others).abs().min() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_a_plain_model_with_the_trained_weights(family, tmp_path):
    base = Base(tiny(family))
    adapter = attach(base.model, Full())
    perturb(adapter.parameters())
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), logits(base.model), rtol=1e-5, atol=1e-5)
    assert (logits(plain) - logits(tiny(family))).abs().max() > 1e-2
    assert dict(plain.named_parameters()).keys() == adapter.parameters().keys()  # what was tied is
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, adapter.parameters()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tied_base_of_another_number_type_is_merged_tied_and_in_float32(dtype, tmp_path):
    base = Base(tiny("llama-tied", dtype))
    adapter = attach(base.model, Full())
    perturb(adapter.parameters(), 0.01)
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, adapter.layers["lm_head"].own_parameters()["weight"].float())
    assert sum(f.stat().st_size for f in (tmp_path / "merged").glob("*.safetensors")) < 1.1 * 4 * plain.num_parameters()


def test_saved_it_is_read_back_and_not_taken_for_one_of_pefts(tmp_path):
    base = Base(tiny("llama-tied", torch.bfloat16))
    adapter = attach(base.model, Full(freeze="layers.0"))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    other = Base(tiny("llama-tied", torch.bfloat16))
    again = load_adapter(other, tmp_path / "adapter")
    assert again.method == adapter.method
    assert torch.equal(logits(other.model), logits(base.model))
    assert again.layers["lm_head"].own_parameters()["weight"] is again.layers["model.embed_tokens"].own_parameters()["weight"]
    peft = pytest.importorskip("peft")
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_FULL"):
        peft.PeftModel.from_pretrained(tiny("llama-tied"), tmp_path / "adapter")
    (tmp_path / "adapter" / "trimtab.json").unlink()
    with pytest.raises(ArtifactError, match="has no method for PEFT's TRIMTAB_FULL"):
        load_adapter(Base(tiny("llama-tied")), tmp_path / "adapter")


def test_detached_the_model_is_the_very_one_it_was():
    model = tiny("gpt2")
    before = dict(own_weights(model))
    untouched = copy.deepcopy(before)
    adapter = attach(model, Full())
    perturb(adapter.parameters())
    adapter.detach()
    assert all(own_weights(model)[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in before.items())
