"""Fused layers give what the model's own code gives: log-probabilities and gradients, family by family, method by method."""

import copy

import pytest
import torch
from families import FAMILIES, exact_norms, method_of, perturb, random_rows, recomputing, tiny

from trimtab.data import TokenRow, pack_flat, pack_tree
from trimtab.engine import layers, operations, pack_logprobs, tree_attention
from trimtab.engine.backends import backend_for, cpu
from trimtab.engine.patching import unfused
from trimtab.methods import Method, Sample, active, attach
from trimtab.methods.lora import LoRA

KNOWN = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "granite", "gemma2"]
BACKEND = backend_for(torch.ones(1))
SAMPLE = random_rows(30, seed=3)


def rows():
    """Rows that begin alike and rows that don't, some longer than a block of attention and than a matrix is wide."""
    head, *rest = random_rows(12, 50, 3, 40, 17, 9, seed=4)
    ids = [head + rest[0][:45], head + rest[1], head + rest[2], rest[3], rest[4], head + rest[2][:20] + rest[1]]
    return [TokenRow(row, list(range(len(row) // 2, len(row))), f"row:{n}") for n, row in enumerate(ids)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    exact_norms(monkeypatch)


def learned(model):
    """The model, after the small pass in which its layers are learned."""
    with torch.no_grad():
        pack_logprobs(model, pack_flat(rows()[4:5]))
    return model


def both(model, adapter, pack, train=False):
    """Log-probabilities and gradients, by hand and by the model's own code."""
    found = []
    parameters = adapter.parameters()
    adapter.train(train)
    for reference in (False, True):
        torch.manual_seed(0)
        if reference:
            with unfused():
                logprobs = pack_logprobs(model, pack)
        else:
            logprobs = pack_logprobs(model, pack)
        weights = torch.linspace(-1, 2, len(pack.rows), dtype=logprobs.dtype)
        gradients = torch.autograd.grad(logprobs @ weights, list(parameters.values()), allow_unused=True)
        found.append((logprobs.detach(), dict(zip(parameters, gradients, strict=True))))
    return found


def assert_equal(ours, reference, tolerance=1e-10):
    torch.testing.assert_close(ours[0], reference[0], rtol=tolerance, atol=tolerance)
    for name, gradient in reference[1].items():
        assert (gradient is None) == (ours[1][name] is None), name
        if gradient is not None:
            limit = tolerance * float(gradient.abs().max().clamp_min(1e-3))
            assert float((ours[1][name] - gradient).abs().max()) <= limit, name


@pytest.mark.parametrize("packed", [pack_flat, pack_tree])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", KNOWN)
def test_a_family_by_hand_is_its_own_code(family, compiled, packed, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu, "load_library", lambda: None)
    model = tiny(family, torch.float64)
    adapter = attach(model, LoRA(rank=3, alpha=6.0))
    perturb(adapter.parameters())
    learned(model)
    calls = counted(monkeypatch)
    ours, reference = both(model, adapter, packed(rows()))
    attention = 0 if family == "gemma2" else 2  # whose scores are capped; of two layers
    assert (calls["linears"], calls["attend"], calls["linear_add"]) == (2 + attention, attention, attention + 2)
    assert_equal(ours, reference)


def counted(monkeypatch):
    """How often each operation by hand is called."""
    calls = {}
    for module, names in ((operations, ("rms_norm", "linears", "linear_add")), (layers, ("attend",))):
        for name in names:
            calls[name] = 0

            real = getattr(module, name)

            def counting(*args, _name=name, _real=real, **kwargs):
                calls[_name] += 1
                return _real(*args, **kwargs)

            monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("name", [name for name in Method.names() if name not in ("lora", "tokens")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_every_other_method_goes_through_layers_by_hand(family, name):
    model = tiny(family, torch.float64)
    adapter = attach(model, method_of(name), sample=Sample(SAMPLE))
    perturb(adapter.parameters(), 0.05)
    assert_equal(*both(model, adapter, pack_tree(rows())), 1e-9)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=3, targets=["q_proj", "v_proj"]),
        LoRA(rank=3, targets=["k_proj", "up_proj"]),
        LoRA(rank=3, targets=["down_proj"], rank_stabilized=True),
        LoRA(rank=4, dropout=0.5),
        LoRA(rank=4, init="pissa"),
        LoRA(rank=4, ranks={"q_proj": 2, "down_proj": 7}, targets=["all-linear", "lm_head"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [True, False])
def test_every_choice_of_targets(method, wide, monkeypatch):
    """Also where a pack has fewer tokens than a matrix has inputs, so that what is added to it is not summed."""
    model = tiny("qwen2", torch.float64)
    adapter = attach(model, method)
    perturb(adapter.parameters())
    chosen = rows()
    if getattr(method, "dropout", 0.0):  # where every token predicts, both draw the same masks in the last layer, too
        chosen = [TokenRow(row.ids, list(range(1, len(row.ids))), row.where) for row in chosen]
    pack = pack_tree(chosen) if wide else pack_flat(chosen[4:5])
    assert (len(pack.ids) > 48) == wide
    assert_equal(*both(model, adapter, pack, train=True))


def test_several_adapters_at_once_and_none():
    model = tiny("llama", torch.float64)
    one = attach(model, LoRA(rank=2), name="one")
    two = attach(model, LoRA(rank=3, targets=["q_proj", "down_proj"]), name="two")
    perturb(one.parameters(), seed=1)
    perturb(two.parameters(), seed=2)
    pack = pack_tree(rows())
    for names in (("one", "two"), ("one",), ("two",)):
        with active(model, *names):
            adapter = two if names == ("two",) else one
            assert_equal(*both(model, adapter, pack))
    with active(model), torch.no_grad():
        ours = pack_logprobs(model, pack)
        with unfused():
            torch.testing.assert_close(ours, pack_logprobs(model, pack), rtol=1e-10, atol=1e-10)


def test_rows_of_several_adapters_go_through_the_models_own_modules():
    model = tiny("llama", torch.float64)
    for n, name in enumerate(("one", "two")):
        perturb(attach(model, LoRA(rank=2), name=name).parameters(), seed=n)
    pack = pack_flat(rows()[:3])
    owners = ["one", None, "two"]
    ours = pack_logprobs(model, pack, owners)
    with unfused():
        torch.testing.assert_close(ours, pack_logprobs(model, pack, owners), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recomputed_layers_are_recomputed_by_hand(family):
    model = tiny(family, torch.float64)
    adapter = attach(model, LoRA(rank=3))
    perturb(adapter.parameters())
    plain, reference = both(model, adapter, pack_tree(rows()), train=True)
    recomputing(model, {"use_reentrant": False})
    again, _ = both(model, adapter, pack_tree(rows()), train=True)
    assert_equal(again, reference)
    assert_equal(plain, reference)


def test_a_hook_inside_sees_what_it_would_see():
    model = tiny("llama", torch.float64)
    adapter = attach(model, LoRA(rank=3))
    perturb(adapter.parameters())
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, given, made: seen.append(given[0].shape))
    pack = pack_tree(rows())
    assert_equal(*both(model, adapter, pack))
    assert [shape[1] for shape in seen] == [len(pack.ids)] * 2


def test_other_passes_are_the_models_own_to_the_last_bit_and_nothing_is_left_behind():
    model = tiny("llama")
    ids = torch.tensor(random_rows(20))
    before, names = model(input_ids=ids).logits, dict(model.named_modules()).keys()
    adapter = attach(model, LoRA(rank=3))
    pack_logprobs(model, pack_tree(rows()))
    assert any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.o_proj.base.weight.zero_()
    assert not torch.equal(pack_logprobs(twin, pack_tree(rows())), pack_logprobs(model, pack_tree(rows())))
    adapter.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert dict(model.named_modules()).keys() == names
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_layer_keeps_only_what_cannot_be_made_again_cheaply():
    """Per token and layer: x twice, q, k, v, what attention gives, gate and up; and a few single numbers."""
    model = tiny("llama")
    config = model.config
    adapter = attach(model, LoRA(rank=2))
    adapter.train()
    pack = pack_flat(rows())
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    learned(model)
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_logprobs(model, pack)
    numbers = sum(size for at, (_, size) in kept.items() if at not in frozen) / 4 / len(pack.ids)
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    layer = 2 * d + (d + 2 * kv) + d + 2 * f
    single = (
        2 + config.num_attention_heads + 2 * 7 * 2
    )  # and what A makes of what enters a matrix, in a column beside its output
    ends = 3 * d + 2 * config.head_dim + 4  # the last norm's, rotary angles, targets
    assert numbers <= config.num_hidden_layers * (layer + single) + ends


def dropped_change(x, frozen, factors, *others, _real=operations.product):
    without = _real(x, frozen, [None] * len(factors), *others)[0]
    return without, _real(x, frozen, factors, *others)[1]


def later_keys(*given, _real=tree_attention.attend):
    out = _real(*given)
    return out + out.mean(0)


def half_a_norm(dy, x, norm, rstd, residual):
    return dy * (norm.offset + norm.weight) * rstd[:, None] + residual


def no_residual(*given, _real=BACKEND.rms_norm_backward):
    return _real(*given[:4])


def straight_gate(dh, g, u, activation):
    return dh * u, dh * g, BACKEND.gate(g, u, activation)


BROKEN = {
    "a norm's gradient": (BACKEND, "rms_norm_backward", half_a_norm),
    "what goes beside a norm": (BACKEND, "rms_norm_backward", no_residual),
    "a change left out": (operations, "product", dropped_change),
    "later keys that are seen": (layers, "attend", later_keys),
    "a gate's gradient": (BACKEND, "gate_backward_", straight_gate),
}


@pytest.mark.parametrize(("module", "name", "broken"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_noticed(module, name, broken, monkeypatch):
    """Negative controls."""
    model = tiny("llama", torch.float64)
    adapter = attach(model, LoRA(rank=3))
    perturb(adapter.parameters())
    learned(model)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        assert_equal(*both(model, adapter, pack_tree(rows())))


def test_what_is_not_known_is_left_to_its_own_code(monkeypatch):
    model = tiny("gpt2")
    attach(model, LoRA(rank=2))
    learned(model)
    calls = counted(monkeypatch)
    pack_logprobs(model, pack_flat(rows()))
    assert set(calls.values()) == {0}
    assert FAMILIES.keys() - set(KNOWN) == {"cohere", "gpt2"}


def rows_of_linears(monkeypatch):
    """Of each layer, how many tokens enter attention and how many the MLP."""
    seen = []
    linears = operations.linears
    monkeypatch.setattr(operations, "linears", lambda x, *rest: seen.append(len(x)) or linears(x, *rest))
    return seen


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prefix"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_the_last_layer_ends_with_the_tokens_that_predict(family, name, monkeypatch):
    """Nobody attends to what the others become, so after its attention they are left out."""
    model = tiny(family, torch.float64)
    adapter = attach(model, method_of(name), sample=Sample(rows=SAMPLE))
    perturb(adapter.parameters(), 0.1)
    pack = pack_tree(rows())
    predicting, tokens = len(pack.target_at.unique()), len(pack.ids)
    assert predicting < 0.8 * tokens
    learned(model)
    seen = rows_of_linears(monkeypatch)
    ours, reference = both(model, adapter, pack)
    assert_equal(ours, reference)
    assert [n for n in seen if n in (tokens, predicting)] == [tokens, tokens, tokens, predicting]
    seen.clear()
    pack_logprobs(model, pack, recompute="full").sum().backward()
    assert seen.count(predicting) == 2
    seen.clear()
    handle = model.model.layers[-1].self_attn.register_forward_hook(lambda *_: None)
    assert_equal(both(model, adapter, pack)[0], reference)  # who watches the last layer sees all of it
    assert predicting not in seen
    handle.remove()


def test_the_wrong_tokens_after_the_last_attention_are_noticed(monkeypatch):
    model = tiny("llama", torch.float64)
    adapter = attach(model, LoRA(rank=3))
    perturb(adapter.parameters())
    learned(model)
    monkeypatch.setattr(layers, "_selected", lambda t, at: t if at is None else t[at - 1])
    with pytest.raises(AssertionError):
        assert_equal(*both(model, adapter, pack_tree(rows())))
