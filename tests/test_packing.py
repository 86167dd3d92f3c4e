"""Packed rows are the rows alone: losses, gradients, and not a trace of one row in another."""

from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, exact_norms, logprob_alone, perturb, random_rows, tiny

from trimtab.core import attention_hook
from trimtab.core.attention import AttentionCall, Rules, Virtual
from trimtab.core.errors import UnsupportedModel
from trimtab.data import Pack, Segment, pack_all, pack_flat, pack_tree
from trimtab.data.example import TokenRow
from trimtab.engine import check_packing, forward, layers, layouts, pack_logprobs
from trimtab.engine.forward import hidden_states
from trimtab.engine.layouts import PackLayout
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

TOLERANCE = {family: 1e-6 if family in ("cohere", "gemma2") else 1e-10 for family in FAMILIES}
"""Relative, in float64; Cohere computes its norms in float32, Gemma 2, alone, its softmax."""


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    exact_norms(monkeypatch)


ROWS = [TokenRow(ids, learned, f"row:{n}") for n, (ids, learned) in enumerate(zip(
    random_rows(9, 14, 3, 11), ([5, 6, 7, 8], [4, 5, 9, 13], [1, 2], list(range(1, 11))), strict=True
))]  # fmt: skip


def adapted(family, dtype=torch.float64):
    model = tiny(family, dtype)
    adapter = attach(model, LoRA(rank=3, alpha=6.0))
    perturb(adapter.parameters())
    return model, adapter


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_equal_those_of_rows_alone(family):
    model, adapter = adapted(family)
    parameters = list(adapter.parameters().values())
    packed = pack_logprobs(model, pack_flat(ROWS))
    packed_gradients = torch.autograd.grad(packed.sum(), parameters)
    alone = torch.stack([logprob_alone(model, row.ids, row.target_indices) for row in ROWS])
    alone_gradients = torch.autograd.grad(alone.sum(), parameters)
    assert relative(packed, alone) < TOLERANCE[family]
    for ours, reference in zip(packed_gradients, alone_gradients, strict=True):
        assert relative(ours, reference) < TOLERANCE[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_reaches_another_rows_tokens(family):
    model, _ = adapted(family)
    seen = {}

    def keep(_module, _inputs, output):
        output.requires_grad_()
        seen["embedded"] = output
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    pack = pack_flat(ROWS)
    logprobs = pack_logprobs(model, pack)
    handle.remove()
    for number, segment in enumerate(pack.segments):
        (gradient,) = torch.autograd.grad(logprobs[number], seen["embedded"], retain_graph=True)
        inside = gradient[0, segment.start : segment.end]
        assert torch.count_nonzero(inside) > 0
        assert torch.count_nonzero(gradient) == torch.count_nonzero(inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_of_segments_equals_its_paths_as_flat_rows(family):
    """A shared prompt, a shared beginning of two answers, and a third answer: three levels, three leaves."""
    model, adapter = adapted(family)
    parameters = list(adapter.parameters().values())
    prompt, common, left, right, other = random_rows(6, 3, 4, 2, 5, seed=1)
    rows = [
        TokenRow(prompt + common + left, list(range(6, 13)), "left"),
        TokenRow(prompt + common + right, list(range(6, 11)), "right"),
        TokenRow(prompt + other, list(range(6, 11)), "other"),
    ]
    flat = pack_logprobs(model, pack_flat(rows))
    segments = (Segment(0, 6, -1), Segment(6, 9, 0), Segment(9, 13, 1), Segment(13, 15, 1), Segment(15, 20, 0))
    paths = [[0, 1, 2], [0, 1, 3], [0, 4]]
    places = [[t for s in path for t in range(segments[s].start, segments[s].end)] for path in paths]
    targets = [
        (at[t - 1], row.ids[t], n) for n, (row, at) in enumerate(zip(rows, places, strict=True)) for t in row.target_indices
    ]
    at, token, of = (torch.tensor(column) for column in zip(*targets, strict=True))
    positions = torch.tensor([*range(9), *range(9, 13), *range(9, 11), *range(6, 11)])
    ids = torch.tensor(prompt + common + left + right + other)
    predicts, place = at.unique(return_inverse=True)
    tree = Pack(ids, positions, segments, predicts, place, token, of, tuple(rows), (2, 3, 4))
    shared = pack_logprobs(model, tree)
    assert relative(shared, flat) < TOLERANCE[family]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=shared.dtype)
    for ours, reference in zip(
        torch.autograd.grad(shared @ weights, parameters), torch.autograd.grad(flat @ weights, parameters), strict=True
    ):
        assert relative(ours, reference) < TOLERANCE[family]


def forked():
    """Rows that begin alike, to different depths; one the beginning of another, two the same, one apart; learned from inside
    what they share, too."""
    head, one, two, three, apart = random_rows(10, 9, 8, 5, 7, seed=2)
    rows = [head + one + two, head + one + three, head + one, head + three, head + three, apart, head + one[:2] + two]
    starts = [12, 4, 10, 11, 2, 3, 8]
    return [TokenRow(ids, list(range(s, len(ids))), f"fork:{n}") for n, (ids, s) in enumerate(zip(rows, starts, strict=True))]


def test_what_many_rows_see_has_their_gradients_added_up_in_float32():
    """A beginning of 24 tokens, and 4 virtual ones, that 400 rows see, in bfloat16: added up in bfloat16, they are 3 to 30 % off."""
    torch.manual_seed(0)
    segments = (Segment(0, 24, -1), *(Segment(at, at + 4, 0) for at in range(24, 24 + 1600, 4)))
    given = [torch.randn(1, heads, length, 8).bfloat16() for heads, length in ((4, 1624), (2, 1624), (2, 1624), (2, 4), (2, 4))]
    pull = torch.randn(1, 1624, 4, 8).bfloat16() + 0.3
    layer = torch.nn.Module()
    layer.layer_idx = 0
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        query, *others = (t.to(dtype, copy=True).requires_grad_() for t in given)
        virtual = Virtual([(others[2][0], others[3][0])])
        out = PackLayout(segments).attend(AttentionCall(layer, query, *others[:2], Rules(None), [virtual]))
        (out * pull.to(dtype)).sum().backward()
        found.append([t.grad[:, :, :24].double() for t in others])
    for ours, exact in zip(*found, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_what_rows_begin_with_once_changes_no_loss_and_no_gradient(family):
    model, adapter = adapted(family)
    parameters, rows = list(adapter.parameters().values()), forked()
    flat, tree = pack_flat(rows), pack_tree(rows)
    assert len(tree.ids) < 0.5 * len(flat.ids)
    weights = torch.linspace(-1, 2, len(rows), dtype=torch.float64)
    ours, reference = pack_logprobs(model, tree), pack_logprobs(model, flat)
    assert relative(ours, reference) < TOLERANCE[family]
    for shared, alone in zip(
        torch.autograd.grad(ours @ weights, parameters), torch.autograd.grad(reference @ weights, parameters), strict=True
    ):
        assert relative(shared, alone) < TOLERANCE[family]


def test_a_shared_beginning_that_is_not_seen_is_noticed(monkeypatch):
    """The negative control."""
    model, _ = adapted("gpt2")
    rows = forked()
    reference = pack_logprobs(model, pack_flat(rows))
    assert relative(pack_logprobs(model, pack_tree(rows)), reference) < 1e-10
    monkeypatch.setattr(layouts.PackLayout, "paths", property(lambda self: [[n] for n in range(len(self.segments))]))
    assert relative(pack_logprobs(model, pack_tree(rows)), reference) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_self_check(family):
    check_packing(tiny(family))


def test_the_self_check_refuses_a_model_that_computes_something_else(monkeypatch):
    model = tiny("granite")
    model.config.logits_scaling = 8.0  # the forward pass has its own copy, so ours now differs from it
    original = type(model).forward

    def mixed(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = out.logits + out.logits.roll(1, -1)
        return out

    monkeypatch.setattr(type(model), "forward", mixed)
    model.config.logits_scaling = 4.0
    with pytest.raises(UnsupportedModel, match=r"GraniteForCausalLM gives example 1 of 3 the log-probability .* packed and"):
        check_packing(model)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("broken", ["causal", "window", "positions", "paths"])
def test_a_broken_mask_window_or_position_is_noticed(broken, by_hand, monkeypatch):
    """The negative control: each of these leaves a model that runs, and fails the comparison above."""
    if not by_hand:
        monkeypatch.setattr(forward, "patch_layers", lambda model: None)
    family = "mistral"
    model, _ = adapted(family)
    pack = pack_flat(ROWS)
    alone = torch.stack([logprob_alone(model, row.ids, row.target_indices) for row in ROWS])
    if broken == "causal":
        monkeypatch.setattr(layouts, "causal", lambda q, k, *_: torch.ones(q, k, dtype=torch.bool))
        seen = layers.attend
        monkeypatch.setattr(layers, "attend", lambda *given: seen(*given) + seen(*given).mean(dim=0))
    elif broken == "window":
        whole = layouts.causal
        wider = lambda rules: rules._replace(window=rules.window + 1)  # noqa: E731
        monkeypatch.setattr(layouts, "causal", lambda q, k, rules, device: whole(q, k, wider(rules), device))
        plan = layers.AttentionPlan
        monkeypatch.setattr(layers, "AttentionPlan", lambda *asked: plan(*asked)._replace(window=asked[3] + 1))
    elif broken == "positions":
        # Rotary positions are relative, so a shift of a whole row changes nothing: they must run on within the row.
        pack = replace(pack, positions=pack.positions // 2)
    else:
        first, second, *others = pack.segments
        pack = replace(pack, segments=(first, second._replace(parent=0), *others))
    assert relative(pack_logprobs(model, pack), alone) > 1e-3


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_calls_without_a_layout_are_the_models_own_bit_for_bit(own):
    """Padded rows with a cache, in the model's own attention: the same numbers after packed use as before."""
    model = tiny("llama")
    model.set_attn_implementation(own)
    ids, mask = torch.tensor(random_rows(9, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0

    def outputs():
        whole = model(input_ids=ids, attention_mask=mask)
        step = model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 10), cache=whole.cache)
        return torch.cat([whole.logits, step.logits], dim=1)

    before = outputs()
    pack = pack_flat(ROWS)
    hidden_states(model, pack.ids, pack.positions, layouts.PackLayout(pack.segments))
    assert model.config._attn_implementation == f"trimtab-{own}"
    assert torch.equal(outputs(), before)
    attention_hook.remove_hook(model)
    assert model.config._attn_implementation == own


def test_a_model_without_the_attention_interface_is_left_as_it_is():
    """Falcon picks its attention by name, and would take the eager one for a name of ours."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.tensor(random_rows(9))
    before = model(input_ids=ids).logits
    adapter = attach(model, LoRA(rank=2))
    with adapter.disabled():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_asks_attention_for_more_is_refused_by_name():
    layer = tiny("llama").model.layers[0].self_attn
    q = torch.zeros(1, 4, 3, 8)
    layout = layouts.PackLayout((Segment(0, 3, -1),))
    with pytest.raises(UnsupportedModel, match="LlamaAttention asks attention for the tensor bias"):
        attention_hook._attention(layer, q, q, q, None, own="sdpa", layout=layout, bias=torch.zeros(4))
    with pytest.raises(UnsupportedModel, match="LlamaAttention asks attention for attention dropout"):
        attention_hook._attention(layer, q, q, q, None, own="sdpa", layout=layout, dropout=0.1)


def test_a_model_that_drops_keywords_on_the_way_is_refused(monkeypatch):
    model = tiny("cohere")
    monkeypatch.setattr(attention_hook, "_attention", lambda *_, own, layout, **asked: (_[1].transpose(1, 2), None))
    attention_hook.install_hook(model)
    with pytest.raises(UnsupportedModel, match="CohereForCausalLM does not pass keyword arguments of forward on to attention"):
        pack_logprobs(model, pack_flat(ROWS))
    monkeypatch.undo()
    attention_hook.remove_hook(model)
    pack_logprobs(model, pack_flat(ROWS))


def test_packs_hold_every_row_once_and_drop_what_nothing_needs():
    rows = [TokenRow(ids, [len(ids) - 1], f"row:{n}") for n, ids in enumerate(random_rows(30, 5, 12, 9, 17, 2, 8))]
    packs = pack_all(rows, 20)
    assert sorted(row.where for pack in packs for row in pack.rows) == sorted(row.where for row in rows)
    for pack in packs:
        assert len(pack.ids) == sum(len(row.ids) - 1 for row in pack.rows)
        assert len(pack.ids) <= 20 or len(pack.rows) == 1
    assert len(packs) == 4  # 29 | 16+4 | 11+8+1 | 7, of 76 tokens
