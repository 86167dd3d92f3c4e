"""Two processes that share a base's layers train what one process alone trains: losses, adapters, answers; in a share of the memory.

The rest of the matrix is tests/scale_fsdp.py, for `make scale`.
"""

import pytest
from safetensors.torch import load_file
from sharded import run_group

from trimtab.base import ModelConfig
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.core.processes import processes
from trimtab.distributed import Engine, _full_shares, auto
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


FULL = {
    "sft, resumed": {"steps": 10, "resumed_after": 4},
    "dpo, tied, clipped": {"objective": "dpo", "steps": 4, "family": "llama-tied", "train": {"clip": 0.01}},
    "some of it by kto, in unequal turns, recomputed": {
        "method": {"name": "full", "freeze": ["embed_tokens", "layers.0"]},
        "objective": "kto",
        "steps": 4,
        "pack_tokens": 16,
        "recompute": "full",
    },
    "bfloat16": {"steps": 3, "dtype": "bfloat16"},
}
"""Full fine-tuning, of which the trained copies of layers are divided, too."""
BROKEN = ("base", "sum")
BROKEN_FULL = ("mean", "sync", "norm", "stretch", "save")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    cases = [*CASES.values(), *({"steps": 2, "broken": what} for what in BROKEN)]
    cases += [{"method": "full", **case} for case in FULL.values()]
    cases += [{"method": "full", "steps": 1, "broken": what} for what in BROKEN_FULL]
    return *trained(cases, folder), folder


FIRST_FULL = len(CASES) + len(BROKEN)
FIRST_BROKEN_FULL = FIRST_FULL + len(FULL)


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
    assert group[0][len(CASES) + 1]["digests"] != group[1][len(CASES) + 1]["digests"]


@pytest.mark.parametrize("number", range(FIRST_FULL, FIRST_BROKEN_FULL), ids=FULL)
def test_full_fine_tuning_in_shares_trains_what_one_process_does(number, work):
    alone, group, _ = work
    check_equal(*work, number)
    for ours, theirs in zip(group[0][number]["losses"], alone[number]["losses"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)  # of which updates by AdamW show little


@pytest.mark.parametrize("number", range(FIRST_FULL, FIRST_BROKEN_FULL), ids=FULL)
def test_each_holds_a_share_of_what_full_trains(number, work):
    alone, group, _ = work
    for of_process in (one[number] for one in group):
        one = alone[number]
        assert of_process["held"]["layers"] == one["before"]["layers"] / 2
        vectors = one["trained"]["layers"] - 2 * (one["trained"]["layers"] - of_process["trained"]["layers"])
        assert 0 < vectors < 0.1 * one["trained"]["layers"]  # whole, as all that is in no layer
        assert of_process["trained"]["elsewhere"] == one["trained"]["elsewhere"]
        assert of_process["moments"] == pytest.approx(one["moments"] / 2, abs=16)
        assert of_process["planned"] == [pytest.approx(one["planned"][0] / 2, abs=1), one["planned"][1]]
        assert of_process["planned"][0] == pytest.approx(of_process["moments"], abs=16)
        assert of_process["after release"] == {"layers": 0, "elsewhere": 0}
        assert of_process["by hand"] > 0


def broken_full(what, work):
    alone, group, _ = work
    number = FIRST_BROKEN_FULL + BROKEN_FULL.index(what)
    return alone[number], [of_process[number] for of_process in group]


@pytest.mark.parametrize("what", ["mean", "sync"])
def test_gradients_that_fsdp_does_not_add_up_are_refused(what, work):
    for of_process in broken_full(what, work)[1]:
        assert of_process["error"].startswith("RecipeError: PyTorch 2."), of_process
        assert "does not add up the gradients of" in of_process["error"]


def test_a_norm_of_one_share_is_noticed(work):
    one, several = broken_full("norm", work)
    assert several[0]["losses"][0][1] != pytest.approx(one["losses"][0][1], rel=1e-2)
    assert several[0]["losses"][0][1] != several[1]["losses"][0][1]


def test_updates_that_are_not_sent_are_noticed_by_digests(work):
    _, several = broken_full("stretch", work)
    assert several[0]["digests"] != several[1]["digests"]


def test_a_share_is_not_saved_as_an_adapter(work):
    one, several = broken_full("save", work)
    assert "error" not in one
    for of_process in several:
        assert of_process["error"].startswith("ArtifactError: ")
        assert "is not whole on this process, and is not saved" in of_process["error"]


def test_full_fine_tuning_is_divided_only_if_its_optimizer_can_be():
    check(method=Method.pick("full"))
    with pytest.raises(RecipeError, match=r"^train\.optimizer: muon updates whole matrices.*adamw.*ddp"):
        check(method=Method.pick("full"), train=TrainConfig(optimizer="muon"))
    with pytest.raises(RecipeError, match=r"^distributed\.engine: zero3 cannot train full: .*fsdp"):
        Engine.pick("zero3").check(ModelConfig(name="tiny"), Method.pick("full"), Objective.pick("sft"), TrainConfig())


def test_full_fine_tuning_needs_an_fsdp_that_adds_up(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    _full_shares.check_torch()
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(RecipeError, match=r"whose FSDP has no set_reduce_scatter_unused_params\. Install 2\.13"):
        _full_shares.check_torch()


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


@pytest.mark.parametrize(
    ("free", "quantize", "method", "name"),
    [
        (1e9, "none", "lora", "ddp"),
        (1e3, "none", "lora", "fsdp"),
        (1e3, "nf4", "lora", "ddp"),
        (1e9, "none", "full", "fsdp"),
        (4e9, "none", "full", "ddp"),
    ],
)
def test_auto_divides_a_base_that_does_not_fit_on_every_device(free, quantize, method, name, monkeypatch):
    """One process whose device is full decides for all; quantized bases are not divided. Full fine-tuning takes 18 bytes a weight."""
    monkeypatch.setattr(type(auto.processes), "size", 2)
    monkeypatch.setattr(auto.processes, "tell", lambda own: [own, True])
    monkeypatch.setattr(auto, "free_memory", lambda device: free)
    chosen = Engine.pick("auto").choose(
        ModelConfig(name="smollm2-135m-instruct", dtype="bfloat16", quantize=quantize), Method.pick(method)
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
