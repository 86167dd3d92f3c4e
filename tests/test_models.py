"""A sample of `make models`: one model of each kind, with its status as it is now; and what measures, measured on broken models.

`make models` takes all of them: benchmarks/models.
"""

import json
from pathlib import Path

import models.subject
import pytest
import torch
from models import configurations, references, table
from models.examine import STATUSES, examine, examine_model
from models.lines import LINES
from models.measures import MEASURES
from models.subject import Subject

from trimtab.core.errors import UnsupportedModel
from trimtab.engine import check, head, layouts
from trimtab.methods import Attached, lora

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "qwen3": "exact by hand",
    "mixtral": "exact by hand",  # experts
    "qwen2_moe!window": "exact by hand",  # windows of which only the mask knows
    "diffllama": "exact by hand",  # two attentions a layer
    "gpt_oss": "exact by hand",  # attention sinks
    "qwen3_5_text": "exact by hand",  # gated DeltaNet
    "lfm2": "exact by hand",  # short convolutions
    "granitemoehybrid": "exact by hand",  # Mamba 2
    "deepseek_v3": "exact by hand",  # multi-head latent attention
    "gemma3": "exact by hand",  # a text model in one that reads images
    "llama4_text": "exact",  # chunks
    "deepseek_v32!wide": "exact",  # an indexer
    "bert": "refused",  # a head of several layers
}
"""One model of each kind: its status."""
QUICK = ("scored", "generated", "untouched", "tree", "lora", "gradient", "prefix")
"""The measures that the sample takes: those that differ by kind."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject(name):
    return Subject(configurations.build(configurations.cases()[name]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_of_each_kind(name):
    result = examine(configurations.cases()[name], QUICK)
    assert result["status"] == EXPECTED[name], json.dumps(result, indent=1)


def test_a_model_that_cannot_be_run_is_not_measured():
    result = examine(configurations.cases()["bert!encoder"])
    assert result["status"] == "unbuilt"
    assert "no causal model" in result["reason"]


# Whether a mistake shows: each of these breaks one thing in Trimtab, and the measure of it says so.


def broken(name, measure, status="WRONG"):
    """The result of a measure, after Trimtab has been broken."""
    result = examine_model(subject(name), (measure,))
    assert result["status"] == status, result
    assert status == "refused" or measure in result["reason"]
    return result


@pytest.fixture
def unchecked(monkeypatch):
    """The check before every run, which finds these mistakes itself, is off."""
    monkeypatch.setattr(check, "_checked", {})
    for module in (check, models.subject):
        monkeypatch.setattr(module, "check_packing", lambda model: None)


def test_a_window_that_is_ignored_is_seen(monkeypatch, unchecked):
    causal = layouts.causal
    monkeypatch.setattr(layouts, "causal", lambda q, k, rules, device: causal(q, k, rules._replace(window=None), device))
    for measure in ("flat", "tree", "scored"):
        broken("olmo3", measure)


def test_rows_that_see_each_other_are_seen(monkeypatch, unchecked):
    def one_path(self):
        return [list(range(number + 1)) for number in range(len(self.segments))]

    monkeypatch.setattr(layouts.PackLayout, "paths", property(one_path))
    for measure in ("flat", "across"):
        broken("olmo3", measure)


def test_a_cache_that_is_wrong_is_seen(monkeypatch, unchecked):
    grown = layouts.DecodeLayout._grown
    monkeypatch.setattr(layouts.DecodeLayout, "_grown", lambda self, stored: grown(self, stored).roll(1, dims=2))
    broken("olmo3", "generated")


def test_logits_that_are_slightly_off_are_seen(monkeypatch, unchecked):
    """Though every token is the right one."""
    logits = head.Head.logits
    monkeypatch.setattr(head.Head, "logits", lambda self, *args: logits(self, *args) * 1.001)
    broken("olmo3", "generated")


def test_an_adapter_that_changes_the_model_when_it_is_off_is_seen(monkeypatch):
    monkeypatch.setattr(lora.LoRALayer, "forward", lambda self, x: self.adapt(x) + 1e-6)
    broken("qwen3", "untouched")


def test_a_merge_into_another_matrix_is_seen(monkeypatch):
    monkeypatch.setattr(lora.LoRALayer, "change", lambda self: 1.1 * (self.scale * self.B @ self.A).detach())
    result = examine_model(subject("qwen3"), ("merge",))
    assert "logits differ" in result["measured"]["merge"]["refused"]  # merge itself compares


def test_an_adapter_that_is_not_loaded_is_seen(monkeypatch):
    monkeypatch.setattr(Attached, "load_state", lambda self, tensors: None)
    broken("qwen3", "saved")


def test_a_gradient_that_is_wrong_is_seen(monkeypatch):
    factors = lora.LoRALayer.factors

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    calls = []

    def sometimes(self):
        calls.append(self)
        A, B = factors(self)
        return (Doubled.apply(A), B) if len(calls) < 30 else (A, B)

    monkeypatch.setattr(lora.LoRALayer, "factors", sometimes)
    broken("olmo3", "gradient")


def test_an_adapter_that_does_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(lora.LoRALayer, "forward", lambda self, x: self.base(x))
    broken("olmo3", "lora")


def test_refusals_and_crashes_are_told_apart(monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedModel("It is not supported.")

    monkeypatch.setattr(lora.LoRALayer, "change", lambda self: 1 / 0)
    assert "merge: ZeroDivisionError: division by zero (_lowrank.py:" in broken("qwen3", "merge", "crash")["reason"]
    monkeypatch.setattr(layouts.PackLayout, "attend", refuse)
    assert broken("mixtral", "check", "refused")["reason"] == "It is not supported."


def test_greedy_tokens_have_no_deficit_and_others_have():
    model = subject("qwen3").pristine
    prompt, answer = references.prompts()[1], []
    with torch.no_grad():
        for _ in range(3):
            answer.append(int(references.own_logits(model, [*prompt, *answer])[-1].argmax()))
        scores = references.own_logits(model, [*prompt, *answer])[len(prompt) - 1 : -1]
    assert references.greedy_deficit(scores, answer) == 0.0
    assert references.greedy_deficit(scores, [*answer[:2], (answer[2] + 1) % 100]) > 1e-3


# The table


@pytest.fixture(scope="module")
def kept():
    return json.loads((ROOT / "docs" / "measured" / "models.json").read_text(encoding="utf-8"))


def test_what_is_kept_is_of_every_model_that_transformers_registers(kept):
    assert set(kept["models"]) == set(configurations.cases())
    for name, result in kept["models"].items():
        assert result["status"] in STATUSES, name
        assert result["status"] == "unbuilt" or set(result["measured"]) <= set(MEASURES), name


def test_lines_name_models_that_there_are():
    assert len(LINES) == 45
    assert {case for cases in LINES.values() for case in cases} <= set(configurations.cases())


def test_the_table_says_what_was_measured(kept):
    models = {
        "qwen3": kept["models"]["qwen3"],
        "llama": {**kept["models"]["llama"], "status": "refused", "reason": "It is | not."},
    }
    page = table.page({"versions": {"transformers": "5"}, "models": models})
    assert "| 1 | Qwen3 0.6B to 32B | `qwen3` | exact by hand | yes | yes | yes |  |" in page
    assert r"It is \| not." in page
    assert "Of 45 lines, 1 can be trained by name, 1 of them with LoRA's default" in page
