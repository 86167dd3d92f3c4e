"""The negative controls: the code is broken for each invariant in turn, and the invariant must notice."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from invariants import suite
from invariants.suite import INVARIANTS, case_of
from trimtab.base import Base
from trimtab.core.errors import TrimtabError
from trimtab.engine import layers, layouts
from trimtab.engine.learning import current_lesson
from trimtab.engine.tree_attention import attend
from trimtab.methods import Attached, Routing, _combine, adapters
from trimtab.methods._lowrank import LowRankLayer
from trimtab.methods.lora import LoRA, LoRALayer
from trimtab.objectives.dpo import DPO
from trimtab.objectives.kto import KTO

NOTICED = (AssertionError, TrimtabError, pytest.fail.Exception, RuntimeError)


def _half(self):
    return self.A, self.scale * (0.5 * self.B.detach() + 0.5 * self.B)


def _touch(self, x):
    self.base.weight.data.add_(1e-6)
    return self.base(x) + self.scale * x @ self.A.T @ self.B.T


def _unlike(self):
    self.calls = getattr(self, "calls", 0) + 1
    return self.A, (1 + self.calls % 2) * self.scale * self.B


def _into_base(self):
    self.base.weight.data.add_(self.change())
    return self.base


def _unchecked(self, tensors):
    for name, parameter in self.parameters().items():
        if name in tensors and tensors[name].shape == parameter.shape:
            parameter.data.copy_(tensors[name])


@contextmanager
def _for_everybody(self):
    self.switch.on = False
    try:
        yield
    finally:
        self.switch.on = True


def _greedy_detach(self):
    for adapter in adapters(self.model).values():
        if adapter.name[0] == self.name[0]:
            _detach(adapter)
    return self.model


def _drawn_anew(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    with torch.no_grad():
        self.A.add_(torch.rand(self.A.shape, generator=_noise))


def _with_a_nonce(self, model, tensors):
    config, renamed = _to_peft(self, model, tensors)
    return {**config, "nonce": float(torch.rand(1, generator=_noise))}, renamed


_detach, _init, _to_peft, _noise = Attached.detach, LowRankLayer.__init__, LoRA.to_peft, torch.Generator().manual_seed(0)
_logprobs, _layer_train = suite.pack_logprobs, nn.Module.train
ONLY_BASE = (LoRALayer, "adapt", lambda self, x: self.base(x))
NO_PREFIX = (layouts.PrefillLayout, "virtual_before", lambda self, *_: [[] for _ in self.segments])


def _with_parents(parent):
    """Packs in which a segment has other ancestors than it should."""

    def made(self, segments, *rest):
        _laid(self, tuple(segment._replace(parent=parent(n)) for n, segment in enumerate(segments)), *rest)

    return made


def _seeing_later_keys(*given):
    """Not while layers are learned, or they would run the model's own code."""
    out = attend(*given)
    return out + out.mean(dim=0) if current_lesson() is None else out


def _pooled_over_one_pack(model, objective, packs):
    learned, _ = _learned_and_pooled(model, objective, packs)
    return learned, _learned_and_pooled(model, objective, packs[:1])[1]


_laid, _kto_losses = layouts.PackLayout.__init__, KTO.losses
_learned_and_pooled = suite.learned_and_pooled

BROKEN = {
    "I01": ("lora", (LoRALayer, "low_rank_factors", lambda self: (self.A, self.B + 1e-3))),
    "I02": ("lora", ONLY_BASE),
    "I02 in generation": ("ptuning_v2", NO_PREFIX),
    "I03": ("lora", (LoRALayer, "adapt", _touch)),
    "I04": ("lora", (Attached, "disabled", _for_everybody)),
    "I05": ("lora", (Attached, "detach", lambda self: self.model)),
    "I06": ("lora", (Base, "__init__", lambda self, model: _base_with_a_trainable_norm(self, model))),
    "I07": ("lora", (LoRA, "lr_multiplier", lambda self, name: 0.0 if name == "A" else 1.0)),
    "I08": ("lora", (LoRALayer, "low_rank_factors", _half)),
    "I10": ("lora", (LoRALayer, "train", lambda self, mode=True: _layer_train(self, True))),
    "I12": ("lora", (LoRA, "to_peft", _with_a_nonce)),
    "I13": ("lora", (Attached, "load_state", _unchecked)),
    "I14": ("lora", (Base, "check_is", lambda *_: None)),
    "I15": ("lora", (LowRankLayer, "change", lambda self: 0.5 * self.scale * self.B.detach() @ self.A.detach())),
    "I16": ("lora", (LowRankLayer, "merge", _into_base)),
    "I17": ("ptuning_v2", (suite, "merge", lambda base, adapter, folder: folder.mkdir())),
    "I18": ("lora", (_combine, "_factors", lambda a: {p: (layer.A.data, 2 * layer.B.data) for p, layer in a.layers.items()})),
    "I19": ("lora", (Attached, "detach", _greedy_detach)),
    "I20": ("lora", (Routing, "tokens", lambda self, owner, *_: torch.arange(0 if owner else len(self.owners)))),
    "I21": ("lora", (layouts.DecodeLayout, "advance", lambda self: None)),
    "I21 in the prefix": ("ptuning_v2", NO_PREFIX),
    "I22": ("lora", (layouts.PackLayout, "__init__", _with_parents(lambda number: number - 1))),
    "I23": ("lora", (suite, "pack_logprobs", lambda model, pack: _logprobs(model, pack) / len(pack.rows))),
    "I23 in a tree": ("lora", (layouts.PackLayout, "__init__", _with_parents(lambda number: -1))),
    "I23 in kto": ("lora", (suite, "learned_and_pooled", _pooled_over_one_pack)),
    "I23 in dpo": ("lora", (DPO, "counts", lambda self, pack: [len(pack.rows) % 3 + 1])),
    "I08 in kto": (
        "lora",
        (KTO, "losses", lambda self, *given: _kto_losses(self, given[0].detach() * 0.5 + given[0] * 0.5, *given[1:])),
    ),
    "I24": ("lora", (LoRALayer, "low_rank_factors", _unlike)),
    "I25": ("lora", (layers, "attend", _seeing_later_keys)),
    "I26": ("lora", (torch, "promote_types", lambda one, other: one)),
    "I29": ("lora", ONLY_BASE),
    "I32": ("lora", (LowRankLayer, "__init__", _drawn_anew)),
    "I33": ("lora", (LoRA, "parameter_count", lambda self, model: 7)),
    "I34": ("lora", (suite, "active", lambda *_: nullcontext())),
}


def _base_with_a_trainable_norm(self, model):
    self.model, self.source, self.tokenizer, self._frozen_weights = model, "tiny", None, {}
    model.get_submodule("model.norm").requires_grad_(True)


@pytest.mark.parametrize("control", BROKEN)
def test_it_notices(control, tmp_path, monkeypatch):
    name, (method, (owner, attribute, broken)) = control[:3], BROKEN[control]
    check = next(one for known, one in INVARIANTS.items() if known.startswith(name))
    objective = control[-3:] if control[-3:] in ("dpo", "kto") else "sft"
    whole = tmp_path / "whole"
    whole.mkdir()
    check(case_of(method, "llama", whole, objective))  # the baseline: unbroken, it holds
    monkeypatch.setattr(owner, attribute, broken)
    if attribute == "__init__" and owner is Base:
        monkeypatch.setattr(Attached, "__init__", _attached_without_freezing(Attached.__init__))
    hurt = tmp_path / "hurt"
    hurt.mkdir()
    with pytest.raises(NOTICED):
        check(case_of(method, "llama", hurt, objective))


def _attached_without_freezing(init):
    def made(self, model, *rest):
        init(self, model, *rest)
        model.get_submodule("model.norm").requires_grad_(True)

    return made


def test_every_invariant_has_a_control():
    assert {control[:3] for control in BROKEN} == {name[:3] for name in INVARIANTS}


def test_a_round_trip_that_loses_something_is_noticed(tmp_path):
    """I11's control: what is saved is not what was trained."""
    base, adapter = case_of("lora", "llama", tmp_path).based()
    expected = suite.logits(base.model)
    to_inference_form = adapter.to_inference_form
    adapter.to_inference_form = lambda: (
        to_inference_form()[0],
        {name: copy.copy(t) * 2 for name, t in to_inference_form()[1].items()},
    )
    suite.save_adapter(base, adapter, tmp_path / "saved")
    other = Base(case_of("lora", "llama", tmp_path).fresh())
    suite.load_adapter(other, tmp_path / "saved")
    assert suite.distance(suite.logits(other.model), expected) > 1e-3


def test_a_rate_of_nothing_learns_nothing(tmp_path):
    """I35's control."""
    case = case_of("lora", "llama", tmp_path)
    base, adapter = case.based()
    losses = case.learn(base, adapter, 3, rate=0.0)
    assert losses[0] == losses[-1] > 0.05
