"""Virtual tokens that start as a text are that text before every row: in each forward pass, in training and in decoding."""

import pytest
import torch
from families import FAMILIES, exact_norms, logprob_alone, perturb, random_rows, recomputing, tiny

from trimtab.core.errors import RecipeError, UnsupportedModel
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.engine import decode, generate, pack_logprobs
from trimtab.methods import Sample, activate, attach
from trimtab.methods.lora import LoRA
from trimtab.methods.prefix import PrefixTuning
from trimtab.methods.prompt import PromptTuning
from trimtab.methods.ptuning import PTuning
from trimtab.methods.ptuning_v2 import PTuningV2

P = 6
TEXT, ROW, SHORT = random_rows(P, 9, 5, seed=9)
METHODS = {
    "prefix": PrefixTuning(tokens=P, width=8),
    "ptuning_v2": PTuningV2(tokens=P),
    "prompt": PromptTuning(tokens=P),
    "ptuning": PTuning(tokens=P, width=8),
    "ptuning-lstm": PTuning(tokens=P, width=8, encoder="lstm"),
}
each_method = pytest.mark.parametrize("method", [name for name in METHODS if name != "ptuning-lstm"], indirect=True)
SLIDING = ("mistral", "gemma2", "gemma3")
"""Families whose tiny models have windows shorter than the rows here."""
DIRECT = [family for family in FAMILIES if family not in SLIDING]


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def with_text(family, method, dtype=torch.float32):
    model = tiny(family, dtype)
    return model, attach(model, method, sample=Sample([TEXT]))


def perturbed(family, method, **settings):
    model = tiny(family, **settings)
    adapter = attach(model, method, sample=Sample([TEXT]))
    perturb(adapter.parameters())
    return model, adapter


@torch.no_grad()
def logits(model, row, **given):
    return model(input_ids=torch.tensor([row]), use_cache=False, **given).logits[0]


def continued(model, row, count=5):
    """By Transformers' own generate."""
    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, len(row) :].tolist()


def learned(*rows, before=0):
    """Rows in which all tokens but the first are learned, as a pack."""
    return pack_flat([TokenRow(row, list(range(before + 1, len(row))), "here") for row in rows])


# A text before the row


@each_method
@pytest.mark.parametrize("family", DIRECT)
def test_transformers_forward_sees_the_text(family, method):
    expected = logits(tiny(family), TEXT + ROW)[P:]
    model, _ = with_text(family, method)
    torch.testing.assert_close(logits(model, ROW), expected, rtol=0, atol=1e-5)
    early = torch.arange(len(ROW))[None] - P  # as if the row began at position 0
    if family != "gpt2":  # which has no such positions
        with torch.no_grad():
            assert (
                model(input_ids=torch.tensor([ROW]), position_ids=early, use_cache=False).logits - expected
            ).abs().max() > 1e-2


@each_method
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_see_the_text(family, method):
    plain = tiny(family)
    expected = [logprob_alone(plain, TEXT + row, list(range(P + 1, P + len(row)))) for row in (ROW, SHORT)]
    without = [logprob_alone(plain, row, list(range(1, len(row)))) for row in (ROW, SHORT)]
    model, _ = with_text(family, method)
    with torch.no_grad():
        torch.testing.assert_close(pack_logprobs(model, learned(ROW, SHORT)), torch.stack(expected), rtol=1e-6, atol=1e-5)
    assert abs(expected[0] - without[0]) > 1e-2


@each_method
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_sees_the_text(family, method):
    plain = tiny(family)
    expected = [continued(plain, TEXT + row) for row in (ROW, SHORT)]
    model, _ = with_text(family, method)
    assert generate(model, [ROW, SHORT], [], max_new_tokens=5) == expected
    if family in DIRECT:
        assert [continued(model, row) for row in (ROW, SHORT)] == expected


def test_a_cache_without_the_virtual_tokens_is_noticed(method, monkeypatch):
    model, _ = perturbed("llama", method)
    expected = generate(model, [ROW, SHORT], [], max_new_tokens=8)
    prefill = decode._prefill

    def forgetful(*given):
        cache, hidden = prefill(*given)
        cache.layers = {layer: (k[:, :, P:], v[:, :, P:]) for layer, (k, v) in cache.layers.items()}
        cache.lengths = cache.lengths - P
        return cache, hidden

    monkeypatch.setattr(decode, "_prefill", forgetful)
    assert generate(model, [ROW, SHORT], [], max_new_tokens=8) != expected


def test_tokens_go_on_from_transformers_cache(method):
    model, _ = perturbed("llama", method)
    ids = torch.tensor([ROW])
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"  # as this version of Transformers calls it
        second = model(input_ids=ids[:, 4:], **{name: first[name]})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1)[0], logits(model, ROW), rtol=0, atol=1e-5)


def test_transformers_generates_as_trimtab_does_once_it_is_trained(method):
    model, adapter = perturbed("llama", method)
    ours = generate(model, [ROW, SHORT], [], max_new_tokens=8)
    assert [continued(model, row, 8) for row in (ROW, SHORT)] == ours
    with adapter.disabled():
        assert generate(model, [ROW, SHORT], [], max_new_tokens=8) != ours


@each_method
@pytest.mark.parametrize("family", SLIDING)
def test_a_sliding_window_that_transformers_would_miscount_is_refused(family, method):
    model, _ = with_text(family, method)
    with pytest.raises(
        UnsupportedModel, match=r"Rows of 15 tokens, virtual ones included, exceed the sliding window or chunk of .* \(4\)"
    ):
        logits(model, ROW)
    with pytest.raises(UnsupportedModel, match="exceed the sliding window"):
        continued(model, ROW)


@pytest.mark.parametrize("reached", [0, 1])
def test_a_model_that_keeps_keywords_from_attention_is_refused(reached, method, monkeypatch):
    model, _ = perturbed("llama", method)

    def deaf(forward):
        return lambda *given, virtual=None, **keywords: forward(*given, **keywords)

    for layer in model.model.base.layers[reached:]:
        monkeypatch.setattr(layer.self_attn, "forward", deaf(layer.self_attn.forward))
    with pytest.raises(UnsupportedModel, match=f"LlamaModel lets {reached} of 2 layers attend to virtual tokens"):
        logits(model, ROW)


def test_a_bfloat16_base_sees_the_text(method):
    expected = logits(tiny("llama", torch.bfloat16), TEXT + ROW)[P:]
    rounded = (expected.float() - logits(tiny("llama"), TEXT + ROW)[P:]).abs().max()
    model, adapter = with_text("llama", method, torch.bfloat16)
    got = logits(model, ROW)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected.float()).abs().max() < rounded
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}


def test_a_text_is_repeated_or_cut_to_fit_and_can_be_given_in_words():
    for tokens, expected in ((4, TEXT[:4]), (8, TEXT + TEXT[:2])):
        model = tiny("llama")
        embeddings = model.get_input_embeddings()(torch.tensor(expected))
        method = PromptTuning(tokens=tokens, text="words")
        (prompt,) = attach(model, method, sample=Sample([ROW], lambda text: TEXT if text == "words" else [])).state().values()
        assert torch.equal(prompt, embeddings)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_random_prompts_are_embeddings_of_tokens(family):
    model = tiny(family)
    known = {tuple(e) for e in model.get_input_embeddings()(torch.arange(97)).tolist()}
    (prompt,) = attach(model, PromptTuning(tokens=P, init="random")).state().values()
    assert known.issuperset(map(tuple, prompt.tolist()))
    assert len(set(map(tuple, prompt.tolist()))) > 1


@pytest.mark.parametrize("kind", [PromptTuning, PTuning])
def test_prompts_of_zeros_are_refused(kind):
    with pytest.raises(RecipeError, match="init: expected 'text' or 'random', got 'zero'"):
        kind(init="zero")


# Rows beside each other


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_changes_nothing(family, side, own, method):
    plain, _ = perturbed(family, method)
    alone = [logits(plain, ROW), logits(plain, SHORT)]
    model = tiny(family)
    model.set_attn_implementation(own)
    perturb(attach(model, method, sample=Sample([TEXT])).parameters())
    pad = [0] * (len(ROW) - len(SHORT))
    padded = pad + SHORT if side == "left" else SHORT + pad
    mask = torch.tensor([[1] * len(ROW), [int(token != 0) for token in padded]])
    for given in (mask, mask.bool()):
        with torch.no_grad():
            both = model(input_ids=torch.tensor([ROW, padded]), attention_mask=given, use_cache=False).logits
        for got, expected, one in zip(both, alone, mask.bool(), strict=True):
            torch.testing.assert_close(got[one], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_a_mask_over_pairs_of_tokens_may_say_yes_and_no_or_be_added(own, method):
    model = tiny("llama")
    model.set_attn_implementation(own)
    perturb(attach(model, method, sample=Sample([TEXT])).parameters())
    seen = torch.ones(len(ROW), len(ROW), dtype=torch.bool).tril()[None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        torch.testing.assert_close(logits(model, ROW, attention_mask=mask), logits(model, ROW), rtol=0, atol=1e-5)


def test_two_of_them_on_one_row_are_refused_and_on_rows_of_their_own_are_not(method):
    model = tiny("llama")
    expected = []
    for name, one in (("first", method), ("second", PromptTuning(tokens=3)), ("third", PTuningV2(tokens=2))):
        adapter = attach(model, one, name=name, sample=Sample([TEXT]))
        perturb(adapter.parameters())
        with torch.no_grad():
            expected += [pack_logprobs(model, learned(ROW))]
    for names in (("first", "second"), ("first", "third"), ("second", "third")):
        activate(model, *names)
        with pytest.raises(RecipeError, match="Two adapters with virtual tokens cannot act on one example"):
            logits(model, ROW)
    activate(model)
    with torch.no_grad():
        base = pack_logprobs(model, learned(ROW))
        together = pack_logprobs(model, learned(ROW, ROW, ROW, ROW), owners=["second", "first", None, "third"])
    first, second, third = expected
    torch.testing.assert_close(together, torch.cat([second, first, base, third]), rtol=1e-5, atol=1e-5)
    assert len({round(float(x), 2) for x in together}) == 4


def test_a_change_of_weights_acts_on_its_rows_virtual_tokens_too():
    """And on no others: a prompt that is run for one adapter's rows does not see another's LoRA."""
    model, _ = perturbed("llama", METHODS["prompt"])
    with torch.no_grad():
        alone = pack_logprobs(model, learned(ROW))
        perturb(attach(model, LoRA(rank=2), name="lora").parameters())
        routed = pack_logprobs(model, learned(ROW, SHORT), owners=["default", "lora"])[:1]
        torch.testing.assert_close(routed, alone, rtol=1e-5, atol=1e-5)
        activate(model, "default", "lora")
        assert (pack_logprobs(model, learned(ROW)) - alone).abs() > 1e-2


def test_disabled_is_the_base_bit_for_bit(method):
    plain = tiny("llama")
    model, adapter = perturbed("llama", method)
    assert (logits(model, ROW) - logits(plain, ROW)).abs().max() > 1e-2
    with adapter.disabled():
        assert torch.equal(logits(model, ROW), logits(plain, ROW))
        assert continued(model, ROW) == continued(plain, ROW)


# Gradients


def gradients(model, adapter, packed):
    """Of the loss on the rows, and how often a layer's attention was computed for them."""
    calls = []
    attention = next(m for name, m in model.named_modules() if name.endswith(("attn", "self_attn")))
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    for parameter in adapter.parameters().values():
        parameter.grad = None
    if packed:
        (-pack_logprobs(model, learned(ROW, SHORT)).sum()).backward()
    else:
        ids = torch.tensor([ROW])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in adapter.parameters().items()}, len(calls)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_leave_gradients_alone_bit_for_bit(family, packed, method):
    model, adapter = perturbed(family, method)
    model.base_model.train()
    expected, calls = gradients(model, adapter, packed)
    recomputing(model)
    model.base_model.train()
    got, more = gradients(model, adapter, packed)
    assert more == 2 * calls  # it was recomputed
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
        assert expected[name].abs().max() > 0


@pytest.mark.parametrize("packed", [True, False])
def test_recomputation_that_would_lose_gradients_is_refused(packed, method):
    model, adapter = perturbed("llama", method)
    recomputing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    model.base_model.train()
    with pytest.raises(UnsupportedModel, match="get no gradient through reentrant gradient checkpointing"):
        gradients(model, adapter, packed)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_is_the_slope(family, method, monkeypatch):
    exact_norms(monkeypatch)
    model, adapter = perturbed(family, method, dtype=torch.float64)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float64}
    pack_logprobs(model, learned(ROW, SHORT)).sum().backward()
    parameters = list(adapter.parameters().values())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            values.append(pack_logprobs(model, learned(ROW, SHORT)).sum())
    assert abs((values[0] - values[1]) / 2e-4 - slope) < 1e-4 * abs(slope)


# The networks that make them


def lstm_by_hand(x, own, reverse):
    end = "_reverse" if reverse else ""
    w_x, w_h, b_x, b_h = (own[f"lstm.{kind}_l0{end}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = torch.zeros(w_h.shape[1], dtype=x.dtype)
    states = []
    for one in x.flip(0) if reverse else x:
        i, f, g, o = (w_x @ one + b_x + w_h @ hidden + b_h).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states[::-1] if reverse else states)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_is_its_equations_in_float64(encoder):
    model, adapter = perturbed("llama", PTuning(tokens=P, width=8, encoder=encoder), dtype=torch.float64)
    own = {name.removeprefix("model."): p for name, p in adapter.parameters().items()}
    x = own["embedded"]
    if encoder == "lstm":
        x = torch.cat([lstm_by_hand(x, own, reverse) for reverse in (False, True)], dim=1)
    hidden = (x @ own["hidden.weight"].T + own["hidden.bias"]).clamp(min=0)
    start = model.get_input_embeddings()(torch.tensor(TEXT))
    expected = start + hidden @ own["out.weight"].T + own["out.bias"]
    method, tensors = adapter.to_inference_form()
    torch.testing.assert_close(tensors, {"model.embeddings": expected.detach()}, rtol=1e-12, atol=1e-12)
    assert method.parameter_count(model) == P * 32
