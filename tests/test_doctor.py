"""The doctor finds nothing here, and finds what breaks."""

import json

import pytest
import torch

from trimtab.certify import doctor
from trimtab.certify.doctor import TRIALS, run_trials
from trimtab.core import attention_hook
from trimtab.engine.layouts import DecodeLayout
from trimtab.methods import Attached, Method
from trimtab.methods._lowrank import LowRankLayer
from trimtab.methods.lora import LoRALayer

pytestmark = pytest.mark.usefixtures("one_thread")


def sick():
    return {(one.method, one.name) for one in run_trials() if one.problem}


def test_every_method_is_well_here(trimtab):
    done = trimtab("doctor", "--json")
    said = json.loads(done.out)
    assert said["failed"] == []
    assert said["tried"] == len(Method.names()) * len(TRIALS)
    assert done.code == 0
    assert "torch" in said["versions"]
    assert {(way["device"], way["by"]) for way in said["ways"] if way["dtype"] == "float32"} == {("cpu", "C")}


def only(monkeypatch, *names):
    monkeypatch.setattr(Method, "names", classmethod(lambda cls: list(names)))


def test_virtual_tokens_that_transformers_own_generate_does_not_see(monkeypatch, trimtab):
    """What peft 0.21 does with transformers 5.24, and nobody is told."""
    only(monkeypatch, "lora", "prefix")

    def without(module, query, key, value, mask, rules, virtual, own):
        for one in virtual:
            one.of(module, key)
        return attention_hook.attend(
            query,
            key,
            value,
            mask if mask is not None else attention_hook.causal(query.shape[2], key.shape[2], None, query.device),
            rules,
        ).transpose(1, 2)

    monkeypatch.setattr(attention_hook, "_attend_after_virtual", without)
    assert ("prefix", "Transformers' generate()") in sick() or ("prefix", "acts") in sick()
    assert not {one for one in sick() if one[0] == "lora"}
    done = trimtab("doctor")
    assert done.code == 2
    assert "do not train with them" in done.err
    assert "failed  prefix" in done.out
    assert "ok  lora" in done.out


@pytest.mark.parametrize(
    ("what", "where", "name", "broken"),
    [
        ("acts", LoRALayer, "adapt", lambda self, x: self.base(x)),
        ("leaves no trace", Attached, "detach", lambda self: self.model),
        ("gradient is slope", LoRALayer, "low_rank_factors", lambda self: (self.A, 0.5 * self.B.detach() + 0.5 * self.B)),
        ("cached decoding", DecodeLayout, "advance", lambda self: None),
        ("merged", LowRankLayer, "change", lambda self: -30 * self.scale * self.B.detach() @ self.A.detach()),
    ],
)
def test_what_breaks_is_found(what, where, name, broken, monkeypatch):
    only(monkeypatch, "lora")
    monkeypatch.setattr(where, name, broken)
    assert ("lora", what) in sick()


def test_a_loss_that_forgets_where_its_row_is_and_a_file_that_is_not_what_was_saved_are_found(monkeypatch):
    only(monkeypatch, "lora")
    packed = doctor.pack_logprobs
    monkeypatch.setattr(doctor, "pack_logprobs", lambda model, pack: packed(model, pack).roll(1))
    assert sick() == {("lora", "packed is alone")}
    monkeypatch.setattr(doctor, "pack_logprobs", packed)
    load = doctor.load_adapter

    def half(base, folder):
        adapter = load(base, folder)
        with torch.no_grad():
            next(iter(adapter.parameters().values())).mul_(0.5)

    monkeypatch.setattr(doctor, "load_adapter", half)
    assert sick() == {("lora", "saved and loaded")}
