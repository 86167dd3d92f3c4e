"""What every method in `methods/` must do besides the invariants: on the other families, and in Transformers' own forward pass."""

import invariants.suite as invariants
import pytest
import torch
from families import FAMILIES, method_of, perturb, random_rows, tiny
from mixtures import mixture
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core.errors import ArtifactError, NoSuchModule, RecipeError
from trimtab.data import Segment
from trimtab.engine.forward import hidden_states
from trimtab.engine.head import head_of
from trimtab.engine.layouts import PackLayout
from trimtab.methods import Method, Sample, attach
from trimtab.methods.lora import LoRA

METHODS = Method.names()
OTHERS = [family for family in FAMILIES if family not in invariants.FAMILIES]
IDS = torch.tensor(random_rows(11, 11, 11))
SAMPLE = Sample(rows=random_rows(40, seed=5))


@pytest.fixture(params=METHODS)
def method(request):
    return method_of(request.param)


def attached(model, method, **settings):
    return attach(model, method, sample=SAMPLE, **settings)


@torch.no_grad()
def logits(model):
    """Of three packed rows, by Trimtab's own forward pass."""
    count, length = IDS.shape
    segments = tuple(Segment(n * length, (n + 1) * length, -1) for n in range(count))
    positions = torch.arange(length).repeat(count)
    return head_of(model).logits(hidden_states(model, IDS.flatten(), positions, PackLayout(segments)))


@pytest.mark.parametrize("family", OTHERS)
def test_starts_as_the_base_bit_for_bit(method, family):
    model = tiny(family)
    before = logits(model)
    attached(model, method)
    assert torch.equal(logits(model), before) == method.identity_at_init


@pytest.mark.parametrize("family", OTHERS)
def test_counts_its_parameters_by_formula(method, family):
    model = tiny(family)
    expected = method.parameter_count(model)
    adapter = attached(model, method)
    assert sum(p.numel() for p in adapter.parameters().values()) == expected > 0
    assert expected == method.parameter_count(model)  # and with the adapter on, the same


def test_trains_what_it_owns_and_nothing_else(method):
    model = tiny("llama").requires_grad_(True)
    adapter = attached(model, method)
    perturb(adapter.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None and torch.count_nonzero(p.grad) > 0}
    assert moved == {id(p) for p in adapter.parameters().values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in moved)


@pytest.mark.parametrize("family", OTHERS)
def test_detaches_without_a_trace(method, family):
    model = tiny(family)
    next(p for n, p in model.named_parameters() if p.ndim == 1).requires_grad_(True)
    before, keys, tree = logits(model), list(model.state_dict()), str(model)
    flags = [p.requires_grad for p in model.parameters()]
    digest = weights_hash(own_weights(model))
    adapter = attached(model, method)
    perturb(adapter.parameters())
    adapter.detach()
    assert torch.equal(logits(model), before)
    assert (list(model.state_dict()), str(model)) == (keys, tree)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert weights_hash(own_weights(model)) == digest


class Draws(TorchDispatchMode):
    """Notes which random operations run: a method may draw nothing, and start as zeros or as the base's own weights."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_first_values_are_decided_by_the_seed_alone(method):
    if method.virtual_token_count:  # virtual tokens: real text has no seed
        method = method.model_copy(update={"init": "random"})
    states, draws = [], Draws()
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        model = tiny("llama")
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        with draws:
            states.append(attached(model, method, seed=seed).state())
        torch.manual_seed(noise)
        assert torch.equal(torch.random.get_rng_state(), before)
    same, other = (all(torch.equal(states[0][n], s[n]) for n in s) for s in states[1:])
    assert same
    assert other == (draws.seen == set())


def test_state_survives_a_round_trip_and_misfits_are_refused_by_name():
    method = LoRA(rank=3)
    adapter = attached(tiny("llama"), method)
    perturb(adapter.parameters())
    other = attached(tiny("llama"), method)
    other.load_state(adapter.state())
    assert torch.equal(logits(other.model), logits(adapter.model))
    name, tensor = next((n, t) for n, t in adapter.state().items() if t.ndim != 2 or t.T.shape != t.shape)
    turned = tensor.T if tensor.ndim == 2 else tensor[None]
    before = other.state()
    for change, message in (
        ({name: None}, f"{name}: missing"),
        ({"extra": torch.zeros(1)}, "extra: unexpected"),
        ({name: turned}, f"{name}: has shape {tuple(turned.shape)}, expected {tuple(tensor.shape)}"),
        ({name: tensor * float("nan")}, f"{name}: holds values that are not finite"),
        ({name: tensor.to(torch.int32)}, f"{name}: has type torch.int32"),
    ):
        damaged = {n: t for n, t in (adapter.state() | change).items() if t is not None}
        damaged = {n: t * 2 if n != name and n != "extra" and t.is_floating_point() else t for n, t in damaged.items()}
        with pytest.raises(ArtifactError) as caught:
            other.load_state(damaged)
        assert message in str(caught.value)
        assert all(torch.equal(t, before[n]) for n, t in other.state().items())


def test_a_second_adapter_of_the_same_name_is_refused(method):
    model = tiny("llama")
    attached(model, method)
    with pytest.raises(RecipeError, match="has an adapter called 'default' already"):
        attached(model, method)


def test_adapter_weights_are_float32_on_a_bfloat16_base(method):
    model = tiny("llama", torch.bfloat16)
    adapter = attached(model, method)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    perturb(adapter.parameters())
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in adapter.parameters().values())


def test_training_mode_never_reaches_the_base():
    model = tiny("gpt2")  # which has dropout of its own
    adapter = attached(model, LoRA(rank=2, dropout=0.5))
    perturb(adapter.parameters())
    still = logits(model)
    adapter.train()
    assert [name for name, m in model.named_modules() if m.training and ".base" in name] == []
    assert not torch.equal(logits(model), logits(model))
    adapter.train(False)
    assert torch.equal(logits(model), still)


# LoRA


def test_lora_is_its_equation_in_float64():
    """Hu et al. 2021, equation 3: h = W x + (alpha / r) B A x."""
    model = tiny("qwen2", torch.float64)
    layer = attach(model, LoRA(rank=3, alpha=12.0, targets=["q_proj"])).layers["model.layers.0.self_attn.q_proj"]
    perturb(layer.own_parameters())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    w, b, (A, B) = layer.base.weight, layer.base.bias, layer.own_parameters().values()
    expected = torch.stack([torch.stack([w @ v + b + 12.0 / 3 * (B @ (A @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_lora_merged_is_lora(family):
    model = tiny(family)
    adapter = attach(model, LoRA(rank=3))
    perturb(adapter.parameters())
    for path, layer in adapter.layers.items():
        x = torch.randn(4, layer.A.shape[1])
        kept = layer.base.weight.clone()
        torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-5, msg=path)
        assert torch.equal(layer.base.weight, kept)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["mlp.down_proj"], ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        ("attention", [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]),
        (r".*\.0\..*(up|down)_proj", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
        (["v_proj", "q_proj", "q_proj"], [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]),
    ],
)
def test_targets_name_matrices(targets, expected):
    assert LoRA(targets=targets).sites(tiny("llama")) == expected


def test_all_linear_is_every_matrix_of_the_blocks():
    assert [s.rpartition(".")[2] for s in LoRA().sites(tiny("llama-tied"))] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ] * 2  # fmt: skip
    assert [s.split(".", 3)[3] for s in LoRA().sites(tiny("gpt2"))] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ] * 2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "v_porj"],
            "targets: 'v_porj' matches no module of LlamaForCausalLM. Did you mean 'v_proj'? It has: down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj.",
        ),
        (
            ["self_attn"],
            "targets: 'self_attn' names model.layers.0.self_attn, a LlamaAttention, and only the matrices can be adapted. "
            r"For those in it, write self_attn\..*",
        ),
        (
            ["model.norm"],
            "targets: 'model.norm' names model.norm, a LlamaRMSNorm, and only the matrices can be adapted. "
            "They are: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
        ),
        (
            ["q_prj|v_prj"],
            "targets: 'q_prj|v_prj' matches no module of LlamaForCausalLM. A regular expression has to match a module's path or its "
            "last parts, such as mlp.down_proj, whole. It has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        ),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(targets, message):
    model = tiny("llama")
    with pytest.raises(NoSuchModule) as caught:
        attach(model, LoRA(targets=targets))
    assert str(caught.value) == message
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("q_proj|v_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("[qv]_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        (r"self_attn\..*", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        (r"(self_attn|nothing)\.[qk]_proj", {"self_attn.q_proj", "self_attn.k_proj"}),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", {"mlp.up_proj", "mlp.down_proj"}),
        (r".*_proj", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                      "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (r"(?i)Q_PROJ", {"self_attn.q_proj"}),
    ],
)  # fmt: skip
def test_an_expression_matches_a_path_or_its_last_parts_whole(target, named):
    model = tiny("llama")
    sites = LoRA(targets=[target]).sites(model)
    assert {site.split(".", 3)[3] for site in sites} == named
    assert len(sites) == len(named) * model.config.num_hidden_layers
    assert LoRA(targets=["all-linear"], ranks={target: 3}).rank_of(sites[0]) == 3
    for part in ("q_pro", "_proj", "elf_attn.q_proj"):  # none is a path or last parts of one
        with pytest.raises(NoSuchModule, match="matches no module"):
            LoRA(targets=[part + "()"]).sites(model)


def test_all_linear_skips_no_fused_experts():
    """They are adapted, or the method is refused by name: see test_experts.py."""
    model = mixture("qwen3_moe")
    experts = {path for path in attach(model, LoRA()).layers if path.endswith(".mlp.experts")}
    assert experts == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    for kind in METHODS:
        method = method_of(kind)
        if "all-linear" in getattr(method, "targets", ()) and kind not in ("lora", "dora", "miss"):
            with pytest.raises(RecipeError, match="holds the matrices of 4 experts in one tensor"):
                method.sites(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: "),
        ({"alpha": 0.0}, "alpha: "),
        ({"alpha": -1.0}, "alpha: "),
        ({"alpha": float("nan")}, "alpha: "),
        ({"alpha": True}, "alpha: "),
        ({"dropout": 1.0}, "dropout: "),
        ({"targets": []}, "targets: "),
        ({"targets": "(q_proj"}, "targets: '(q_proj' is neither a module name nor a regular expression"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(values, message):
    with pytest.raises(RecipeError) as caught:
        LoRA(**values)
    assert str(caught.value).startswith(message)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_faces_trainer_trains_it_and_nothing_else(tmp_path):
    pytest.importorskip("accelerate")
    import transformers

    model = tiny("llama")
    adapter = attach(model, LoRA(rank=2))
    before = adapter.state()
    digest = weights_hash({name: t for name, t in own_weights(model).items() if not t.requires_grad})
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
    assert all(not torch.equal(t, before[name]) for name, t in adapter.state().items())
    assert weights_hash({name: t for name, t in own_weights(model).items() if not t.requires_grad}) == digest
