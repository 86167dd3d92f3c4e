"""LoRA's options, and DoRA, MiSS and OFT: each is its equation, in numbers wide enough to tell."""

import json
import math
import re

import pytest
import torch
import transformers
from families import logprob_alone, perturb, random_rows, tiny
from mixtures import mixture

from trimtab.base import Base
from trimtab.core.errors import NoSuchModule, RecipeError
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.deploy import load_adapter, merge, save_adapter
from trimtab.engine import pack_logprobs
from trimtab.methods import Sample, _lora_init, attach, weight_matrix
from trimtab.methods.dora import DoRA
from trimtab.methods.lora import LoRA
from trimtab.methods.miss import MiSS
from trimtab.methods.oft import OFT

ROWS = random_rows(9, 7)
IDS = torch.tensor(random_rows(11, 11))
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ENDS = {"gpt2": ["wte", "lm_head"]}
BASE = {"family": "qwen2", "dtype": torch.float64}  # with biases
VARIANTS = {
    "lora": LoRA(rank=3),
    "pissa": LoRA(rank=3, init="pissa"),
    "dora": DoRA(rank=3),
    "miss": MiSS(rank=5),
    "oft": OFT(block_size=8),
    "oft-exact": OFT(block_size=8, cayley="exact"),
    "oft-shared": OFT(block_size=8, shared=True),
}


def ends_of(family):
    return ENDS.get(family, ["embed_tokens", "lm_head"])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapted(method, path=Q_PROJ, size=0.2, family="qwen2", sample=None):
    """One perturbed float64 layer: the layer, its matrix and bias, and inputs for it."""
    layer = attach(tiny(family, torch.float64), method, sample=sample).layers[path]
    perturb(layer.own_parameters(), size)
    weight = layer.base.weight.detach()
    return layer, weight, getattr(layer.base, "bias", None), torch.randn(2, 5, weight.shape[1], dtype=torch.float64)


def close(ours, expected, tolerance=1e-12):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# scale, ranks, alphas


@pytest.mark.parametrize(
    ("settings", "path", "rank", "scale"),
    [
        ({}, Q_PROJ, 4, 6 / 4),
        ({"rank_stabilized": True}, Q_PROJ, 4, 6 / math.sqrt(4)),
        ({"ranks": {"q_proj": 9}}, Q_PROJ, 9, 6 / 9),
        ({"ranks": {"q_proj": 9}}, DOWN, 4, 6 / 4),
        ({"ranks": {r".*\.1\..*": 2, "down_proj": 3}}, DOWN, 2, 6 / 2),
        ({"ranks": {"down_proj": 3, r".*\.1\..*": 2}}, DOWN, 3, 6 / 3),
        ({"alphas": {"mlp.down_proj": 1.5}}, DOWN, 4, 1.5 / 4),
        ({"alphas": {"down_proj": 1.5}, "ranks": {"down_proj": 2}, "rank_stabilized": True}, DOWN, 2, 1.5 / math.sqrt(2)),
    ],
)
def test_rank_and_scale_are_what_the_options_say(settings, path, rank, scale):
    layer, W, b, x = adapted(LoRA(rank=4, alpha=6.0, **settings), path)
    assert layer.A.shape[0] == layer.B.shape[1] == rank
    bias = 0 if b is None else b
    close(layer(x), x @ W.T + bias + scale * (x @ layer.A.T) @ layer.B.T)


@pytest.mark.parametrize("key", ["ranks", "alphas"])
def test_a_pattern_that_matches_no_target_is_refused(key):
    with pytest.raises(NoSuchModule, match=f"{key}: 'up_proj' matches none of the targets: q_proj"):
        attach(tiny("llama"), LoRA(targets="q_proj", **{key: {"up_proj": 2}}))
    with pytest.raises(RecipeError, match=r"'\(q' is neither a module name nor a regular expression"):
        LoRA(**{key: {"(q": 2}})


def test_b_learns_at_its_own_rate():
    method = LoRA(b_rate=16.0)
    assert (method.lr_multiplier("A"), method.lr_multiplier("B")) == (1.0, 16.0)
    assert DoRA(b_rate=16.0).lr_multiplier("magnitude") == 1.0


# embeddings and head


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # Gemma's embeddings are multiplied by √hidden
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_embeddings_are_their_equation(kind, family):
    layer, W, _, _ = adapted(kind(rank=4, alpha=6.0, targets="embed_tokens"), "model.embed_tokens", family=family)
    whole = W + 6 / 4 * (layer.B @ layer.A).T  # tokens × hidden
    if kind is DoRA:
        whole = whole * layer.magnitude / whole.norm(dim=0)
    factor = math.sqrt(32) if family == "gemma3" else 1.0
    close(layer(IDS), factor * whole[IDS], 1e-6 if family == "gemma3" else 1e-12)  # whose √hidden is a float32


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gemma3", "gpt2", "cohere"])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_gradients_of_packed_rows_at_both_ends_are_plain_autograds(kind, family):
    model = tiny(family)
    parameters = attach(model, kind(rank=4, targets=ends_of(family))).parameters()
    perturb(parameters, 0.1)
    expected = torch.autograd.grad(
        sum(logprob_alone(model, ids, list(range(1, len(ids)))) for ids in ROWS), list(parameters.values())
    )
    packed = pack_logprobs(model, pack_flat(TokenRow(ids, list(range(1, len(ids))), "row") for ids in ROWS))
    ours = torch.autograd.grad(packed.sum(), list(parameters.values()))
    for name, mine, theirs in zip(parameters, ours, expected, strict=True):
        largest = float(theirs.abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["embeddings", "head", "both"])
def test_merging_adapted_ends_unties_them(family, which, tmp_path):
    base = Base(tiny(family))
    perturb(attach(base.model, LoRA(rank=4, targets=ends_of(family)[which])).parameters())
    before, untouched = logits(base.model), logits(tiny(family))
    (adapter,) = base.model.trimtab_adapters.adapters.values()
    merge(base, adapter, tmp_path / "merged")
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(plain.eval()), before, rtol=1e-4, atol=1e-4)
    assert (before - untouched).abs().max() > 1e-2
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert plain.get_input_embeddings().weight is not plain.get_output_embeddings().weight


# PiSSA


@pytest.mark.parametrize("stabilized", [False, True])
def test_pissa_is_lora_on_what_its_principal_part_leaves(stabilized):
    method = LoRA(rank=5, alpha=7.0, init="pissa", rank_stabilized=stabilized)
    layer = attach(tiny(**BASE), method).layers[Q_PROJ]
    W, b, A0, B0 = layer.base.weight, layer.base.bias, layer.A.detach().clone(), layer.B.detach().clone()
    scale = 7 / math.sqrt(5) if stabilized else 7 / 5
    S = torch.linalg.svdvals(W)
    residual = W - scale * B0 @ A0
    close(torch.linalg.svdvals(residual)[: len(S) - 5], S[5:])  # no approximation of rank 5 leaves less
    close(A0 @ A0.T, (B0.T @ B0))  # each factor has half of every singular value
    perturb(layer.own_parameters())
    x = torch.randn(4, 32, dtype=torch.float64)
    close(layer(x), x @ residual.T + b + scale * (x @ layer.A.T) @ layer.B.T)
    W_x = (
        x @ residual.T
        + b
        + scale * (x @ (A := layer.A.detach().requires_grad_()).T) @ (B := layer.B.detach().requires_grad_()).T
    )
    for ours, theirs in zip(
        torch.autograd.grad(layer(x).sin().sum(), [layer.A, layer.B]), torch.autograd.grad(W_x.sin().sum(), [A, B]), strict=True
    ):
        close(ours, theirs, 1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [VARIANTS["pissa"], LoRA(rank=3, init="eva"), *(VARIANTS[n] for n in ("dora", "oft-exact"))])
def test_it_starts_as_the_base_bit_for_bit(method, dtype, family):
    model = tiny(family, dtype)
    before = logits(model)
    adapter = attach(model, method, sample=Sample(rows=ROWS))
    assert torch.equal(logits(model), before)
    perturb(adapter.parameters())
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("settings", [{}, {"rank_stabilized": True}, {"ranks": {"q_proj": 5}, "alphas": {"v_proj": 9.0}}])
def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank_and_the_same_scale(settings, tmp_path):
    base = Base(tiny("llama"))
    adapter = attach(base.model, LoRA(rank=3, init="pissa", targets=["q_proj", "v_proj"], **settings))
    perturb(adapter.parameters())
    save_adapter(base, adapter, tmp_path / "adapter")
    again = Base(tiny("llama"))
    plain = load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again.model), logits(base.model), rtol=1e-5, atol=1e-5)
    assert plain.method.init == "default"
    for path, layer in plain.layers.items():
        assert layer.A.shape[0] == 2 * adapter.layers[path].A.shape[0]
        assert layer.scale == pytest.approx(adapter.layers[path].scale, rel=1e-15)


def test_a_rank_that_pissa_cannot_have_is_refused_and_the_model_left_as_it_was():
    model = tiny("llama").requires_grad_(True)
    with pytest.raises(RecipeError, match=r"pissa needs a rank of at most 16, the smaller side of .*k_proj; it is 17"):
        attach(model, LoRA(rank=17, init="pissa", targets=["k_proj"]))
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


# EVA


def inputs_of(model, paths, rows):
    """What enters the modules of a plain model, T n."""
    found = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, given, __, path=path: found[path].append(given[0][0]))
        for path in paths
    ]
    for row in rows:
        model(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(several) for path, several in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("numbers", [250_000_000, 1])
def test_eva_starts_at_the_principal_directions_of_what_enters(numbers, family, monkeypatch):
    monkeypatch.setattr(_lora_init, "MAX_NUMBERS", numbers)  # 1: a group for each layer
    monkeypatch.setattr(_lora_init, "TOKENS", 12)  # the first row, and three tokens of the second
    model = tiny(family, torch.float64)
    method = LoRA(rank=4, init="eva")
    inputs = inputs_of(model, method.sites(model), [ROWS[0], ROWS[1][:3]])
    adapter = attach(model, method, sample=Sample(rows=ROWS))
    for path, layer in adapter.layers.items():
        _, S, Vt = torch.linalg.svd(inputs[path].double())
        A = layer.A.detach()
        close(A @ A.T, torch.eye(4, dtype=torch.float64), 1e-10)
        close((A * Vt[:4]).sum(dim=1).abs(), torch.ones(4, dtype=torch.float64), 1e-6)  # each in its place, but for signs
        assert not layer.B.any()
        assert not layer._forward_pre_hooks
        assert S[3] > 1.01 * S[4]  # so that there is a fourth direction to find


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"rank": 4}, (), "eva starts from training examples, and there are none"),
        ({"rank": 8}, ([5, 6, 7],), r"a rank of at most 3 for .*q_proj, which has 32 inputs and is given 3 tokens; it is 8"),
        ({"rank": 40}, random_rows(60), "a rank of at most 32 for"),
        (
            {"rank": 4, "targets": ["embed_tokens"]},
            ROWS,
            "eva uses the inputs of a matrix, and those of model.embed_tokens are tokens",
        ),
    ],
)
def test_eva_says_what_it_lacks_and_leaves_the_model_as_it_was(settings, rows, message):
    model = tiny("llama")
    with pytest.raises(RecipeError, match=message):
        attach(model, LoRA(init="eva", **settings), sample=Sample(rows=rows))
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


# DoRA


def test_dora_is_its_equation_and_its_norm_counts_as_constant():
    """Liu et al. 2024, equation 5 and section 4.3."""
    layer, W, b, x = adapted(DoRA(rank=3, alpha=6.0))

    def by_hand(constant):
        A, B, m = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.magnitude))
        whole = W + 2.0 * B @ A
        norm = whole.norm(dim=1, keepdim=True)
        y = x @ (m[:, None] * whole / (norm.detach() if constant else norm)).T + b
        return y.detach(), torch.autograd.grad(y.sin().sum(), [A, B, m])

    close(layer(x), by_hand(True)[0])
    ours = torch.autograd.grad(layer(x).sin().sum(), [layer.A, layer.B, layer.magnitude])
    for mine, theirs, full in zip(ours, by_hand(True)[1], by_hand(False)[1], strict=True):
        close(mine, theirs, 1e-10)
        if mine.ndim == 2:
            assert (mine - full).abs().max() > 1e-3
    assert not DoRA.exact_gradient


def test_doras_magnitudes_start_as_the_norms_by_output():
    for family, path in (("qwen2", Q_PROJ), ("gpt2", "transformer.h.0.mlp.c_fc")):
        model = tiny(family, torch.float64)
        layer = attach(model, DoRA(rank=3)).layers[path]
        by_output = layer.base.weight.norm(dim=0 if family == "gpt2" else 1)
        close(layer.magnitude, by_output)


# MiSS


@pytest.mark.parametrize("rank", [1, 5, 8, 32])
def test_miss_repeats_its_block_along_the_inputs(rank):
    layer, W, b, x = adapted(MiSS(rank=rank))
    whole = W.clone()
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            whole[o, i] += layer.D[i % rank, o].detach()
    close(layer(x), x @ whole.T + b)
    assert (whole - W).abs().max() > 0.1


def test_a_rank_of_miss_beyond_the_inputs_is_refused():
    with pytest.raises(RecipeError, match=r"rank: 33 is more than the 32 inputs of model.layers.0.self_attn.q_proj"):
        attach(tiny("llama"), MiSS(rank=33))


# OFT


def blocks_by_hand(layer, size):
    """I + Q and I − Q of each block, from the parameters row by row."""
    for parameters in layer.Q.detach():
        Q, rest = torch.zeros(size, size, dtype=torch.float64), iter(parameters)
        for i in range(size):
            for j in range(i + 1, size):
                Q[i, j] = next(rest)
                Q[j, i] = -Q[i, j]
        yield Q, torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cayley", ["exact", "neumann"])
def test_oft_turns_blocks_of_its_inputs(cayley, shared):
    layer, W, b, x = adapted(OFT(block_size=8, cayley=cayley, shared=shared))
    turns = []
    for Q, eye in blocks_by_hand(layer, 8):
        series = eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
        turns.append((eye - Q) @ torch.linalg.inv(eye + Q) if cayley == "exact" else series)
    assert len(turns) == (1 if shared else 4)
    R = torch.block_diag(*(turns * 4 if shared else turns))
    close(layer(x), x @ R @ W.T + b)
    assert (x @ R - x).abs().max() > 0.1
    straight = (R @ R.T - torch.eye(32, dtype=torch.float64)).abs().max()
    assert straight < 1e-12 if cayley == "exact" else straight > 1e-3


def test_ofts_series_is_the_exact_rotations_inverse_for_small_angles():
    changes = [adapted(OFT(block_size=8, cayley=cayley), size=1e-3)[0].rotation_change() for cayley in ("exact", "neumann")]
    exact, series = (change + torch.eye(8, dtype=torch.float64) for change in changes)
    close(exact @ series, torch.eye(8, dtype=torch.float64).expand(4, 8, 8), 1e-9)


def test_a_block_size_that_does_not_divide_is_refused_with_those_that_do():
    message = (
        r"block_size: 32 does not divide the 48 inputs of model.layers.0.mlp.down_proj. "
        r"What divides the inputs of all targets: 2, 4, 8, 16.$"
    )
    with pytest.raises(RecipeError, match=message):
        attach(tiny("llama"), OFT())
    assert attach(tiny("llama"), OFT(targets="attention")).layers


# all of them


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_merged_is_the_layer(name, family):
    adapter = attach(tiny(family, torch.float64), VARIANTS[name])
    perturb(adapter.parameters())
    for path, layer in adapter.layers.items():
        x = torch.randn(4, weight_matrix(layer).shape[1], dtype=torch.float64)
        kept = layer.base.weight.clone()
        merged = layer.merge()
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-9, atol=1e-9, msg=path)
        assert (merged(x) - layer.base(x)).abs().max() > 1e-2
        assert torch.equal(layer.base.weight, kept)


@pytest.mark.parametrize("name", ["pissa", "dora", "miss", "oft"])
def test_transformers_alone_loads_what_was_merged(name, tmp_path):
    base = Base(tiny("llama"))
    adapter = attach(base.model, VARIANTS[name])
    perturb(adapter.parameters())
    merge(base, adapter, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), logits(base.model), rtol=1e-4, atol=1e-4)


def test_a_name_is_a_name_in_ranks_as_in_targets():
    """Its dots are dots, not a regular expression's."""
    model, near = tiny("llama"), Q_PROJ.replace("q_proj", "q.proj")
    with pytest.raises(NoSuchModule, match=rf"targets: '{re.escape(near)}' matches no module"):
        attach(model, LoRA(rank=2, targets=[near]))
    for key in ("ranks", "alphas"):
        with pytest.raises(NoSuchModule, match=rf"{key}: '{re.escape(near)}' matches none of the targets"):
            attach(model, LoRA(rank=2, **{key: {near: 3}}))
    attach(model, LoRA(rank=2, ranks={Q_PROJ: 3, r".*\.layers\.1\..*": 4, "self_attn.k_proj": 5}))


def test_an_output_of_zeros_has_no_direction_and_stays_as_it_is(tmp_path):
    """0/0 in the authors' code, and in PEFT's."""
    model, x = tiny("llama", dtype=torch.float64), torch.tensor(random_rows(6, 6))
    with torch.no_grad():
        for path in (Q_PROJ, DOWN):
            model.get_submodule(path).weight[2] = 0
        before = model(input_ids=x).logits
    adapter = attach(model, DoRA(rank=2))
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, before)
    perturb({name: p for name, p in adapter.parameters().items() if name.endswith(".A")}, 0.1)
    model(input_ids=x).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in adapter.parameters().items()}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    for path in (Q_PROJ, DOWN):
        assert not gradients[f"{path}.B"][2].any()
        assert gradients[f"{path}.B"].any()
    optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=0.05)
    for _ in range(3):
        optimizer.step()
    with torch.no_grad():
        after = model(input_ids=x).logits
        assert bool(after.isfinite().all())
        assert not torch.allclose(after, before)
        merged = adapter.layers[DOWN].merge()
    assert bool(merged.weight.isfinite().all())
    assert not merged.weight[2].any()


def test_gaussian_is_pefts():
    """A ~ N(0, 1/rank²) and B zero; of an embedding, whose A PEFT leaves at zero, as by default."""
    for rank in (4, 16):
        method = LoRA(rank=rank, init="gaussian", targets=["q_proj", "up_proj", "embed_tokens"])
        layers = attach(tiny("qwen2"), method).layers
        drawn = torch.cat([layer.A.detach().flatten() for path, layer in layers.items() if "embed" not in path])
        assert float(drawn.std()) == pytest.approx(1 / rank, rel=0.05)
        assert abs(float(drawn.mean())) < 0.1 / rank
        uniform = attach(tiny("qwen2"), LoRA(rank=rank)).layers[Q_PROJ].A.detach()
        assert float(uniform.abs().max()) <= 1 / math.sqrt(32) < float(drawn.abs().max())
        assert all(not torch.count_nonzero(layer.B) for path, layer in layers.items() if "embed" not in path)
        assert not torch.count_nonzero(layers["model.embed_tokens"].A)
        assert torch.equal(logits(attach(tiny("qwen2"), method).model), logits(tiny("qwen2")))
    experts = attach(mixture("mixtral"), LoRA(rank=4, init="gaussian"))
    assert all(float(t.std()) == pytest.approx(0.25, rel=0.2) for name, t in experts.state().items() if name.endswith(".A"))
