"""Generation from a cache is the forward pass, token by token, and agrees with Transformers' own `generate`."""

import pytest
import torch
from families import FAMILIES, method_of, perturb, random_rows, tiny

from trimtab.core.errors import DataError, NonFinite
from trimtab.engine import Generation, decode, generate, layouts, stream_tokens
from trimtab.engine.decode import _groups
from trimtab.engine.sampling import Sampler
from trimtab.methods import Sample, adapters, attach
from trimtab.methods.lora import LoRA

PROMPTS = random_rows(7, 3, 12, 5)


def adapted(family):
    model = tiny(family)
    perturb(attach(model, LoRA(rank=3)).parameters())
    return model


def by_full_passes(model, prompt, count):
    """Greedy decoding without a cache, by the model's own forward pass: the reference."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_batches_equal_full_passes_one_by_one(family):
    model = adapted(family)
    assert generate(model, PROMPTS, [], max_new_tokens=40) == [by_full_passes(model, p, 40) for p in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_are_prefilled_once(family, monkeypatch):
    model = adapted(family)
    head, one, two = random_rows(12, 8, 4, seed=3)
    prompts = [head + one + two, head, head + one, head + two, head + two, two]
    computed = []
    forward = decode.hidden_states
    monkeypatch.setattr(
        decode, "hidden_states", lambda model, ids, *rest: computed.append(len(ids)) or forward(model, ids, *rest)
    )
    assert generate(model, prompts, [], max_new_tokens=12) == [by_full_passes(model, p, 12) for p in prompts]
    assert computed[0] == 12 + 8 + 4 + 4 + 4 + 4  # sharing the last four would not be worth a segment


def test_a_cache_that_forgets_is_noticed(monkeypatch):
    model = adapted("llama")
    expected = generate(model, PROMPTS, [], max_new_tokens=10)
    advance = layouts.DecodeLayout.advance
    monkeypatch.setattr(layouts.DecodeLayout, "advance", lambda self: None)
    assert generate(model, PROMPTS, [], max_new_tokens=10) != expected
    monkeypatch.setattr(layouts.DecodeLayout, "advance", advance)
    assert generate(model, PROMPTS, [], max_new_tokens=10) == expected


def test_an_answer_ends_before_its_stop_token_and_the_others_go_on():
    model = adapted("llama")
    free = generate(model, PROMPTS, [], max_new_tokens=12)
    stop = free[0][4]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert generate(model, PROMPTS, [stop], max_new_tokens=12) == expected
    assert len({len(answer) for answer in expected}) > 1


def test_it_agrees_with_transformers_generate():
    model = adapted("llama")
    for prompt, ours in zip(PROMPTS, generate(model, PROMPTS, [], max_new_tokens=8), strict=True):
        row = torch.tensor([prompt])
        theirs = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == ours


def test_a_stream_is_the_same_tokens():
    model = adapted("llama")
    assert list(stream_tokens(model, PROMPTS[0], [], max_new_tokens=9)) == generate(model, PROMPTS[:1], [], max_new_tokens=9)[0]


def test_draws_depend_on_the_seed_and_the_prompt_alone():
    model = adapted("llama")
    together = generate(model, PROMPTS, [], max_new_tokens=9, settings=Generation(temperature=1.0, seed=1))
    assert together == generate(model, PROMPTS, [], max_new_tokens=9, settings=Generation(temperature=1.0, seed=1))
    assert together != generate(model, PROMPTS, [], max_new_tokens=9, settings=Generation(temperature=1.0, seed=2))
    assert together[0] == generate(model, PROMPTS[:1], [], max_new_tokens=9, settings=Generation(temperature=1.0, seed=1))[0]
    assert generate(model, PROMPTS, [], max_new_tokens=9, settings=Generation(temperature=1e-4)) == generate(
        model, PROMPTS, [], max_new_tokens=9
    )


def test_no_prompts_and_no_tokens_are_no_trouble():
    model = adapted("llama")
    assert generate(model, [], [], max_new_tokens=3) == []
    stop = generate(model, PROMPTS[:1], [], max_new_tokens=1)[0][0]
    assert generate(model, PROMPTS[:1], [stop], max_new_tokens=3) == [[]]


def test_batches_hold_every_prompt_once_within_the_budget():
    prompts = random_rows(4000, 3000, 900, 100, 5000, 96)
    groups = _groups(prompts)
    assert sorted(n for group in groups for n in group) == list(range(6))
    assert all(sum(len(prompts[n]) for n in group) <= 4096 or len(group) == 1 for group in groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_where_the_context_does(family):
    """By prompt: GPT-2 has no position beyond it, and the others would run past it silently."""
    model, prompts = tiny(family), random_rows(60, 3, 62, 64, 61)
    answers = generate(model, prompts, [], max_new_tokens=4)
    assert [(len(answer), answer.ended) for answer in answers] == [
        (4, "length"), (4, "length"), (2, "context"), (0, "context"), (3, "context"),
    ]  # fmt: skip
    assert answers == [by_full_passes(model, prompt, len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    stop = answers[2][1]
    stopped = generate(model, prompts[2:3], [stop], max_new_tokens=4)[0]
    assert (stopped.ended, stopped) == ("stopped", answers[2][: answers[2].index(stop)])
    with pytest.raises(DataError, match=r"Prompt 1 has 65 tokens, and the model's context has 64\."):
        generate(model, [[1], random_rows(65)[0]], [], max_new_tokens=4)


def test_virtual_tokens_take_their_part_of_the_context():
    model = tiny("llama")
    attach(model, method_of("prefix"), sample=Sample(rows=PROMPTS))
    positions = max(adapter.method.virtual_token_count for adapter in adapters(model).values())
    assert positions > 0
    (answer,) = generate(model, random_rows(60 - positions), [], max_new_tokens=100)
    assert (len(answer), answer.ended) == (4, "context")


@pytest.mark.parametrize(("most", "ended"), [(3, "length"), (100, "context")])
def test_a_stream_returns_how_it_ended(most, ended):
    def streamed():
        returned = yield from stream_tokens(tiny("gpt2"), PROMPTS[0], [], max_new_tokens=most)
        yield returned

    *said, end = streamed()
    assert (end, len(said)) == (ended, min(most, 64 - len(PROMPTS[0])))


def test_no_new_tokens_are_none():
    (answer,) = generate(tiny("llama"), PROMPTS[:1], [], max_new_tokens=0)
    assert (answer, answer.ended) == ([], "length")


# As on an accelerator


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(layouts.DecodeLayout, "on_host", False)
    monkeypatch.setattr(layouts.DecodeLayout, "grow_by", 8)


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_keys_in_blocks_and_heads_in_groups_give_the_same_tokens(family, monkeypatch):
    model, sizes, attend = adapted(family), set(), layouts.attend
    expected = [by_full_passes(model, prompt, 20) for prompt in PROMPTS[:2]]

    def watching(query, key, *rest):
        if len(query) == 2:  # packs and prompts are one
            sizes.add((query.shape[1] == key.shape[1], key.shape[2]))
        return attend(query, key, *rest)

    monkeypatch.setattr(layouts, "attend", watching)
    assert generate(model, PROMPTS[:2], [], max_new_tokens=20) == expected
    assert sizes == {(True, 8), (True, 16), (True, 24), (True, 32)}


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_mask_of_the_whole_block_is_noticed(monkeypatch):
    """The control: keys that are not there yet."""
    model = adapted("llama")
    expected = generate(model, PROMPTS, [], max_new_tokens=10)
    monkeypatch.setattr(layouts.DecodeLayout, "grow_by", 64)
    monkeypatch.setattr(layouts, "is_seen", lambda q, k, rules: (k == k) & (q == q))
    assert generate(model, PROMPTS, [], max_new_tokens=10) != expected


def test_draws_are_those_of_multinomial():
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Generation(temperature=0.7), [[1]] * 3, [0, 1, 2], torch.device("cpu"))
    theirs = [torch.Generator().manual_seed(n) for n in range(3)]
    for _ in range(20):
        probabilities = (logits / 0.7).softmax(dim=-1)
        expected = [int(torch.multinomial(probabilities[n], 1, generator=theirs[n])) for n in range(3)]
        assert sampler.choose(logits).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_none_are_said(temperature):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFinite, match="Prompt 0: the logits of the token after it are NaN"):
        generate(model, PROMPTS[:1], [], max_new_tokens=2, settings=Generation(temperature=temperature))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_step_waits_for_nothing(family):
    """On `meta` there are no values: whatever the host would read raises."""
    model = adapted(family).to("meta")
    with torch.no_grad():
        cache, hidden = decode._prefill(model, PROMPTS, torch.device("meta"), None)
        sampler = Sampler(Generation(repetition_penalty=1.2), PROMPTS, range(4), torch.device("meta"))
        for _ in range(3):
            tokens = sampler.choose(decode.head_of(model).logits(hidden))
            hidden = decode._step(model, tokens, cache, None)
        settings = Generation(temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2)
        sampling = Sampler(settings, PROMPTS, [], torch.device("meta"))
        assert sampling.filtered(decode.head_of(model).logits(hidden)).shape == (4, model.config.vocab_size)
        cache.select([0, 2])
        assert decode._step(model, tokens[:2], cache, None).shape == (2, model.config.hidden_size)
    assert cache.counts == [len(prompt) + 4 for prompt in (PROMPTS[0], PROMPTS[2])]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        int(cache.lengths.max())  # what a step did before
