"""A base model without room in a device's memory: said before it is loaded, and loaded on the CPU where it is only used.

The device is torch's `meta`, where tensors have no values, and its memory is pretended.
"""

from functools import partial

import pytest
import torch

from trimtab.base import Base, ModelConfig, config, room, room_to_use, skeleton, weight_bytes
from trimtab.certify.certificate import refuse_uncertifiable
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.deploy import COPIES, load_model

BFLOAT16 = torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """Pretends a device with so much free memory, and so much on the host."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(config, "_problem", lambda device, dtype: None)

    def machine(on_device, on_host=1e12):
        monkeypatch.setattr(room, "free_memory", lambda device: on_host if device.type == "cpu" else on_device)

    return machine


@pytest.fixture
def size(here):
    """Bytes of the weights of `tiny` in bfloat16."""
    return weight_bytes(skeleton("tiny"), BFLOAT16)


def limit(size):
    return size / room.SHARE + 1


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 0.0), ("nf4", 0.03), ("int8", 0.03)])
def test_weights_take_what_their_shapes_say(quantize, tolerance, here):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    base = Base.load(ModelConfig(name="tiny", dtype="bfloat16", device="cpu", quantize=quantize))
    scales = [getattr(getattr(p, "quant_state", None), "absmax", torch.empty(0)) for p in base.model.parameters()]
    held = sum(t.nbytes for t in [*base.model.parameters(), *scales])
    assert weight_bytes(skeleton("tiny"), BFLOAT16, quantize) == pytest.approx(held, rel=tolerance)


def test_without_room_the_cpu_is_taken_and_both_figures_are_said(machine, size):
    machine(limit(size))
    assert load_model("tiny").base.device.type == "meta"
    machine(limit(size) - 2)
    loaded = load_model("tiny")
    assert (loaded.base.device.type, next(loaded.base.model.parameters()).dtype) == ("cpu", BFLOAT16)
    figures = f"its weights take {size / 1e9:.3g} GB in bfloat16, and meta has {(limit(size) - 2) / 1e9:.3g} GB free"
    assert loaded.notes == (f"{figures}: it is loaded on the CPU, which is slow",) == (room_to_use(ModelConfig(name="tiny")),)


def test_what_is_trained_is_refused_and_what_would_do_is_said(machine, size, here, trimtab):
    machine(limit(size) - 2)
    for how in ({}, {"device": "cuda:0", "dtype": "bfloat16"}):
        with pytest.raises(RecipeError, match=r"GB free\. Use .* nf4}\); or divide .*engine: fsdp.* \(device: cpu\)\.$"):
            Base.load(ModelConfig(name="tiny", **how))
    assert trimtab("train", "r.yaml", "output=other-run").code == 2
    assert not (here / "other-run").exists()
    machine(limit(size))
    assert Base.load(ModelConfig(name="tiny")).device.type == "meta"


def test_a_machine_that_is_too_small_is_said_before_anything_is_read(machine, size, monkeypatch):
    read = []
    monkeypatch.setattr("trimtab.base.model.read_stored", lambda *args, **more: read.append(args))
    machine(limit(size) - 2, size - 1)
    with pytest.raises(RecipeError, match=r"meta has .* free, the CPU .* GB\. Use .* more memory.* nf4}\)\.$"):
        load_model("tiny")
    with pytest.raises(RecipeError, match=r"^certify: .*certify: false"):
        refuse_uncertifiable(ModelConfig(name="tiny"))
    with pytest.raises(RecipeError, match=r"and cpu has .* GB free"):
        Base.load(ModelConfig(name="tiny", device="cpu", dtype="bfloat16"))
    assert not read
    machine(limit(size) - 2, size)
    refuse_uncertifiable(ModelConfig(name="tiny"))


def test_processes_of_a_machine_share_what_they_map(machine, size, monkeypatch):
    monkeypatch.setattr(processes, "local_size", 4)
    machine(0, size / 4)  # each process's part of the host
    assert Base.load(ModelConfig(name="tiny", device="cpu", dtype="bfloat16")).device.type == "cpu"


def test_a_merge_has_room_for_its_copies(machine, size, trimtab):
    whole = limit(2 * size * (1 + COPIES))  # it was trained in float32
    machine(whole)
    room_of = partial(room.find_room, ModelConfig(name="tiny"), "tiny", torch.float32, torch.device("meta"), moves=True)
    assert room_of(copies=COPIES) == (torch.device("meta"), None)
    machine(whole - 2)
    assert room_of() == (torch.device("meta"), None)
    done = trimtab("merge", "run", "merged", "--force")
    assert done.code == 0
    assert f"its weights and {COPIES} copies in float32 take" in done.err


def test_commands_say_it(machine, here, trimtab):
    machine(1)
    for words in (("eval", "run", "--json"), ("answer", "run", "--data", "rows.jsonl", "--output", "answers.jsonl")):
        done = trimtab(*words)
        assert (done.code, "it is loaded on the CPU, which is slow" in done.err) == (0, True), done
