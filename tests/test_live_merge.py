"""An adapter merged on a model in memory: it computes what it did, and nothing of the base changes; unmerging restores every bit."""

import copy
import json

import pytest
import torch
from families import method_of, perturb, random_rows, tiny
from mixtures import mixture

from trimtab.base import Base
from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core.errors import ArtifactError, NotMergeable, RecipeError
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.deploy import attach, load_adapter, merge, save_adapter
from trimtab.engine import generate, pack_logprobs
from trimtab.methods import Method, Sample, activate, active
from trimtab.methods._merged import MergeableLayer
from trimtab.methods.lora import LoRA

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor(random_rows(11, 11))
SAMPLE = Sample(rows=random_rows(40, seed=5))
ROWS = [TokenRow(ids, list(range(2, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(9, 6, 12, seed=3))]
MERGES = [name for name in Method.names() if Method.member(name).mergeable]
WITHOUT_BIAS = {"bitfit": "qwen2"}
"""A family that has biases for a method that changes them."""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def logprobs(model):
    """By the engine, which computes layers by hand."""
    return pack_logprobs(model, pack_flat(ROWS))


def adapted(family="llama", method=None, dtype=torch.float32, size=0.1, **more):
    model = tiny(family, dtype)
    adapter = attach(model, method or LoRA(rank=4), sample=SAMPLE, **more)
    perturb(adapter.parameters(), size)
    return model, adapter


def settings(name, family):
    return method_of(name) if name != "bitfit" else Method.member(name)(targets=["q_proj", "v_proj"])


@pytest.mark.parametrize("name", MERGES)
def test_it_computes_the_same_and_every_bit_comes_back(name, monkeypatch):
    family = WITHOUT_BIAS.get(name, "llama")
    model, adapter = adapted(family, settings(name, family))
    before, by_hand, saved = logits(model), logprobs(model), adapter.state()
    weights = weights_hash(own_weights(model))
    assert (before - logits(tiny(family))).abs().max() > 1e-2
    assert adapter.merge() == pytest.approx(1.0, abs=1e-6)
    assert adapter.merged
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs(model), by_hand, rtol=1e-4, atol=1e-4)
    with monkeypatch.context() as without:
        for kind in {type(layer) for layer in adapter.layers.values()}:
            without.setattr(kind, "adapt", None)  # the model's own code does not need it any more
        logits(model)
        adapter.unmerge()
        with pytest.raises(TypeError, match="NoneType"):
            logits(model)
        adapter.merge()
    assert weights_hash(own_weights(model)) == weights
    assert all(torch.equal(tensor, saved[key]) for key, tensor in adapter.state().items())
    adapter.unmerge()
    assert not adapter.merged
    assert torch.equal(logits(model), before)
    assert torch.equal(logprobs(model), by_hand)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "phi3", "gpt2", "cohere"])
def test_other_families(family):
    model, adapter = adapted(family)
    before, by_hand = logits(model), logprobs(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs(model), by_hand, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(logits(model), before)
    assert torch.equal(logprobs(model), by_hand)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_experts(name):
    model = mixture("mixtral")
    adapter = attach(model, method_of(name))
    perturb(adapter.parameters(), 0.1)
    before, by_hand = logits(model), logprobs(model)
    adapter.merge()
    assert all(layer.is_merged for layer in adapter.layers.values())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs(model), by_hand, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert torch.equal(logits(model), before)


def test_merged_it_is_a_plain_product_with_the_sum(monkeypatch):
    """Neither the model's code nor the engine multiplies by A and B any more; unmerged, both do."""
    model, adapter = adapted()
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    expected = layer.base.weight + layer.scale * layer.B @ layer.A
    adapter.merge()
    torch.testing.assert_close(layer.twin().weight, expected, rtol=1e-6, atol=1e-6)
    asked = []
    real = type(layer).factors
    monkeypatch.setattr(type(layer), "factors", lambda self: asked.append(self) or real(self))
    logits(model), logprobs(model), generate(model, [[3, 4, 5]], [2], max_new_tokens=3)
    assert asked == []
    adapter.unmerge()
    logits(model)
    assert len(asked) == len(adapter.layers)
    logprobs(model)
    assert len(asked) > len(adapter.layers)


@pytest.mark.parametrize("name", [name for name in Method.names() if name not in MERGES])
def test_what_is_no_change_of_weights_is_refused(name):
    model, adapter = adapted(method=method_of(name))
    before = logits(model)
    with pytest.raises(NotMergeable, match=f"{name} is not a change of weights, so it cannot be merged"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(logits(model), before)


def test_a_method_that_fits_some_of_its_modules_alone_merges_none():
    _, adapter = adapted("llama", Method.member("bitfit")())
    with pytest.raises(NotMergeable, match="has no bias"):
        adapter.merge()
    assert not adapter.merged


def test_values_that_are_not_finite_or_overflow_are_refused():
    _, adapter = adapted()
    next(iter(adapter.parameters().values())).data[0] = float("nan")
    with pytest.raises(ArtifactError, match=r"A holds NaN or Inf, so nothing was merged"):
        adapter.merge()
    _, adapter = adapted(dtype=torch.float16)
    perturb(adapter.parameters(), 1e3)
    with pytest.raises(ArtifactError, match=r"with the adapter overflows torch.float16, so nothing was merged"):
        adapter.merge()
    assert not adapter.merged


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_refused(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path / "model")
    base = Base.load_folder(tmp_path / "model", torch.float32, torch.device("cpu"), quantize=kind, with_tokenizer=False)
    adapter = attach(base.model, LoRA(rank=4))
    with pytest.raises(NotMergeable, match=r"q_proj is quantized: its sum with the adapter would have to be quantized again"):
        adapter.merge()
    assert not adapter.merged


def test_in_bfloat16_it_says_how_much_of_the_change_is_left():
    model, adapter = adapted(dtype=torch.bfloat16)
    weights = weights_hash(own_weights(model))
    assert 0.9 < adapter.merge() < 1.0
    assert adapter.layers["model.layers.0.self_attn.q_proj"].twin().weight.dtype == torch.bfloat16
    assert weights_hash(own_weights(model)) == weights
    _, faint = adapted(dtype=torch.bfloat16, size=1e-4)
    assert faint.merge() < 0.5


# What may happen meanwhile


def test_training_it_is_refused_and_so_are_other_values(world):
    model, adapter = adapted()
    state = adapter.state()
    adapter.merge()
    for start in (model.train, adapter.train):
        with pytest.raises(RecipeError, match=r"cannot be trained. Unmerge it first"):
            start()
    with pytest.raises(RecipeError, match="merged, so other values would not act"):
        adapter.load_state(state)
    model.eval()
    adapter.unmerge()
    model.train()
    adapter.load_state(state)


def test_switching_it_off_gives_the_base_and_saving_gives_the_adapter(tmp_path):
    model, adapter = adapted()
    base = Base(model)
    before = logits(model)
    adapter.merge()
    with adapter.disabled():
        assert torch.equal(logits(model), logits(tiny("llama")))
    save_adapter(base, adapter, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "trainer")
    for folder in ("adapter", "trainer"):
        other = Base(tiny("llama"))
        load_adapter(other, tmp_path / folder)
        assert torch.equal(logits(other.model), before)
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["r"] == 4
    done = merge(base, adapter, tmp_path / "merged")
    assert done.max_logit_difference < 1e-4 * max(done.logit_scale, 1)
    base.check_unchanged()
    assert adapter.merged
    adapter.detach()
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert not any(isinstance(module, MergeableLayer) for module in model.modules())


def test_another_adapter_may_come_and_act_with_it():
    """Around a merged one; and around one that is not, while it is merged itself: then it acts unmerged, so that both act."""
    model, adapter = adapted(name="a")
    other = attach(model, LoRA(rank=2, targets=["q_proj", "down_proj"]), name="b")
    perturb(other.parameters(), 0.1, seed=1)
    outputs = {}
    for names in (["a"], ["b"], ["a", "b"]):
        with active(model, *names):
            outputs[*names] = logits(model), logprobs(model)
    for merged in ([adapter], [other], [adapter, other]):
        for one in merged:
            one.merge()
        for names, wanted in outputs.items():
            activate(model, *names)
            for ours, theirs in zip((logits(model), logprobs(model)), wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for one in merged:
            one.unmerge()
    activate(model, "a", "b")
    assert torch.equal(logits(model), outputs["a", "b"][0])


def test_full_fine_tuning_around_a_merged_adapter_acts():
    """It runs a copy of the layer under it with other weights, which a twin would not know of."""
    model, adapter = adapted(name="a")
    full = attach(model, Method.member("full")(targets=["q_proj"]), name="b")
    perturb(full.parameters(), 0.1, seed=1)
    activate(model, "a", "b")
    before = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_merging_again_takes_the_values_of_now_and_copies_are_their_own():
    model, adapter = adapted()
    adapter.merge()
    twin = copy.deepcopy(model)
    was = logits(model)
    assert torch.equal(logits(twin), was)
    perturb(adapter.parameters(), 0.1, seed=4)
    assert torch.equal(logits(model), was), "it computes with the weights of then"
    adapter.merge()
    now = logits(model)
    assert (now - was).abs().max() > 1e-3
    adapter.unmerge()
    torch.testing.assert_close(logits(model), now, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(twin), was)
    wide = twin.double()
    assert {p.dtype for p in next(m for m in wide.modules() if isinstance(m, MergeableLayer)).twin().parameters()} == {
        torch.float64
    }
    torch.testing.assert_close(logits(wide).float(), was, rtol=1e-4, atol=1e-4)


def test_rows_of_new_tokens_stay_beside_the_table():
    model = tiny("llama")
    size = model.config.vocab_size
    sample = Sample(encode=lambda text: [size], pieces=lambda text: [3, 4])
    adapter = attach(model, Method.member("tokens")(new=["<new>"]), sample=sample)
    before = logits(model)
    assert before.shape[-1] == size + 1
    with pytest.raises(NotMergeable, match="rows of new tokens alone"):
        adapter.merge()
    assert torch.equal(logits(model), before)
