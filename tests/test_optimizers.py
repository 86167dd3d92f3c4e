"""Optimizers: each is its library's own, bit for bit; its state is saved by name; the memory that it takes is known before."""

import importlib.util

import bitsandbytes
import pytest
import torch
from families import method_of, perturb, random_rows, tiny
from test_no_wait import META, NoWait
from transformers.optimization import Adafactor

from trimtab.artifacts import State
from trimtab.artifacts.state import read_state, write_state
from trimtab.base import Base
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.data import TokenRow
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.objectives.sft import SFT
from trimtab.run import start
from trimtab.run.recipe import Recipe
from trimtab.train import Optimizer, TrainConfig, UpdateRule, optimizer_bytes, peak_learning_rate, plan_training_memory

RATE, DECAY, FACTOR = 1e-2, 0.1, 4.0
METHOD = LoRA(rank=128, b_rate=FACTOR)
"""Of whose factors some have as many numbers as bitsandbytes wants before it keeps 8 bits of each."""


def adapted(method=METHOD):
    base = Base(tiny("llama"))
    adapter = attach(base.model, method)
    perturb(adapter.parameters(), 0.1)
    return base, adapter


def set_gradients(adapter, step):
    draw = torch.Generator().manual_seed(step)
    for parameter in adapter.parameters().values():
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        parameter.grad = noise if parameter.grad is None else parameter.grad.copy_(noise)


def steps(adapter, optimizer, numbers):
    """The adapter's values after steps by planted gradients; the second is skipped."""
    for number in numbers:
        set_gradients(adapter, number)
        optimizer.skip() if number == 2 else optimizer.step(RATE / number)
    return adapter.state()


LIBRARY = {
    "adamw": lambda groups: [torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY, fused=True)],
    "adamw_8bit": lambda groups: [bitsandbytes.optim.AdamW8bit(groups, weight_decay=DECAY)],
    "adafactor": lambda groups: [
        Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=DECAY)
    ],
    "muon": lambda groups: [torch.optim.Muon(groups, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")],
}
"""As one would write it by hand, for matrices."""


def by_hand(name, rate=RATE):
    _, adapter = adapted()
    named = adapter.parameters()
    factors = [
        {"params": [p for n, p in named.items() if n.endswith(f".{one}")], "by": by}
        for one, by in zip("AB", (1, FACTOR), strict=True)
    ]
    parts = LIBRARY[name](factors)
    for number in (1, 3, 4, 5, 6):
        set_gradients(adapter, number)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = rate / number * group["by"]
            part.step()
    return adapter.state()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", UpdateRule.names())
def test_five_steps_are_the_librarys_to_the_last_bit(name):
    _, adapter = adapted()
    ours = steps(adapter, Optimizer(adapter, DECAY, UpdateRule.member(name)()), range(1, 7))
    assert same(ours, by_hand(name))
    assert not same(ours, by_hand(name, rate=RATE * 1.01))


@pytest.mark.parametrize("name", UpdateRule.names())
def test_a_run_resumes_to_the_last_bit_from_what_was_written(name, tmp_path):
    rule = UpdateRule.member(name)()
    _, adapter = adapted()
    optimizer = Optimizer(adapter, DECAY, rule)
    steps(adapter, optimizer, range(1, 4))
    write_state(tmp_path, State(3, optimizer.state(), {}))
    expected = steps(adapter, optimizer, range(4, 7))
    saved = read_state(tmp_path / "step-000003").tensors
    assert all(name.partition("/")[2] in adapter.parameters() for name in saved)
    for spoilt in (None, *{key.partition("/")[0] for key in saved} - {"RMS"}):  # which Adafactor notes and does not read
        _, again = adapted()
        resumed = Optimizer(again, DECAY, rule)
        tensors = {n: t.flip(0).contiguous() if n.partition("/")[0] == spoilt else t for n, t in saved.items()}
        resumed.load(tensors, 3, 1)
        assert same(steps(again, resumed, range(4, 7)), expected) is (spoilt is None)


@pytest.mark.parametrize("name", UpdateRule.names())
def test_a_state_from_before_the_first_step_taken_is_that_of_a_new_optimizer(name):
    rule = UpdateRule.member(name)()
    _, adapter = adapted()
    optimizer = Optimizer(adapter, DECAY, rule)
    optimizer.skip()
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    expected = steps(adapter, optimizer, (3, 4))
    _, again = adapted()
    resumed = Optimizer(again, DECAY, rule)
    steps(again, resumed, (1,))  # it has a past, which the state has not
    resumed.load(state, 1, 1)
    assert same(steps(again, resumed, (3, 4)), expected)


@pytest.mark.parametrize("name", UpdateRule.names())
def test_a_state_of_something_else_is_refused_and_changes_nothing(name):
    rule, other = UpdateRule.member(name)(), UpdateRule.member("muon" if name != "muon" else "adamw")()
    made = {}
    for one in (rule, other):
        _, adapter = adapted()
        optimizer = Optimizer(adapter, DECAY, one)
        steps(adapter, optimizer, (1,))
        made[one.name] = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    good = made[name]
    first = next(key for key in good if not key.startswith("value/"))
    wrong = [
        made[other.name],
        {key: tensor for key, tensor in good.items() if key != first},
        good | {first: good[first][..., :1].repeat(*[1] * good[first].ndim)[..., None]},
        good | {first: good[first].to(torch.float16)},
        good | {"value/else": torch.zeros(1)},
        good | {next(iter(good)): next(iter(good.values())) * float("nan")},
    ]
    _, adapter = adapted()
    optimizer = Optimizer(adapter, DECAY, rule)
    for state in wrong:
        with pytest.raises(ArtifactError, match=r"is not what this run trains|holds values that are not finite"):
            optimizer.load(state, 1)
    after = steps(adapter, optimizer, (1, 3))
    _, untouched = adapted()
    assert same(after, steps(untouched, Optimizer(untouched, DECAY, rule), (1, 3)))
    optimizer.load(good, 1)


@pytest.mark.parametrize("name", UpdateRule.names())
@pytest.mark.parametrize("method", ["lora", "dora", "full", "tokens"])
def test_what_it_holds_is_known_before(name, method):
    rule = UpdateRule.member(name)()
    base, adapter = adapted(METHOD if method == "lora" else method_of(method))
    if (name, method) == ("muon", "tokens"):
        with pytest.raises(RecipeError, match="muon is for matrices of the model's blocks, and this method trains none"):
            Optimizer(adapter, 0.0, rule)
        with pytest.raises(RecipeError, match="muon is for matrices"):  # before a run begins
            optimizer_bytes(base, TrainConfig(optimizer=rule))
        return
    known = optimizer_bytes(base, TrainConfig(optimizer=rule))
    optimizer = Optimizer(adapter, 0.0, rule)
    steps(adapter, optimizer, (1,))
    held = sum(tensor.nbytes for key, tensor in optimizer.state().items() if not key.startswith("value/"))
    assert known == held


def test_less_is_planned_for_where_less_is_held():
    base, _ = adapted(method_of("full"))
    rows = [TokenRow(ids, [5, 6], f"row:{n}", len(ids)) for n, ids in enumerate(random_rows(9, 8, 7))]
    adamw, adafactor = (
        plan_training_memory(base, TrainConfig(epochs=1, optimizer=UpdateRule.member(name)()), rows).peak_bytes
        for name in ("adamw", "adafactor")
    )
    trained = sum(p.nbytes for p in base.model.parameters() if p.requires_grad)
    assert 1.8 * trained < adamw - adafactor < 2 * trained


@pytest.mark.parametrize("name", [name for name in UpdateRule.names() if name != "adamw_8bit"])
def test_a_step_does_not_wait_for_the_device(name):
    """bitsandbytes does, and the run says so."""
    _, adapter = adapted()
    adapter.model.to(META)
    rule = UpdateRule.member(name)()
    optimizer = Optimizer(adapter, DECAY, rule)
    for part in optimizer._parts:
        part.defaults["fused"] = None
        for group in part.param_groups:  # a fused kernel is one operation, which `meta` has not
            group |= {"fused": None, "foreach": True} if "fused" in group else {}
    with NoWait():
        for _ in range(2):
            optimizer.step(RATE)
    notice = UpdateRule.member("adamw_8bit")().notice(torch.device("cuda"))
    assert notice == "bitsandbytes waits for the device after the update of each tensor"
    assert UpdateRule.member("adamw_8bit")().notice(torch.device("cpu")) is None


def test_torchs_own_adafactor_would_wait():
    """The control; it reads the norm of each parameter."""
    parameter = torch.nn.Parameter(torch.ones(3, 4, device=META))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.optim.Adafactor([parameter]).step()


def test_what_is_not_there_is_refused_by_name_before_anything_is_loaded(monkeypatch):
    cpu, rules = torch.device("cpu"), {name: UpdateRule.member(name) for name in UpdateRule.names()}
    for rule in rules.values():
        rule().check_available(cpu)
    rules["adamw_8bit"](paged=True).check_available(torch.device("cuda"))
    with pytest.raises(RecipeError, match=r"train\.optimizer\.paged: only CUDA has paged memory, and this is trained on cpu\."):
        rules["adamw_8bit"](paged=True).check_available(cpu)
    with pytest.raises(
        RecipeError, match=r"train\.optimizer: bitsandbytes has no 8-bit AdamW on mps\. Use adamw or adafactor\."
    ):
        rules["adamw_8bit"]().check_available(torch.device("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delattr(torch.optim, "Muon")
    monkeypatch.setattr(start, "Base", None)  # whoever loads it fails otherwise
    for name, words in (
        ("adamw_8bit", r"adamw_8bit needs bitsandbytes: pip install 'trimtab\[quantized\]', or use adamw\."),
        ("muon", r"muon needs torch 2\.9 or later, and this is 2\..*\. Upgrade, or use adamw\."),
    ):
        recipe = Recipe.parse({"data": {"train": "x.jsonl"}, "train": {"optimizer": name}})
        monkeypatch.setattr(start, "locate_model", lambda _: None)
        with pytest.raises(RecipeError, match=rf"train\.optimizer: {words}"):
            start.open_recipe(recipe)


def test_keys_of_an_optimizer_are_checked_and_named():
    for given, words in (
        ("adam", r"train\.optimizer\.name: no such choice: 'adam'"),
        ({"name": "adamw", "beta": 1}, r"train\.optimizer\.beta: no such key"),
        ({"name": "adamw", "betas": [0.9, 1.0]}, r"train\.optimizer\.betas\.1: expected a number below 1, got 1\.0"),
        ({"name": "adamw", "betas": [0.9]}, r"train\.optimizer\.betas: expected two numbers, such as"),
        ({"name": "adafactor", "eps": 1e-8}, r"train\.optimizer\.eps: no such key"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.parse({"data": {"train": "x.jsonl"}, "train": {"optimizer": given}})
    recipe = Recipe.parse({"data": {"train": "x.jsonl"}}, ["train.optimizer=adamw", "train.optimizer.betas=[0.8, 0.95]"])
    assert recipe.train.optimizer.betas == (0.8, 0.95)
    assert Recipe.parse(recipe.plain()) == recipe


@pytest.mark.parametrize("name", UpdateRule.names())
def test_auto_means_the_methods_rate_times_the_optimizers_share(name, monkeypatch):
    base, _ = adapted()
    rule = UpdateRule.member(name)()
    plain, basis = peak_learning_rate(TrainConfig(), base, METHOD, SFT(), 4)
    shared = peak_learning_rate(TrainConfig(optimizer=rule), base, METHOD, SFT(), 4)
    assert shared == (plain, basis) if rule.lr_multiplier == 1 else shared[0] == pytest.approx(plain * rule.lr_multiplier)
    monkeypatch.setattr(UpdateRule.member(name), "lr_multiplier", 0.3)
    assert peak_learning_rate(TrainConfig(optimizer=rule), base, METHOD, SFT(), 4) == (
        pytest.approx(0.3 * plain), f"{basis}; times 0.3 for {name}"
    )  # fmt: skip
