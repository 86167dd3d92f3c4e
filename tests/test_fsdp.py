"""Two processes that share a base's layers train what one process alone trains: losses, adapters, answers; in a share of the memory.

The rest of the matrix is tests/scale_fsdp.py, for `make scale`.
"""

import pytest
from safetensors.torch import load_file
from sharded import run_group

from trimtab.base import ModelConfig
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.core.processes import processes
from trimtab.distributed import Engine, auto
from trimtab.distributed._shares import REFUSED
from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.train import TrainConfig

CASES = {
    "sft": {"answers": True, "steps": 10},
    "dpo": {"objective": "dpo", "steps": 4},
    "kto, tied, in unequal turns": {"objective": "kto", "steps": 4, "family": "llama-tied", "pack_tokens": 16},
    "dropout, recomputed": {"method": {"name": "lora", "rank": 4, "dropout": 0.1}, "steps": 4, "recompute": "full"},
    "DoRA, recomputed MLPs, bfloat16": {"method": "dora", "moved": True, "steps": 4, "recompute": "mlp", "dtype": "bfloat16"},
    "prefix on a model without layers by hand": {"method": "ptuning_v2", "family": "gpt2", "steps": 4},
}


def trained(cases, folder, size=2, engine="fsdp"):
    """What one process alone, and each of a group, has of the cases."""
    alone = [{**case, "tensors": f"{folder}/alone-{number}"} for number, case in enumerate(cases)]
    group = [{**case, "tensors": f"{folder}/group-{number}", "engine": engine} for number, case in enumerate(cases)]
    (one,), several = run_group(alone, 1), run_group(group, size)
    assert not [error for error in (one, *several) if isinstance(error, str)], (one, several)
    return one, several


def check_equal(alone, group, folder, number, losses=1e-6, adapter=1e-4):
    """That the processes of the group agree with each other to the bit, and with the process alone but for rounding."""
    one, several = alone[number], [of_process[number] for of_process in group]
    assert [
        other for other in several if other["digests"] != several[0]["digests"] or other["losses"] != several[0]["losses"]
    ] == []
    for ours, theirs in zip(several[0]["losses"], one["losses"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=losses)
    own, theirs = (load_file(f"{folder}/{name}-{number}") for name in ("group", "alone"))
    assert own.keys() == theirs.keys()
    off = {name: float((own[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)) for name, tensor in theirs.items()}
    assert max(off.values()) < adapter, off
    assert several[0]["reference"] == pytest.approx(one["reference"], rel=1e-6)
    assert several[0]["scores"] == pytest.approx(one["scores"], rel=1e-4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return *trained([*CASES.values(), {"steps": 2, "broken": "base"}, {"steps": 2, "broken": "sum"}], folder), folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_two_processes_train_what_one_does(number, work):
    check_equal(*work, number)


def test_they_give_the_same_answers(work):
    alone, group, _ = work
    assert alone[0]["answers"] == group[0][0]["answers"] == group[1][0]["answers"]
    assert any(alone[0]["answers"])


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_each_holds_a_share_of_the_layers(number, work):
    alone, group, _ = work
    for of_process in group:
        before, held = of_process[number]["before"], of_process[number]["held"]
        assert held["layers"] == before["layers"] / 2
        assert held["elsewhere"] == before["elsewhere"]
        assert of_process[number]["kept"] == sum(held.values())  # nothing keeps the whole ones alive
        assert of_process[number]["parameters"][0] == of_process[number]["parameters"][1]
        assert of_process[number]["plain"]
        assert of_process[number]["after release"] == {"layers": 0, "elsewhere": 0}
    assert alone[number]["held"] == alone[number]["before"]


def test_layers_are_computed_by_hand_as_in_one_process(work):
    alone, group, _ = work
    for number, case in enumerate(CASES.values()):
        assert group[0][number]["layers"] == alone[number]["layers"]
        assert (alone[number]["by hand"] > 0) == (group[0][number]["by hand"] > 0) == (case.get("family") != "gpt2")


def test_a_share_of_the_base_that_changes_is_noticed(work):
    alone, group, _ = work
    for of_process in (alone, *group):
        assert of_process[len(CASES)]["error"].startswith("BaseChanged: ")


def test_gradients_that_nobody_sums_are_noticed(work):
    """The control of the comparison: replicas drift apart."""
    alone, group, folder = work
    with pytest.raises(AssertionError):
        check_equal(alone, group, folder, len(CASES) + 1)
    assert group[0][-1]["digests"] != group[1][-1]["digests"]


def check(**changes):
    given = {
        "model": ModelConfig(name="tiny"),
        "method": Method.pick("lora"),
        "objective": Objective.pick("sft"),
        "train": TrainConfig(),
    }
    Engine.pick("fsdp").check(**{**given, **changes})


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_it_cannot_train_are_refused_with_one_that_can(name):
    with pytest.raises(RecipeError, match=rf"^distributed\.engine: fsdp cannot train {name}: .*(zero2|prefix).*ddp"):
        check(method=Method.pick(name))


@pytest.mark.parametrize(("fits", "quantize", "name"), [(True, "none", "ddp"), (False, "none", "fsdp"), (False, "nf4", "ddp")])
def test_auto_divides_a_base_that_does_not_fit_on_every_device(fits, quantize, name, monkeypatch):
    """One process whose device is full decides for all; quantized bases are not divided."""
    monkeypatch.setattr(type(auto.processes), "size", 2)
    monkeypatch.setattr(auto.processes, "tell", lambda own: [own, True])
    monkeypatch.setattr(auto, "free_memory", lambda device: 1e9 if fits else 1e3)
    chosen = Engine.pick("auto").choose(
        ModelConfig(name="smollm2-135m-instruct", dtype="bfloat16", quantize=quantize), Method.pick("lora")
    )
    assert chosen.name == name


def test_auto_alone_has_nothing_to_divide():
    assert Engine.pick("auto").choose(ModelConfig(name="there is no such model"), Method.pick("lora")).name == "ddp"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_refused(kind):
    with pytest.raises(RecipeError, match=rf"^model\.quantize: {kind}, .* Use distributed\.engine=ddp"):
        check(model=ModelConfig(name="tiny", quantize=kind))


def test_a_torch_that_would_divide_the_adapter_is_refused(monkeypatch):
    monkeypatch.setattr(type(processes), "size", 2)
    check()
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, *, mesh=None: module)  # as torch 2.6 has it
    with pytest.raises(
        RecipeError, match=r"^distributed\.engine: fsdp needs torch 2\.7 or newer, .* Use distributed\.engine=ddp"
    ):
        check()


def test_another_model_as_reference_is_refused():
    check(objective=Objective.pick({"name": "dpo", "reference": "base"}))
    with pytest.raises(RecipeError, match=r"^objective\.reference: runs/other would be loaded whole"):
        check(objective=Objective.pick({"name": "dpo", "reference": "runs/other"}))


def test_what_is_not_whole_is_not_saved(tmp_path):
    import torch
    from torch import nn

    from trimtab.artifacts import write_tensors

    class Share(torch.Tensor):
        """As torch's DTensor: its shape is that of the whole, its numbers are a part of it."""

    write_tensors(tmp_path / "whole", {"A": nn.Parameter(torch.ones(2, 3))})
    for share in (torch.zeros(0, 3), torch.ones(2, 3).as_subclass(Share)):
        with pytest.raises(ArtifactError, match=r"^empty: A .* is not whole on this process"):
            write_tensors(tmp_path / "empty", {"A": share})
        assert not (tmp_path / "empty").exists()
