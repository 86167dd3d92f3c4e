"""The promises on the real SmolLM2-135M-Instruct, where numbers are as they are in use."""

from pathlib import Path

import pytest
import torch
from families import logprob_alone, perturb
from invariants.suite import distance, forced, logits
from worlds import WHOLE

import trimtab
from trimtab.data import SourceReport, load_examples, pack_all, pack_flat, tokenize_examples
from trimtab.engine import generate, pack_logprobs
from trimtab.methods import Method, activate
from trimtab.objectives.sft import SFT
from trimtab.train import TrainConfig, train

DEMO = Path(__file__).parents[1] / "demo"
SMALL = {
    "tokens": {"tokens": ["<|im_start|>", "<|im_end|>"]},
    "dora": {"targets": ("q_proj", "v_proj")},
    "oft": {"targets": ("q_proj", "v_proj")},
    "full": {"targets": ("layers.3", "norm")},
}
"""For methods that need to be told something, or take seconds a step on all of the model."""


@pytest.fixture(scope="module")
def rows(smollm2):
    examples, report = load_examples(str(DEMO / "train.jsonl"))
    return tokenize_examples(examples[:16], smollm2, report)


@pytest.fixture
def adapter(smollm2):
    adapter = trimtab.attach(smollm2.model, trimtab.LoRA(rank=8))
    yield adapter
    adapter.detach()


def test_labels_are_the_answer_and_the_end_of_its_turn(smollm2, rows):
    text = smollm2.tokenizer.decode([rows[0].ids[t] for t in rows[0].target_indices])
    examples, _ = load_examples(str(DEMO / "train.jsonl"))
    assert text == examples[0].messages[-1]["content"] + "<|im_end|>"


def test_packed_rows_equal_rows_alone(smollm2, rows, adapter):
    perturb(adapter.parameters(), 0.02)
    with torch.no_grad():
        packed = pack_logprobs(smollm2.model, pack_flat(rows[:5]))
        alone = torch.stack([logprob_alone(smollm2.model, row.ids, row.target_indices) for row in rows[:5]])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_three_steps_lower_the_loss_and_leave_the_base_alone(smollm2, rows, adapter):
    before = smollm2.fingerprint["weights"]
    steps = list(train(smollm2, adapter, SFT(), [pack_all(rows[:8], 1024)] * 3, TrainConfig(schedule="constant"), 1e-3))
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert all(torch.count_nonzero(tensor) for tensor in adapter.state().values())
    smollm2.check_unchanged()
    assert smollm2.fingerprint["weights"] == before


def test_cached_decoding_equals_full_passes(smollm2, rows, adapter):
    perturb(adapter.parameters(), 0.01)
    prompts = [row.ids[: row.target_indices[0]] for row in rows[:3]]
    answers = generate(smollm2.model, prompts, [], max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = smollm2.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_64_steps_of_cached_decoding_are_the_forward_pass(smollm2, rows):
    """I21 on the real model, whose logits reach 30 or so: to 1e-5 of that. A row for each method, all in one batch."""
    names = Method.names() if WHOLE else ["bottleneck", "ia3", "lora", "prefix", "prompt", "tokens"]  # one for each way to act
    adapters = []
    text = (rows[0].ids * 3)[:70]
    try:
        for name in names:
            method = Method.member(name)(**SMALL.get(name, {}))
            adapters.append(trimtab.attach(smollm2.model, method, name=name, sample=trimtab.sample(smollm2, rows)))
            perturb(adapters[-1].parameters(), 1e-3)
        activate(smollm2.model)
        plain = logits(smollm2.model, [text])[5:-1]
        steps = forced(smollm2.model, [text] * len(adapters), 6, owners=names)
        for name, cached in zip(names, steps, strict=True):
            activate(smollm2.model, name)
            forward = logits(smollm2.model, [text])[5:-1]
            assert len(cached) == 64
            assert distance(cached, forward) <= 1e-5, name
            assert distance(plain, forward) > 1e-3, name
    finally:
        for adapter in adapters:
            adapter.detach()


def test_what_training_reads_is_what_a_chat_asks(smollm2):
    examples, _ = load_examples(str(DEMO / "test.jsonl"))
    report = SourceReport(("demo",))
    for example in examples[:10]:
        (row,) = tokenize_examples([example], smollm2, report)
        asked = smollm2.template.render(example.messages[:-1], prompt=True)
        assert smollm2.encode([asked])[0].ids == row.ids[: row.target_indices[0]]
