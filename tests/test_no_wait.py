"""A step never waits for the device: it runs on `meta`, where whatever asks for a number raises, by the code for accelerators."""

import ast
import copy
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerators import cuda_backend
from families import method_of, random_rows, tiny
from kinds import kind
from torch.overrides import TorchFunctionMode

import trimtab
from trimtab import Base
from trimtab.core.transfer import to_device
from trimtab.data import TokenRow, pack_all, pack_flat
from trimtab.data.mismatched import with_mismatched
from trimtab.engine import FrozenLayerCache, forward, pack_logprobs
from trimtab.engine.forward import prepare
from trimtab.engine.patching import layers_by_hand
from trimtab.methods import Method, Sample, adapters, attach
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.train import TrainConfig, loop, train
from trimtab.train.optimizer import Optimizer

META = torch.device("meta")
UPPER = LoRA(rank=2, targets=(r".*layers\.1\..*_proj",))


class NoWait(TorchFunctionMode):
    """Refuses what passes on `meta` and waits on a device: numbers that are copied to it from memory that is not pinned."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]).type != "meta" or isinstance(args[0], torch.Tensor), "a list is sent"
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                assert not isinstance(index, list), "a list is an index"
                assert not isinstance(index, torch.Tensor) or index.is_meta, "an index is on the host"
        if function is torch.Tensor.to and not args[0].is_meta:
            places = [one for one in (kwargs.get("device"), *args[1:]) if isinstance(one, str | torch.device)]
            sent = any(torch.device(place).type == "meta" for place in places)
            caller = sys._getframe(1).f_code
            assert not sent or caller is to_device.__code__, "a copy is waited for"  # it pins what goes to CUDA
        return function(*args, **kwargs)


def rows_of(kind):
    """Four rows, of which two share a prompt."""
    sides, made = {"answers": [None, None], "pairs": ["chosen", "rejected"], "judged": ["good", "bad"]}[kind], []
    for number in range(2):
        prompt = random_rows(9, seed=number)[0]
        for side in sides:
            ids = [*prompt, *random_rows(3 + number, seed=len(made) + 9)[0]]
            made.append(TokenRow(ids, list(range(9, len(ids))), f"row:{number}", len(ids), side, -20.0 if side else None))
    return [replace(row, reference=-20.0) for row in with_mismatched(made, 0)] if kind == "judged" else made


@cache
def learned(family):
    """A model whose layers are known: they are the same for every adapter."""
    model = tiny(family)
    prepare(model)
    return model


def on_meta(model, dtype=torch.float32, **methods):
    """Moved there with adapters, when its layers are known."""
    model = copy.deepcopy(learned(model)) if isinstance(model, str) else model
    for name, method in methods.items():
        attach(model, method, name=name, sample=Sample(rows=random_rows(30)))
    prepare(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype if not parameter.requires_grad else parameter.dtype)
    return model.to(META)


@cache
def with_lora():
    return on_meta("llama", torch.bfloat16, first=LoRA(rank=2))


@pytest.fixture
def reads(monkeypatch):
    """How many tensors each read of a step wants; what it gets are zeros. A device without numbers has no generator either."""
    asked = []

    def read(tensors):
        assert all(tensor.is_meta for tensor in tensors)
        asked.append(len(tensors))
        return [torch.zeros(tensor.shape) for tensor in tensors]

    monkeypatch.setattr(loop, "read", read)
    monkeypatch.setattr(loop, "seeded", lambda *_: nullcontext())
    monkeypatch.setattr(Optimizer, "step", lambda self, lr: self.skip())
    return asked


class Recomputes:
    """As a MemoryPlan, for packs that do not fit otherwise."""

    arena_bytes, frozen_cache_bytes = 0, 1e9

    def __init__(self, level):
        self.level = level

    def recomputed(self, pack):
        return self.level


def steps_of(model, objective="sft", recompute="none", count=1, epochs=1, weight=None):
    made = Objective.pick(objective)
    made = made.resolve_auto(rows_of(made.data_kind))
    rows = rows_of(made.data_kind)
    packs = pack_all([replace(row, weights=weight and [weight] * len(row.target_indices)) for row in rows], 20)
    assert len(packs) > 1
    config = TrainConfig(epochs=epochs, schedule="constant", warmup=0.0)
    with cuda_backend(), NoWait():
        return list(train(Base(model), adapters(model)["first"], made, [packs] * count, config, 1e-3, Recomputes(recompute)))


@pytest.mark.parametrize("objective", Objective.names())
def test_a_step_of_any_objective_waits_once(objective, reads):
    """For the loss, its measures and the gradient's norm together."""
    count = 2 if objective == "kto" else 1
    steps = steps_of(with_lora(), objective, count=count)
    assert len(reads) == len(steps) == count
    assert min(reads) > (2 if objective == "sft" else 10)


@pytest.mark.parametrize("targets", [".*q_proj", "lm_head"])
def test_a_step_on_weighted_tokens_waits_once(targets, reads):
    """With a frozen head, and with an adapted one."""
    steps_of(on_meta("llama", torch.bfloat16, first=LoRA(rank=2, targets=(targets,))), weight=0.5)
    assert len(reads) == 1


@pytest.mark.parametrize("name", Method.names())
def test_no_methods_passes_wait(name, reads):
    model = on_meta("llama", torch.bfloat16, first=method_of(name))
    assert any("by hand" in text for text in layers_by_hand(model))
    steps_of(model)
    assert len(reads) == 1


@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.1), method_of("prefix")])
def test_no_passes_on_a_base_in_float32_wait(method, reads):
    """By a call of attention for each segment; the others are on a base in bfloat16, by one of flash attention."""
    steps_of(on_meta("llama", first=method))


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
def test_what_is_computed_again_does_not_wait(recompute, reads):
    steps_of(with_lora(), recompute=recompute)


def test_an_adapted_head_does_not_wait(reads):
    """Here one with a cap, on layers by their own code."""
    model = on_meta("gemma2", first=LoRA(rank=2, targets=(".*q_proj", "lm_head")))
    with cuda_backend():
        assert forward.head_of(model).adapted is not None
    steps_of(model)


@pytest.mark.parametrize("name", ["gated DeltaNet", "a window that masks alone say"])
def test_layers_of_other_kinds_do_not_wait(name, reads):
    """With state; and with experts, and masks that alone say the window."""
    steps_of(on_meta(kind(name), torch.bfloat16, first=LoRA(rank=8)))


def test_outputs_of_frozen_layers_are_kept_and_used_without_waiting(reads):
    model = on_meta("llama", first=UPPER)
    cache = FrozenLayerCache(model, 1e9)
    packs = pack_all(rows_of("answers"), 20)
    with cuda_backend(), NoWait():
        for pack in packs * 2:
            pack_logprobs(model, pack.to(META), frozen_cache=cache).sum().backward()
    assert len(cache.rows) == 4


def test_rows_of_several_adapters_share_a_pass_that_does_not_wait():
    model = on_meta(
        tiny("llama"), first=LoRA(rank=2), second=LoRA(rank=3, targets=(".*q_proj", "lm_head")), third=method_of("prefix")
    )
    pack = pack_flat(rows_of("answers")).to(META)
    with cuda_backend(), NoWait():
        pack_logprobs(model, pack, ["first", "second", None, "third"]).sum().backward()


def waits(t):
    """Ways to wait for a device, or for what was sent to it."""
    return {
        "item": lambda: t.sum().item(),
        "float": lambda: float(t.sum()),
        "tolist": lambda: t.flatten().tolist(),
        "bool": lambda: bool(t.any()),
        "unique": lambda: t.unique(),
        "nonzero": lambda: t.nonzero(),
        "a mask": lambda: t[t > 0],
        "cpu": lambda: t.cpu(),
        "a list": lambda: torch.tensor([1, 2], device=t.device),
        "a list as index": lambda: t[[0]],
        "an index on the host": lambda: t[torch.tensor([0])],
        "a copy": lambda: torch.ones(2).to(t.device),
    }


@pytest.mark.parametrize(
    ("where", "how"),
    [("trunk", how) for how in waits(torch.zeros(1))]
    + [(where, how) for where in ("head", "loss", "backward") for how in ("item", "unique", "a list")],
)
def test_waiting_is_noticed(where, how, monkeypatch, reads):
    """The control."""

    def wait(t):
        waits(t)[how]()
        return t

    if where == "trunk":
        own = forward.hidden_states
        monkeypatch.setattr(forward, "hidden_states", lambda *given: wait(own(*given)))
    elif where == "backward":
        own = forward.hidden_states

        def hooked(*given):
            out = own(*given)
            out.register_hook(lambda gradient: wait(gradient) and None)
            return out

        monkeypatch.setattr(forward, "hidden_states", hooked)
    elif where == "head":
        own = forward.head_of
        monkeypatch.setattr(forward, "head_of", lambda model: own(model)._replace(weight=wait(own(model).weight)))
    else:
        own = Objective.loss
        monkeypatch.setattr(Objective, "loss", lambda self, *given: wait(own(self, *given)[None])[0])
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        steps_of(with_lora())


HOT = (
    "data/pack.py", "engine/forward.py", "engine/head.py", "engine/sums.py", "engine/layouts.py", "engine/layers.py", "engine/low_rank.py",
    "engine/operations.py", "engine/tree_attention.py", "engine/patching.py", "engine/recompute.py", "engine/frozen_cache.py",
    "engine/state_layers.py", "engine/segment_batches.py", "engine/counting_layers.py", "engine/backends/cuda.py",
    "engine/backends/flash.py", "engine/backends/paths.py", "engine/backends/segments.py", "methods/_switch.py", "methods/_base.py",
    "methods/_lowrank.py", "methods/_virtual_layer.py", "train/loop.py", *(f"objectives/{name}.py" for name in Objective.names()),
    "objectives/_pairs.py", "objectives/_kl_estimate.py",
)  # fmt: skip
"""What every pack's passes run through."""


def waiting_code(text):
    """Code that would wait for a device, wherever it runs."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, to_device = node.func.attr, any(keyword.arg == "device" for keyword in node.keywords)
            waits = (name in ("tensor", "as_tensor") and to_device) or name in (
                "nonzero",
                "unique",
                "masked_select",
                "bincount",
            )
            if waits and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "np"):
                yield f"{node.lineno}: {name}"
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.List | ast.ListComp):
            yield f"{node.lineno}: a list as an index"


def test_no_code_that_every_pack_runs_through_could_wait():
    root = Path(trimtab.__file__).parent
    found = {path: list(waiting_code((root / path).read_text(encoding="utf-8"))) for path in HOT}
    cache_of_generation = [one for one in found.pop("engine/layouts.py") if not one.endswith("tensor")]
    made_on_the_host = [one for one in found.pop("engine/segment_batches.py") if not one.endswith("nonzero")]
    assert {path: places for path, places in found.items() if places} == {}
    assert cache_of_generation == made_on_the_host == []
    control = "a = torch.tensor([1], device=d)\nb = x[[1, 2]]\nc = x.nonzero()\nd = np.unique(y)\ne = torch.tensor([1])"
    assert list(waiting_code(control)) == ["1: tensor", "2: a list as an index", "3: nonzero"]
