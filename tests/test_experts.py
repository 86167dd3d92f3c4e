"""Adapters on fused experts: against a reference that goes token by token, plain Transformers, and the rows alone."""

import pytest
import torch
import transformers
from families import perturb, random_rows, tiny
from mixtures import MIXTURES, experts_of, mixture, one_by_one
from torch import nn

from trimtab.base import Base
from trimtab.core.errors import NoSuchModule, RecipeError, UnsupportedModel
from trimtab.data import TokenRow, pack_flat
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import pack_logprobs
from trimtab.methods import Method, Routing, active, attach, combine, left_frozen, routed
from trimtab.methods._experts_layer import ExpertMatrices, ExpertsLayer, Rows
from trimtab.methods._lowrank import LowRankExperts
from trimtab.methods.bitfit import BitFit
from trimtab.methods.dora import DoRA
from trimtab.methods.ia3 import IA3
from trimtab.methods.lora import LoRA
from trimtab.methods.miss import MiSS
from trimtab.methods.oft import OFT

IDS = torch.tensor(random_rows(11, 11))
METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, ranks={"down_proj": 2}, rank_stabilized=True),
    "dora": DoRA(rank=3, alpha=5.0),
    "miss": MiSS(rank=6),
    "ia3": IA3(outputs=[r".*\.experts\.(gate_)?up_proj"], inputs=["experts.down_proj"]),
}
FORMS = ["mixtral", "gpt_oss", "nemotron_h"]
"""One mixture of each form of matrices: gated, transposed with biases, without a gate."""
CASES = [(name, family) for name in METHODS for family in (MIXTURES if name == "lora" else FORMS)]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def routing(model, tokens=7, seed=0):
    """Inputs of experts: tokens, the experts of each, and their weights, in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    path, own = next(iter(experts_of(model).items()))
    count, size = own.down_proj.shape[0], own.down_proj.shape[2 if own.is_transposed else 1]
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(own.down_proj.dtype)
    chosen = torch.stack([torch.randperm(count - 1, generator=generator)[:2] for _ in range(tokens)])  # one expert has no token
    shares = torch.rand(tokens, 2, generator=generator, dtype=torch.float64).to(x.dtype)
    return path, own, x, chosen, shares


def changed(name, layer, weights):
    """The matrices with an adapter's change, by each method's equation."""
    new = {}
    for key, w in weights.items():
        part = layer._modules.get(key)
        if name in ("lora", "dora"):
            w = torch.stack([m + part.scale * b @ a for m, a, b in zip(w, part.A, part.B, strict=True)])
        if name == "dora":
            w = part.magnitude[:, :, None] * w / w.norm(dim=2, keepdim=True).detach()
        if name == "miss":
            inputs = torch.arange(w.shape[2])
            w = torch.stack([m + d.T[:, inputs % len(d)] for m, d in zip(w, part.D, strict=True)])
        if name == "ia3":
            w = torch.stack([m * s if key == "down_proj" else s[:, None] * m for m, s in zip(w, part.scale, strict=True)])
        new[key] = w
    return new


def matrices(own):
    names = ("gate_up_proj" if own.has_gate else "up_proj", "down_proj")
    return {name: getattr(own, name).mT if own.is_transposed else getattr(own, name) for name in names}


def differs(name, family, dtype):
    """The largest difference of the layer from the reference, of its result and of all gradients, relative to the largest value."""
    model = mixture(family, dtype)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the other has no float64
    path, own, x, chosen, shares = routing(model)
    layer = attach(model, METHODS[name]).layers[path]
    perturb(dict(layer.own_parameters()), 0.3)
    x, shares = x.requires_grad_(), shares.requires_grad_()
    found = layer(x, chosen, shares)
    biases = {key: getattr(own, f"{key}_bias") for key in matrices(own)} if own.has_bias else {}
    if name == "ia3" and own.has_bias:  # the outputs are scaled with their bias
        biases["gate_up_proj"] = biases["gate_up_proj"] * layer.gate_up_proj.scale
    expected = one_by_one(own, changed(name, layer, matrices(own)), x, chosen, shares, biases)
    inputs = [x, shares, *layer.own_parameters().values()]
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, grad)],
        [expected, *torch.autograd.grad(expected, inputs, grad)],
        strict=True,
    )
    return max(float(((ours - theirs).abs().max() / theirs.abs().max()).detach()) for ours, theirs in pairs)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_layer_is_its_equation_and_so_are_its_gradients(name, family):
    assert differs(name, family, torch.float64) <= 1e-10
    assert differs(name, family, torch.float32) <= 1e-4


@pytest.mark.parametrize(
    ("where", "what", "broken"),
    [
        (LowRankExperts, "add", lambda self, y, x, at, B: y + at.rows.times(at.rows.times(x, self.A), B)),  # no scale
        (Rows, "of", lambda self, values: values[self.expert.flip(0)]),
        (LowRankExperts, "adapt", lambda self, base, at, x: self.add(base(x), x, at, self.B.roll(1, 0))),
        (Rows, "times", lambda self, x, m: torch.einsum("sn,smn->sm", x, m[self.expert.roll(1)])),
    ],
)  # fmt: skip
def test_the_reference_notices(where, what, broken, monkeypatch):
    monkeypatch.setattr(where, what, broken)
    assert differs("lora", "gpt_oss", torch.float64) > 1e-3


@pytest.mark.parametrize(
    ("name", "family", "implementation"),
    [*((*case, "grouped_mm") for case in CASES), *(("lora", family, "eager") for family in MIXTURES)],
)
def test_a_fresh_adapter_and_one_switched_off_change_no_bit(name, family, implementation):
    model = mixture(family)
    model.set_experts_implementation(implementation)
    before = logits(model)
    adapter = attach(model, METHODS[name])
    assert any(isinstance(layer, ExpertsLayer) for layer in adapter.layers.values())
    assert sum(p.numel() for p in adapter.parameters().values()) == adapter.method.parameter_count(model)
    assert torch.equal(logits(model), before)
    perturb(adapter.parameters())
    assert (logits(model) - before).abs().max() > 1e-2
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    adapter.detach()
    assert torch.equal(logits(model), before)


def test_with_the_adapter_off_the_models_own_implementation_runs(monkeypatch):
    model = mixture("olmoe")
    adapter = attach(model, LoRA(rank=2))
    monkeypatch.setattr(ExpertsLayer, "adapt", lambda *_: pytest.fail("adapted"))
    with adapter.disabled():
        logits(model)
    with pytest.raises(pytest.fail.Exception):
        logits(model)


def test_no_gradient_of_a_frozen_matrix_is_computed():
    model = mixture("mixtral")
    attach(model, LoRA(rank=4, targets="experts"))
    shapes = set()

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "mm" in str(function):
                shapes.add(tuple(out.shape))
            return out

    with Products():
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    big = {shape for shape in shapes if len(shape) == 3 and sorted(shape[1:])[0] > 8}
    assert not big & {(4, 96, 32), (4, 32, 96), (4, 32, 48), (4, 48, 32)}
    assert {(4, 32, 8), (4, 8, 32)} & shapes  # A's and B's gradients were seen


# Merging


@pytest.mark.parametrize(("name", "family"), CASES)
def test_merged_experts_are_the_layer(name, family):
    model = mixture(family, torch.float64)
    model.config._experts_implementation = "eager"
    path, own, x, chosen, shares = routing(model)
    layer = attach(model, METHODS[name]).layers[path]
    perturb(dict(layer.own_parameters()), 0.3)
    plain = layer.merge()
    assert type(plain) is type(own)
    torch.testing.assert_close(plain(x, chosen, shares), layer(x, chosen, shares), rtol=1e-9, atol=1e-9)
    assert (plain(x, chosen, shares) - own(x, chosen, shares)).abs().max() > 1e-2
    for key in matrices(own):
        assert getattr(plain, key).shape == getattr(own, key).shape
        assert getattr(plain, key).is_contiguous()


def test_a_merge_that_is_rounded_says_what_is_left(tmp_path):
    """Unrounded, plain Transformers loads it with the adapter's results: see the packs below."""
    base = Base(mixture("gpt_oss"))
    adapter = attach(base.model, LoRA(rank=3))
    perturb(adapter.parameters(), 0.1)
    assert 0.9 < merge(base, adapter, tmp_path / "merged", dtype=torch.bfloat16).retained < 1.0


# Packs, routing, several adapters


def learned(*rows):
    return [TokenRow(ids, list(range(3, len(ids))), "here", len(ids)) for ids in rows]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_pack_is_its_rows_alone_with_the_merged_weights(family, tmp_path):
    base = Base(mixture(family))
    adapter = attach(base.model, LoRA(rank=3))
    perturb(adapter.parameters(), 0.1)
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    rows = random_rows(9, 13, 6)
    found = pack_logprobs(base.model, pack_flat(learned(*rows)))
    for row, one in zip(rows, found.detach(), strict=True):
        ids = torch.tensor([row])
        logp = logits(plain, ids)[0].log_softmax(-1)
        alone = sum(logp[n - 1, row[n]] for n in range(3, len(row)))
        assert float(one) == pytest.approx(float(alone), rel=1e-4)
    found.sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapter.parameters().items()}
    for p in adapter.parameters().values():
        p.grad = None
    for row in rows:
        pack_logprobs(base.model, pack_flat(learned(row))).sum().backward()
    for name, p in adapter.parameters().items():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_every_row_of_a_pack_has_its_own_adapter(family):
    model = Base(mixture(family)).model
    for seed, (name, method) in enumerate([("one", LoRA(rank=3)), ("two", MiSS(rank=6)), ("three", IA3())]):
        perturb(attach(model, method, name=name).parameters(), 0.1, seed)
    rows, owners = random_rows(9, 13, 6, 8), ["one", None, "three", "two"]
    together = pack_logprobs(model, pack_flat(learned(*rows)), owners)
    values = set()
    for row, owner, one in zip(rows, owners, together.detach(), strict=True):
        with active(model, *([owner] if owner else [])):
            assert float(one) == pytest.approx(float(pack_logprobs(model, pack_flat(learned(row)))[0].detach()), rel=1e-5)
        with active(model):
            values.add(abs(float(one) - float(pack_logprobs(model, pack_flat(learned(row)))[0].detach())) > 1e-2)
    assert values == {True, False}  # the adapters move them, but for the base's own row


def test_the_layer_routes_tokens_whatever_their_experts():
    model = mixture("gpt_oss")
    path, own, x, chosen, shares = routing(model)
    first, second = (attach(model, LoRA(rank=3), name=name) for name in ("a", "b"))
    for seed, adapter in enumerate((first, second)):
        perturb(adapter.parameters(), 0.2, seed)
    owners = [first.switch, None, second.switch, second.switch, None, first.switch, first.switch]
    with torch.no_grad():
        alone = {None: own(x, chosen, shares)}
        for adapter in (first, second):
            with active(model, adapter.name):
                alone[adapter.switch] = second.layers[path](x, chosen, shares)
        with routed(Routing(owners)):
            found = second.layers[path](x, chosen, shares)
    for n, owner in enumerate(owners):
        torch.testing.assert_close(found[n], alone[owner][n], rtol=1e-5, atol=1e-5)
        assert all((found[n] - other[n]).abs().max() > 1e-3 for key, other in alone.items() if key is not owner)


def test_adapters_that_act_together_both_change_the_matrices():
    model = mixture("qwen3_moe", torch.float64)
    model.config._experts_implementation = "eager"
    path, own, x, chosen, shares = routing(model)
    first = attach(model, LoRA(rank=3, targets="experts"), name="a")
    second = attach(model, LoRA(rank=2, targets="experts.down_proj"), name="b")
    for seed, adapter in enumerate((first, second)):
        perturb(adapter.parameters(), 0.2, seed)
    weights = changed("lora", first.layers[path], matrices(own))
    part = second.layers[path].down_proj
    weights["down_proj"] = weights["down_proj"] + part.scale * part.B @ part.A
    with active(model, "a", "b"):
        found = second.layers[path](x, chosen, shares)
    torch.testing.assert_close(found, one_by_one(own, weights, x, chosen, shares))
    done = combine(model, {"a": 1.0, "b": 1.0}, "both")
    torch.testing.assert_close(done.adapter.layers[path](x, chosen, shares), found)
    small = combine(model, {"a": 1.0, "b": 1.0}, "small", rank=2)
    assert 0 < small.error < 1


def test_a_copy_of_the_weights_and_a_change_of_them_act_together():
    model = mixture("qwen3_moe")
    path, own, x, chosen, shares = routing(model)
    copies = attach(model, Method.member("full")(), name="full")
    change = attach(model, LoRA(rank=2, targets="experts"), name="lora")
    for adapter in (copies, change):
        perturb(adapter.parameters(), 0.05)
    weights = {name: copies.layers[path].own_parameters()[name] for name in matrices(own)}
    with active(model, "full", "lora"):
        found = change.layers[path](x, chosen, shares)
    torch.testing.assert_close(
        found, one_by_one(own, changed("lora", change.layers[path], weights), x, chosen, shares), rtol=1e-4, atol=1e-4
    )


# Files


@pytest.mark.parametrize(("name", "family"), [*((name, "gpt_oss") for name in METHODS), ("lora", "deepseek_v3")])
def test_a_saved_adapter_is_loaded_whole(name, family, tmp_path):
    base = Base(mixture(family))
    adapter = attach(base.model, METHODS[name])
    perturb(adapter.parameters(), 0.1)
    save_adapter(base, adapter, tmp_path / "adapter")
    other = Base(mixture(family))
    again = load_adapter(other, tmp_path / "adapter")
    assert again.method == adapter.method
    assert torch.equal(logits(other.model), logits(base.model))
    assert (logits(other.model) - logits(mixture(family))).abs().max() > 1e-2


# Dropout


def test_dropout_is_that_of_each_experts_inputs():
    model = mixture("olmoe")
    path, _, x, chosen, _ = routing(model, tokens=400)
    adapter = attach(model, LoRA(rank=4, dropout=0.5, targets="experts.gate_up_proj"))
    perturb(adapter.parameters())
    part, rows = adapter.layers[path].gate_up_proj, Rows.sort(chosen, 4, False)
    at, inputs = ExpertMatrices(torch.empty(0), None, rows), x[rows.order // 2]

    def change():
        return part.adapt(lambda x: x.new_zeros(len(x), 96), at, inputs)

    plain = change().detach()
    assert torch.equal(plain, change())
    adapter.train()
    torch.manual_seed(0)
    dropped = change().detach()
    assert (dropped - plain).abs().mean() > 0.1
    assert abs(float((dropped * plain).sum() / plain.square().sum()) - 1) < 0.05  # what is kept is scaled up


# Targets


EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("gate_up_proj", {"experts.gate_up_proj"}),
        ("down_proj", {"experts.down_proj", "shared_experts.down_proj"}),
        ("experts.down_proj", {"experts.down_proj"}),
        ("mlp.experts.down_proj", {"experts.down_proj"}),
        ("model.layers.1.mlp.experts.down_proj", {"experts.down_proj"}),
        ("experts", EXPERTS),
        (r".*\.experts", EXPERTS),
        (r"experts\..*", EXPERTS),
        (r"(experts|shared_experts)\.down_proj", {"experts.down_proj", "shared_experts.down_proj"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [LoRA, MiSS])
def test_experts_have_names(kind, targets, named):
    method, model = kind(targets=targets, rank=4), mixture("deepseek_v3")
    found = {path.removeprefix("model.layers.1.mlp.") for path in method.shapes(model) if ".1.mlp." in path}
    assert found == named
    assert sum(p.numel() for p in attach(model, method).parameters().values()) == method.parameter_count(model)


def test_a_rank_is_found_by_the_name_of_an_experts_matrix():
    method = LoRA(rank=4, ranks={r"experts\..*": 2, "down_proj": 3}, alphas={"gate_up_proj": 7.0})
    layers = attach(mixture("deepseek_v3"), method).layers
    experts = layers["model.layers.1.mlp.experts"]
    assert experts.gate_up_proj.A.shape == (4, 2, 32)
    assert experts.down_proj.B.shape == (4, 32, 2)
    assert (experts.gate_up_proj.scale, experts.down_proj.scale) == (3.5, 16.0)
    assert layers["model.layers.1.mlp.shared_experts.down_proj"].A.shape == (3, 16)
    with pytest.raises(NoSuchModule, match=r"ranks: 'q_proj' matches none of the targets: .*experts|ranks: 'q_proj'"):
        attach(mixture("olmoe"), LoRA(targets="experts", ranks={"q_proj": 2}))


def test_a_misspelt_name_of_experts_is_corrected():
    with pytest.raises(NoSuchModule, match=r"'gate_up_porj' matches no module .* Did you mean 'gate_up_proj'\?"):
        LoRA(targets="gate_up_porj").sites(mixture("olmoe"))
    with pytest.raises(NoSuchModule, match=r"'mlp' names model.layers.0.mlp, a OlmoeSparseMoeBlock.* write mlp\\\.\.\*"):
        LoRA(targets="mlp").sites(mixture("olmoe"))


class OldExperts(nn.Module):
    """A mixture as in Transformers 4: a linear layer that chooses, and a list of experts."""

    def __init__(self, choose="gate"):
        super().__init__()
        self.add_module(choose, nn.Linear(32, 3))
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(32, 8), "w2": nn.Linear(8, 32)}) for _ in range(3))
        self.shared_expert_gate = nn.Linear(32, 1)


@pytest.mark.parametrize("choose", ["gate", "router", "switch"])
def test_a_router_that_is_a_linear_layer_stays_frozen_unless_it_is_named(choose):
    model = tiny("llama")
    model.model.layers[0].mlp = OldExperts(choose)
    method = LoRA(rank=2)
    sites = {path.removeprefix("model.layers.0.mlp.") for path in method.sites(model) if ".0.mlp." in path}
    assert sites == {f"experts.{n}.{name}" for n in range(3) for name in ("w1", "w2")} | {"shared_expert_gate"}
    assert method.left_frozen(model) == "1 × Linear (router, which chooses the experts)"
    assert LoRA(targets=[f"mlp.{choose}"]).sites(model) == [f"model.layers.0.mlp.{choose}"]
    model.model.layers[
        0
    ].mlp.experts = nn.Identity()  # without experts, one that is not called a router is a matrix as others are
    assert (f"model.layers.0.mlp.{choose}" in method.sites(model)) == (choose != "router")


def test_all_linear_says_what_it_leaves():
    model = mixture("nemotron_h")
    said = "1 × Conv1d (convolution), 2 × NemotronHTopkRouter (router, which chooses the experts)"
    for method in (LoRA(), MiSS(rank=4), IA3(inputs="all-linear", outputs=[])):
        assert method.left_frozen(model) == left_frozen(model) == said
    assert LoRA(targets="attention").left_frozen(model) == ""
    assert left_frozen(tiny("llama")) == left_frozen(tiny("gpt2")) == ""
    model.model.layers[0].mixer.odd = nn.Bilinear(2, 2, 2)
    assert "1 × Bilinear (not a linear layer)" in left_frozen(model)
    model.model.layers[1].mixer.experts.has_gate = None
    assert "1 × NemotronHExperts (experts without Transformers' interface for them)" in left_frozen(model)


def test_attention_is_found_by_its_structure():
    sites = LoRA(targets="attention").sites(mixture("nemotron_h"))
    assert sites == [f"model.layers.2.mixer.{name}_proj" for name in "qkvo"]
    layers = attach(mixture("nemotron_h"), IA3()).layers
    assert [path for path in layers if "layers.2" in path] == [f"model.layers.2.mixer.{name}_proj" for name in "kv"]


# Refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (OFT(block_size=16), r"targets: 'all-linear' includes model.layers.0.mlp.experts.gate_up_proj, .* 4 experts .* Use lora"),
        (OFT(block_size=16, targets="experts"), r"targets: 'experts' includes .*experts.gate_up_proj"),
        (BitFit(), r"targets: all includes model.layers.0.mlp.experts.gate_up_proj"),
        (BitFit(targets="experts"), r"targets: 'experts' names none of the modules"),
        (LoRA(init="pissa"), r"init: pissa starts from each matrix by itself, and model.layers.0.mlp.experts.gate_up_proj holds"),
        (LoRA(init="eva"), r"init: eva starts from each matrix by itself"),
        (MiSS(rank=40), r"rank: 40 is more than the 32 inputs"),
    ],
)  # fmt: skip
def test_what_has_no_form_for_experts_is_refused_by_name(method, message):
    model = mixture("olmoe")
    keys = list(model.state_dict())
    with pytest.raises(RecipeError, match=message):
        attach(model, method)
    assert list(model.state_dict()) == keys
    elsewhere = {"targets": ("q_proj",)} | {"lora": {"init": "default"}, "miss": {"rank": 8}}.get(method.name, {})
    assert attach(model, method.model_copy(update=elsewhere)).layers


def test_experts_split_over_processes_are_refused():
    model = mixture("olmoe")
    next(iter(experts_of(model).values()))._is_expert_parallel = True
    with pytest.raises(UnsupportedModel, match="experts of OlmoeExperts are split over processes"):
        attach(model, LoRA())
