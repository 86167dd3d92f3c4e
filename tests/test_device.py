"""What an accelerator asks for, tried on the CPU: no float64 there, no cuDNN in attention, and every generator left alone."""

import random
from contextlib import nullcontext

import pytest
import torch
from accelerators import cuda_backend
from families import perturb, random_rows, tiny
from torch.overrides import TorchFunctionMode

import trimtab
from trimtab.base import Base, ModelConfig
from trimtab.base.config import resolve_device
from trimtab.core import attention, randomness
from trimtab.core.errors import RecipeError
from trimtab.core.transfer import to_device
from trimtab.data import pack_tree
from trimtab.data.example import TokenRow
from trimtab.engine import Generation, check_packing, generate
from trimtab.evaluate import reference, score_loss
from trimtab.methods import Sample, attach, combine
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.run.start import prepare_objective
from trimtab.train import TrainConfig
from trimtab.train.ahead import SentPacks

MAKERS = {torch.tensor, torch.zeros, torch.empty, torch.ones, torch.full, torch.arange, torch.from_numpy, torch.frombuffer}


class WithoutFloat64(TorchFunctionMode):
    """As if the model were on a device that has no float64 (MPS): only what .cpu() gave, or was made for no device, may be it."""

    def __init__(self):
        self.host = {}
        """By identity; held, so that no other takes it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in self._flat((args, tuple(kwargs.values()))) if isinstance(one, torch.Tensor)]
        out = function(*args, **kwargs)
        moved = function is torch.Tensor.cpu or (function is torch.Tensor.to and args[1:2] == ("cpu",))
        out = out.clone() if moved and out is args[0] else out  # as it would be
        made = function in MAKERS and kwargs.get("device") is None
        on_host = made or moved or (bool(given) and all(id(one) in self.host for one in given))
        for one in self._flat((out,)):
            if not isinstance(one, torch.Tensor):
                continue
            if on_host:
                self.host[id(one)] = one
            elif one.dtype == torch.float64:
                raise TypeError(f"{function.__name__} makes float64 on a device that has none")
        return out

    @classmethod
    def _flat(cls, values):
        for value in values:
            if isinstance(value, tuple | list):
                yield from cls._flat(value)
            else:
                yield value


def rows_of(kind):
    draw, sides = random.Random(0), {"answers": [None], "pairs": ["chosen", "rejected"], "judged": ["good"]}[kind]
    made = []
    for number in range(6):
        prompt = random_rows(5, seed=number)[0]
        for side in sides:
            side = "bad" if kind == "judged" and number % 2 else side
            ids = [*prompt, *random_rows(4, seed=draw.randrange(10**6))[0]]
            made.append(TokenRow(ids, [5, 6, 7, 8], f"row:{number}", 9, side))
    return made


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["float32", "bfloat16, by an accelerator's back end"])
def dtype(request):
    with cuda_backend() if "," in request.param else nullcontext():
        yield getattr(torch, request.param.partition(",")[0])


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "orpo"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_and_evaluating_need_no_float64_on_the_device(name, family, dtype, home):
    base, objective = Base(tiny(family, dtype)), Objective.pick(name)
    with WithoutFloat64():
        check_packing(base.model)
        adapter = attach(base.model, LoRA(rank=2, dropout=0.1 if name == "sft" else 0.0))
        rows = rows_of(objective.data_kind)
        steps = list(trimtab.fit(base, adapter, rows, objective, epochs=1, rows_per_step=3, lr=1e-3))
        objective, (train, _), _ = prepare_objective(objective, base, adapter, (rows, []), 0, None)
        assert score_loss(base, train, 30, objective).loss > 0
        assert reference.divergence(base, adapter, "base", rows, 30) > 0
        generate(base.model, [rows[0].ids], [], max_new_tokens=2, settings=Generation(temperature=1.0))
    assert len(steps) == 2


def test_combining_needs_none_either():
    base = Base(tiny("llama"))
    for name in ("a", "b"):
        perturb(attach(base.model, LoRA(rank=2), name=name).parameters())
    with WithoutFloat64():
        combine(base.model, {"a": 0.5, "b": 0.5}, "c", 2)


def test_float64_on_the_device_is_noticed():
    """The control: what was there before."""
    logits = torch.randn(3)
    with WithoutFloat64():
        assert logits.cpu().double().dtype == torch.float64
        for made in (
            logits.double,
            lambda: logits.to(torch.float64),
            lambda: torch.zeros(3, dtype=torch.float64, device="cpu"),
        ):
            with pytest.raises(TypeError, match="a device that has none"):
                made()


# Devices that lack something


def test_what_is_made_on_the_host_is_sent_without_pinning_where_there_is_none(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or pytest.fail("pinned"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: pytest.fail("a stream of CUDA's"))
    sent = to_device([1, 2, 3], torch.device("meta"))
    assert (sent.device.type, sent.dtype) == ("meta", torch.int64)
    packs = SentPacks([[pack_tree(rows_of("answers"))]], torch.device("meta"))
    packs.send_ahead(1)
    (turn,) = packs.take(1).own
    assert turn.pack.ids.is_meta
    with pytest.raises(pytest.fail.Exception, match="pinned"):  # the control
        to_device([1], torch.device("cuda"))
    assert pinned == [1]


def test_a_device_that_is_missing_or_lacks_the_dtype_is_refused_with_the_reason(monkeypatch):
    for name in ("mps", "xpu", "xpu:1", "cuda:77"):
        with pytest.raises(RecipeError, match=f"model.device: {name} cannot be used here: [A-Z]..."):
            resolve_device(ModelConfig(name="x", device=name))
    with pytest.raises(RecipeError, match="device"):
        ModelConfig(name="x", device="xpu-1")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu", 7))
    assert resolve_device(ModelConfig(name="x")) == torch.device("cpu", 7)  # the control
    real = torch.ones

    def without_float64(*size, dtype=None, **settings):
        if dtype == torch.float64:
            raise RuntimeError("Required aspect fp64 is not supported on the device")
        return real(*size, dtype=dtype, **settings)

    monkeypatch.setattr(torch, "ones", without_float64)
    assert resolve_device(ModelConfig(name="x", dtype="float64")) == torch.device("cpu")
    with pytest.raises(RecipeError, match="cpu cannot be used here: Required aspect fp64"):
        resolve_device(ModelConfig(name="x", dtype="float64", device="cpu"))


# Generators


@pytest.fixture
def generators(monkeypatch):
    """Those of all devices: that of the CPU, and whether somebody has seeded the others."""
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
            if hasattr(device, name):
                monkeypatch.setattr(device, name, lambda *_, device=device: pytest.fail(f"{device.__name__} was seeded"))
    random.seed(3)
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()

    def unchanged():
        return torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]

    return unchanged


def test_the_processs_generators_stay_as_they_were(generators, home):
    base = Base(tiny_unseeded())
    for method in ("lora", "prompt", "bottleneck", "prefix"):
        adapter = attach(base.model, trimtab.method(method), name=method, sample=Sample(rows=random_rows(30)))
        assert generators(), method
        if method != "lora":
            adapter.detach()
    trimtab.activate(base.model, "lora")
    adapter = trimtab.attach(base.model, LoRA(rank=2, dropout=0.5), name="drops")
    for step in trimtab.fit(base, adapter, rows_of("answers"), epochs=2, rows_per_step=3, lr=1e-3):
        assert generators(), step.number
    generate(base.model, [[5, 6, 7]], [], max_new_tokens=3, settings=Generation(temperature=1.0))
    assert generators()


def test_a_model_that_is_made_up_leaves_them_alone(generators):
    from trimtab.testing import tiny_model

    first, second = (tiny_model().state_dict() for _ in range(2))
    assert generators()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_seeding_the_process_is_noticed(generators):
    with pytest.raises(pytest.fail.Exception, match="was seeded"):
        torch.manual_seed(0)
    torch.randn(1)
    assert not generators()


def tiny_unseeded():
    """`families.tiny` seeds the process."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        from families import FAMILIES

        return FAMILIES["llama"]().eval().requires_grad_(False)


def test_draws_are_those_of_a_seeded_process():
    """So earlier runs come out again, to the last bit."""
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(1)
    with randomness.seeded(7):
        drawn = torch.randn(3)
    after = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, expected)
    assert torch.equal(after, torch.randn(3))


@pytest.mark.parametrize(("name", "number"), [("cuda", 1), ("cuda:0", 0)])
def test_the_devices_own_generator_is_seeded_and_put_back(name, number, monkeypatch):
    own = [torch.Generator(), torch.Generator()]
    for generator in own:
        generator.manual_seed(11)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(own))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = [generator.get_state() for generator in own]
    with randomness.seeded(7, torch.device(name)):
        assert own[number].initial_seed() == 7
        assert torch.equal(own[1 - number].get_state(), before[1 - number])
        torch.randn(3, generator=own[number])
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(own, before, strict=True))


# cuDNN


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("allowed", [True, False])
def test_attention_does_without_cudnn_and_the_process_keeps_its_setting(allowed, recompute, monkeypatch):
    """Where rows are packed, computed again in the backward pass, decoded, and alone, to compare with."""
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def watching(*args, **kwargs):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        base = Base(tiny("gpt2"))
        adapter = attach(base.model, LoRA(rank=2))
        check_packing(base.model)
        config = TrainConfig(recompute=recompute)
        list(trimtab.fit(base, adapter, rows_of("answers"), epochs=1, lr=1e-3, recompute=config.recompute))
        generate(base.model, [[5, 6, 7]], [], max_new_tokens=3)
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert len(asked) > 8
    assert not any(asked)


def test_the_setting_comes_back_after_an_error():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ValueError, match="in it"), attention.without_cudnn():
        raise ValueError("in it")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
