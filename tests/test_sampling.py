"""Generation settings: the distributions are Transformers' own, and strings end answers however tokens divide them."""

import itertools

import pytest
import torch
import transformers
from families import perturb, random_rows, tiny
from templates import CHATML, base_of, bytes_tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import RepetitionPenaltyLogitsProcessor

import trimtab
from trimtab.core.errors import RecipeError
from trimtab.engine import Generation, before_stop, generate, possible_stop, stream_tokens
from trimtab.engine.sampling import Sampler, StopWatch
from trimtab.methods import attach
from trimtab.methods.lora import LoRA

PROMPTS = random_rows(7, 3, 12, 5)
VOCABULARY = 97


@pytest.fixture(scope="module")
def model():
    model = tiny("llama")
    perturb(attach(model, LoRA(rank=3)).parameters())
    return model


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>")


def by_transformers(settings, sequences, logits):
    """What Transformers' own processors make of logits, in its order."""
    ids = torch.tensor(sequences)
    chain = [
        (settings.repetition_penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)),
        (settings.temperature, lambda: TemperatureLogitsWarper(settings.temperature)),
        (settings.top_k, lambda: TopKLogitsWarper(settings.top_k)),
        (settings.top_p < 1, lambda: TopPLogitsWarper(settings.top_p)),
    ]
    for wanted, make in chain:
        logits = make()(ids, logits) if wanted else logits
    return logits.softmax(dim=-1)


SETTINGS = [
    {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": penalty}
    for temperature, top_p, top_k, penalty in itertools.product(
        (0.3, 1.0, 2.5), (1.0, 0.9, 0.05), (0, 1, 7, 500), (1.0, 1.3, 0.7)
    )
]


def test_distributions_are_those_of_transformers():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, VOCABULARY, generator=draw) * 4
    logits[0, 5] = logits[0].topk(7).values[-1]  # a tie at the edge of top_k
    sequences = torch.randint(VOCABULARY, (4, 30), generator=draw).tolist()
    kept = set()
    for raw in SETTINGS:
        settings = Generation(**raw)
        ours = Sampler(settings, sequences, range(4), torch.device("cpu")).filtered(logits.clone()).softmax(dim=-1)
        theirs = by_transformers(settings, sequences, logits.clone())
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), raw
        assert ((ours > 0) == (theirs > 0)).all(), raw
        kept.add(int((ours > 0).sum()))
    assert len(kept) > 10  # the settings differ


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "repetition_penalty"])
def test_a_setting_that_is_not_applied_is_noticed(key):
    """The control: each setting by itself changes the distribution."""
    raw = {"temperature": 0.9, "top_p": 0.8, "top_k": 9, "repetition_penalty": 1.4}
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    sequences = torch.randint(VOCABULARY, (4, 30), generator=torch.Generator().manual_seed(2)).tolist()
    without = raw | {key: {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}[key]}
    ours = Sampler(Generation(**without), sequences, range(4), torch.device("cpu")).filtered(logits).softmax(dim=-1)
    assert not torch.allclose(ours, by_transformers(Generation(**raw), sequences, logits), atol=1e-3)


def test_a_penalty_gives_the_tokens_of_transformers_generate(model):
    plain, ours = (
        generate(model, PROMPTS, [], max_new_tokens=40, settings=Generation(repetition_penalty=p)) for p in (1.0, 1.5)
    )
    assert plain != ours
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=40,
            do_sample=False, repetition_penalty=1.5, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answer == theirs[0, len(prompt) :].tolist()


def test_a_penalty_is_for_each_sequence_its_own_when_others_end(model):
    settings = Generation(repetition_penalty=1.5)
    free = generate(model, PROMPTS, [], max_new_tokens=12, settings=settings)
    stop = free[0][3]
    together = generate(model, PROMPTS, [stop], max_new_tokens=12, settings=settings)
    assert together == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len({len(answer) for answer in together}) > 1


def test_what_is_sampled_depends_on_seed_and_index_and_not_on_the_batch(model):
    settings = Generation(temperature=1.5, top_p=0.95, top_k=40, repetition_penalty=1.1, seed=3)
    together = generate(model, PROMPTS, [], max_new_tokens=9, settings=settings)
    alone = [generate(model, [prompt], [], max_new_tokens=9, settings=settings, first=n)[0] for n, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together != generate(model, PROMPTS, [], max_new_tokens=9, settings=settings.model_copy(update={"seed": 4}))
    assert list(stream_tokens(model, PROMPTS[0], [], max_new_tokens=9, settings=settings)) == together[0]


def test_top_k_of_one_is_greedy(model):
    greedy = generate(model, PROMPTS, [], max_new_tokens=9)
    for settings in (Generation(temperature=2, top_k=1), Generation(temperature=2, top_p=1e-6)):
        assert generate(model, PROMPTS, [], max_new_tokens=9, settings=settings) == greedy
    assert generate(model, PROMPTS, [], max_new_tokens=9, settings=Generation(temperature=2, top_k=5)) != greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.9}, "top_p would change nothing: with temperature 0, the most likely token is always taken"),
        ({"top_k": 4, "top_p": 0.9}, "top_p and top_k would change nothing"),
        ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
        ({"top_p": 0.0, "temperature": 1}, "top_p: expected a number above 0, got 0.0"),
        ({"top_p": 1.5, "temperature": 1}, "top_p: expected a number of at most 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, got 0"),
        ({"stop": [""]}, "stop.0: expected a text that is not empty, got ''"),
        ({"seed": -1}, "seed: expected a number of at least 0, got -1"),
    ],
)
def test_settings_that_are_wrong_or_change_nothing_are_refused(settings, message):
    with pytest.raises(RecipeError) as caught:
        Generation(**settings)
    assert message in str(caught.value)


# Stop strings


def watched(pieces, stops):
    """After how many tokens an answer of these texts ends; None if never."""
    watch = StopWatch(stops, lambda ids: "".join(pieces[n] for n in ids))
    return next((n + 1 for n in range(len(pieces)) if watch.has_stopped(n)), None)


@pytest.mark.parametrize(
    ("pieces", "stops", "after"),
    [
        (["a", "b\n\nQ", ": c"], ["\n\nQ:"], 3),
        (["a", "b\n", "\n", "Q", ":"], ["\n\nQ:"], 5),
        (["a", "bQQ", "Q:x", "y"], ["QQQ:"], 3),
        (["xEN", "D", "more"], ["STOP", "END"], 2),
        (["STO", "xP"], ["STOP"], None),
        (["whole stop inside one token", "x"], ["stop"], 1),
        (["a"] * 50 + ["stop"], ["stop"], 51),
    ],
)
def test_a_string_is_found_however_tokens_divide_it(pieces, stops, after):
    assert watched(pieces, stops) == after


def test_an_answer_ends_before_the_string_also_inside_characters_of_several_bytes(base):
    """A tokenizer of bytes, each a token: 停 has three."""
    (encoded,) = base.encode(["do 停止 it"])
    watch = StopWatch(["停"], base.raw_text)
    stopped = [watch.has_stopped(token) for token in encoded.ids]
    assert stopped.index(True) == len(b"do ") + len("停".encode()) - 1
    assert before_stop(base.raw_text(encoded.ids[: stopped.index(True) + 1]), ["停"]) == "do "


def test_generation_and_streams_stop_at_a_string(base):
    (free,) = generate(base.model, [[5, 6, 7]], [], max_new_tokens=60)
    text = base.raw_text(free)
    stop = text[20:24]
    cut = text[: text.index(stop)]
    settings = Generation(stop=("never said", stop))
    (answer,) = generate(base.model, [[5, 6, 7]], [], max_new_tokens=60, settings=settings, text_of=base.raw_text)
    assert (answer.ended, before_stop(base.raw_text(answer), settings.stop)) == ("stopped", cut)
    assert len(answer) < len(free)
    with pytest.raises(RecipeError, match=r"text_of has to be given: base\.raw_text"):
        generate(base.model, [[5, 6, 7]], [], max_new_tokens=6, settings=settings)


def test_a_stream_holds_back_what_may_begin_a_stop_string(base):
    whole = trimtab.answer(base, "Hello", max_new_tokens=80)
    stop = whole[30:36]
    pieces = trimtab.stream(base, "Hello", max_new_tokens=80, stop=stop)

    def listened():
        ended.append((yield from pieces))

    ended = []
    said = list(listened())
    assert "".join(said) == whole[: whole.index(stop)] == trimtab.answer(base, "Hello", max_new_tokens=80, stop=[stop])
    assert ended == ["stopped"]
    assert all(said)
    assert trimtab.answer(base, "Hello", max_new_tokens=80, stop=["never said"]) == whole
    with pytest.raises(RecipeError, match=r"temprature: no such key\. Did you mean 'temperature'"):
        trimtab.answer(base, "Hello", temprature=1.0)


def test_what_may_begin_a_stop_string():
    assert possible_stop("abc\n\n", ["\n\nQ:"]) == 2
    assert possible_stop("abc", ["cab", "bcd"]) == 2
    assert possible_stop("abc", ["abc"]) == 0  # it is there whole, which is not for the future
    assert possible_stop("", ["a"]) == 0


def test_transformers_has_the_order_in_which_settings_are_applied():
    """The reference's own list: penalty, temperature, top_k, top_p."""
    config = transformers.GenerationConfig(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=1.2)
    chain = tiny("llama")._get_logits_processor(config, input_ids_seq_length=3, device="cpu", logits_processor=None)
    assert [type(one).__name__ for one in chain] == [
        "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
    ]  # fmt: skip
