"""Several adapters on one base: named, switched, removed, combined, and each on its own rows of one batch."""

import threading

import pytest
import torch
from families import logprob_alone, method_of, perturb, random_rows, tiny

from trimtab.base.fingerprint import own_weights, weights_hash
from trimtab.core.errors import RecipeError
from trimtab.data import pack_flat
from trimtab.data.example import TokenRow
from trimtab.engine import generate, pack_logprobs
from trimtab.methods import Method, Sample, activate, active, adapters, attach, combine
from trimtab.methods.lora import LoRA

SAMPLE = Sample(rows=random_rows(40, seed=5))
IDS = torch.tensor(random_rows(9, 9))
ROWS = [TokenRow(ids, list(range(2, len(ids))), f"row:{n}") for n, ids in enumerate(random_rows(9, 6, 12, 5, 7, 8, seed=3))]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def attached(model, method, name, seed=0):
    adapter = attach(model, method, name=name, sample=SAMPLE)
    perturb(adapter.parameters(), seed=seed)
    return adapter


def two_loras(family="llama"):
    model = tiny(family)
    a = attached(model, LoRA(rank=3, alpha=6.0), "a", seed=1)
    b = attached(model, LoRA(rank=2, targets=["q_proj", "down_proj"], rank_stabilized=True), "b", seed=2)
    return model, a, b


def test_the_newest_acts_alone_and_names_choose():
    model, a, b = two_loras()
    both_off = logits(tiny("llama"))
    assert (a.enabled, b.enabled) == (False, True)
    outputs = {}
    for name, adapter in (("a", a), ("b", b)):
        alone = tiny("llama")
        attach(alone, adapter.method).load_state(adapter.state())
        activate(model, name)
        outputs[name] = logits(model)
        assert torch.equal(outputs[name], logits(alone))
    activate(model)
    assert torch.equal(logits(model), both_off)
    with active(model, "a"):
        assert torch.equal(logits(model), outputs["a"])
        with active(model, "b"):
            assert torch.equal(logits(model), outputs["b"])
        with a.disabled():
            assert torch.equal(logits(model), both_off)
    assert torch.equal(logits(model), both_off)


@pytest.mark.parametrize("names", [("a", "aa"), ("aa", "a"), ("a", "a.b"), ("lora_", "default"), ("🦊", "fox")])
def test_names_are_free_and_one_that_contains_another_is_not_it(names):
    model = tiny("llama")
    first, second = (attached(model, LoRA(rank=2), name, seed=n) for n, name in enumerate(names))
    with active(model, names[1]):
        before, state = logits(model), second.state()
    first.detach()
    assert list(adapters(model)) == [names[1]]
    activate(model, names[1])
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, state[n]) for n, t in second.state().items())


def test_a_name_that_is_taken_or_unknown_is_refused():
    model, *_ = two_loras()
    with pytest.raises(RecipeError, match=r"has an adapter called 'a' already\. Take it off first"):
        attach(model, LoRA(), name="a")
    with pytest.raises(RecipeError, match=r"There is no adapter 'c' on this model\. It has: 'a', 'b'\."):
        activate(model, "c")
    with pytest.raises(RecipeError, match="There is no adapter 'c'"), active(model, "c"):
        pass


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_taken_off_in_any_order_the_model_is_what_it_was(order):
    model = tiny("llama")
    before, keys, digest = logits(model), list(model.state_dict()), weights_hash(own_weights(model))
    several = [attached(model, LoRA(rank=n + 1), f"{n}", seed=n) for n in range(3)]
    for n in order:
        several[n].detach()
    assert torch.equal(logits(model), before)
    assert (list(model.state_dict()), adapters(model)) == (keys, {})
    assert weights_hash(own_weights(model)) == digest


def test_training_one_leaves_the_others_as_they_are():
    model, a, b = two_loras()
    activate(model, "a")
    kept = b.state()
    optimizer = torch.optim.AdamW([*a.parameters().values(), *b.parameters().values()], lr=1e-2, weight_decay=0.1)
    pack_logprobs(model, pack_flat(ROWS)).sum().backward()
    optimizer.step()
    assert all(torch.equal(t, kept[name]) for name, t in b.state().items())
    assert all(p.grad is not None for p in a.parameters().values())


def owners_of_every_method():
    """A base row between the rows of each method, all of them on one model."""
    names = Method.names()
    return [None if n % 3 == 2 else names[n % len(names)] for n in range(3 * len(names))]


@pytest.fixture(scope="module")
def everything():
    """A model with an adapter of every method on it."""
    model = tiny("llama")
    for number, name in enumerate(Method.names()):
        attached(model, method_of(name), name, seed=number)
    activate(model)
    return model


def test_rows_of_every_method_and_of_the_base_in_one_batch_equal_the_rows_alone(everything):
    owners = owners_of_every_method()
    rows = [TokenRow(ids, list(range(1, len(ids))), "row") for ids in random_rows(*(5 + n % 7 for n in range(len(owners))))]
    with torch.no_grad():
        together = pack_logprobs(everything, pack_flat(rows), owners)
        for one, row, owner in zip(together, rows, owners, strict=True):
            with active(everything, *([owner] if owner else [])):
                alone = pack_logprobs(everything, pack_flat([row]))[0]
            assert abs(float(one - alone)) <= 1e-5 * abs(float(alone)), owner
        bare = pack_logprobs(everything, pack_flat(rows))
    assert all((abs(float(x - y)) > 1e-3) == (owner is not None) for x, y, owner in zip(together, bare, owners, strict=True))


def test_the_base_rows_of_a_mixed_batch_are_those_of_a_bare_model(everything):
    with torch.no_grad():
        mixed = pack_logprobs(everything, pack_flat(ROWS[:3]), ["lora", None, "prefix"])[1]
    assert float(mixed) == pytest.approx(float(logprob_alone(tiny("llama"), ROWS[1].ids, ROWS[1].target_indices)), rel=1e-6)


def test_gradients_of_a_mixed_batch_reach_each_rows_adapter_and_equal_those_alone(everything):
    names = Method.names()
    rows = [ROWS[n % len(ROWS)] for n in range(len(names))]
    found = adapters(everything)
    pack_logprobs(everything, pack_flat(rows), names).sum().backward()
    mixed = {name: {n: p.grad.clone() for n, p in found[name].parameters().items()} for name in names}
    everything.zero_grad()
    for name, row in zip(names, rows, strict=True):
        with active(everything, name):
            pack_logprobs(everything, pack_flat([row])).sum().backward()
        for n, p in found[name].parameters().items():
            assert (mixed[name][n] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max().clamp_min(1e-3), f"{name} {n}"
        everything.zero_grad()


def test_prompts_of_every_method_decoded_together_say_what_each_says_alone(everything):
    owners = owners_of_every_method()
    prompts = random_rows(*(3 + n % 6 for n in range(len(owners))), seed=8)
    together = generate(everything, prompts, [], max_new_tokens=12, owners=owners)
    for prompt, owner, said in zip(prompts, owners, together, strict=True):
        with active(everything, *([owner] if owner else [])):
            assert generate(everything, [prompt], [], max_new_tokens=12)[0] == said, owner
    free = generate(everything, prompts, [together[0][3]], max_new_tokens=12, owners=owners)  # rows end at different times
    assert [said[: len(short)] for said, short in zip(together, free, strict=True)] == free


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_tokens_are_told_from_heads_where_there_are_as_many(family):
    """Norms of queries take T H K or H T K. A row's last token is not computed, so 4 tokens meet 4 heads."""
    model = tiny(family, torch.float64)
    adapter = attached(model, method_of("layernorm"), "layernorm")
    rows = [TokenRow(ids, [len(ids) - 1], f"row:{n}") for n, ids in enumerate(random_rows(3, 3))]
    owners = ["layernorm", None]
    mixed = pack_logprobs(model, pack_flat(rows), owners)
    for row, owner, got in zip(rows, owners, mixed, strict=True):
        with active(model, *filter(None, [owner])):
            torch.testing.assert_close(got, logprob_alone(model, row.ids, row.target_indices), rtol=1e-8, atol=1e-8)
    adapter.detach()


def test_a_routing_that_forgets_which_row_is_whose_is_noticed(everything, monkeypatch):
    from trimtab.methods import Routing

    owners = ["lora", None, "ptuning_v2"]
    with torch.no_grad():
        right = pack_logprobs(everything, pack_flat(ROWS[:3]), owners)
        monkeypatch.setattr(
            Routing, "tokens", lambda self, owner, among, device: torch.arange(0 if owner else len(self.owners))
        )
        wrong = pack_logprobs(everything, pack_flat(ROWS[:3]), owners)
    assert abs(float(right[0] - wrong[0])) > 1e-3


def test_two_threads_with_two_adapters_on_one_base_do_not_disturb_each_other():
    model, *_ = two_loras()
    activate(model)
    expected = {}
    for names in ((), ("a",), ("b",)):
        with active(model, *names):
            expected[names] = logits(model)
    wrong = []

    def work(names):
        for _ in range(40):
            with active(model, *names):
                if not torch.equal(logits(model), expected[names]):
                    wrong.append(names)

    threads = [threading.Thread(target=work, args=(names,)) for names in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not torch.equal(expected["a",], expected["b",])


# Combining


def changes(model, name):
    return {path: layer.change() for path, layer in adapters(model)[name].layers.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 2.0, "b": -1.0}])
def test_a_combination_is_the_weighted_sum_of_changes(family, weights):
    model = tiny(family)
    attached(model, LoRA(rank=3, alpha=6.0), "a", seed=1)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    attached(model, LoRA(rank=2, targets=targets, rank_stabilized=True), "b", seed=2)
    done = combine(model, weights, "both")
    assert (done.error, [n for n, a in adapters(model).items() if a.enabled]) == (0.0, ["both"])
    a, b = changes(model, "a"), changes(model, "b")
    for path, change in changes(model, "both").items():
        expected = (
            weights["a"] * a[path].double() + weights["b"] * b[path].double() * (path in b)
            if path in b
            else weights["a"] * a[path]
        )
        torch.testing.assert_close(change.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_one_adapter_with_weight_one_is_itself_and_with_minus_one_its_opposite():
    model, *_ = two_loras()
    activate(model, "b")
    itself = logits(model)
    combine(model, {"b": 1.0}, "same")
    assert torch.equal(logits(model), itself)
    combine(model, {"b": -1.0}, "opposite")
    for path, change in changes(model, "opposite").items():
        assert torch.equal(change, -changes(model, "b")[path])


def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_told():
    model, *_ = two_loras()
    weights = {"a": 0.7, "b": 0.3}
    exact = combine(model, weights, "exact")
    small = combine(model, weights, "small", rank=2)
    whole, part = changes(model, "exact"), changes(model, "small")
    lost = sum(float((whole[path].double() - part[path].double()).square().sum()) for path in whole)
    best = sum(float((torch.linalg.svdvals(whole[path].double())[2:] ** 2).sum()) for path in whole)
    total = sum(float(whole[path].double().square().sum()) for path in whole)
    assert lost == pytest.approx(best, rel=1e-5)
    assert small.error == pytest.approx((best / total) ** 0.5, rel=1e-5)
    assert 0.05 < small.error < 1
    assert combine(model, weights, "enough", rank=5).error < 1e-6
    assert exact.error == 0.0


def test_what_does_not_add_up_is_refused():
    model, *_ = two_loras()
    attached(model, Method.pick("ptuning_v2"), "p")
    with pytest.raises(RecipeError, match="'p' is of the method ptuning_v2, and only changes that LoRA made add up"):
        combine(model, {"a": 1.0, "p": 1.0}, "c")
    with pytest.raises(RecipeError, match="There is no adapter 'z'"):
        combine(model, {"z": 1.0}, "c")
    with pytest.raises(RecipeError, match="nothing to combine"):
        combine(model, {}, "c")
    assert list(adapters(model)) == ["a", "b", "p"]
