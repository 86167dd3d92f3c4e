"""Adapters in TRL's trainers, `trimtab.attach` in the place of `get_peft_model`: PEFT's losses, small checkpoints, one model."""

import gc
import json

import pytest
import torch
import transformers
from families import random_rows
from safetensors.torch import load_file
from worlds import WHOLE

import trimtab as package
from trimtab.core.errors import UnsupportedModel
from trimtab.methods import Method, Sample

trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
SAID = [(f"Is {n} a number?", "yes", "no, it is not") for n in range(16)]
ANSWERS = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": good}]} for p, good, _ in SAID]
PAIRS = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in SAID]
JUDGED = [{"prompt": p, "completion": bad if n % 2 else good, "label": n % 2 == 0} for n, (p, good, bad) in enumerate(SAID)]
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, ANSWERS, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {"precompute_ref_log_probs": True}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, JUDGED, {"precompute_ref_log_probs": True}),
}
METHODS = {
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
    "bottleneck": {"reduction": 4},
    "prefix": {"tokens": 6, "width": 8},
    "ptuning_v2": {"tokens": 6},
}
SAMPLE = Sample(rows=random_rows(40, seed=5))


def read(world):
    return transformers.AutoModelForCausalLM.from_pretrained(world / "tiny")


def attached(model, name, seed=0):
    return package.attach(model, Method.member(name)(**METHODS[name]), seed=seed, sample=SAMPLE)


def trained(kind, model, world, folder, *, resume=None, **more):
    """A trainer that has trained."""
    trainer, config, rows, own = TRAINERS[kind]
    settings = {"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1, "seed": 0, **own, **more}
    trains = trainer(
        model=model, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(world / "tiny"),
        args=config(
            output_dir=str(folder), use_cpu=True, bf16=False, disable_tqdm=True, report_to=[], per_device_train_batch_size=4, **settings
        ),
    )  # fmt: skip
    trains.train(resume_from_checkpoint=resume and str(resume))
    return trains


def losses(trains):
    return [line["loss"] for line in trains.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sft", {}),
        ("sft", {"packing": True, "max_length": 64}),
        ("sft", {"gradient_checkpointing": False}),
        ("dpo", {}),
        ("kto", {}),
    ],
    ids=str,
)
def test_loras_losses_are_pefts_to_the_bit(kind, more, world, tmp_path):
    model = read(world)
    attached(model, "lora")
    model.save_pretrained(tmp_path / "start")
    ours = losses(trained(kind, model, world, tmp_path / "ours", **more))
    theirs = peft.PeftModel.from_pretrained(read(world), tmp_path / "start", is_trainable=True)
    assert ours == losses(trained(kind, theirs, world, tmp_path / "theirs", **more))
    assert ours[-1] < ours[0] - 0.01
    if kind == "sft" and not more:
        other = read(world)
        attached(other, "lora", seed=1)  # the negative control: another start
        assert ours != losses(trained(kind, other, world, tmp_path / "other"))


def test_a_prefixs_losses_are_pefts_to_the_bit(world, tmp_path):
    """PEFT's prefix tuning without projection; with gradient checkpointing, TRL's default, PEFT's fails, and ours does not."""
    theirs = peft.get_peft_model(read(world), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    theirs.save_pretrained(tmp_path / "start")
    base = package.Base(read(world), transformers.AutoTokenizer.from_pretrained(world / "tiny"))
    adapter = attached(base.model, "ptuning_v2")
    (values,) = load_file(tmp_path / "start" / "adapter_model.safetensors").values()
    adapter.load_state({"model.keys_and_values": values})
    plain = {"gradient_checkpointing": False}
    ours = losses(trained("sft", base.model, world, tmp_path / "ours", **plain))
    assert ours == losses(trained("sft", theirs, world, tmp_path / "theirs", **plain))
    adapter.load_state({"model.keys_and_values": values})
    recomputed = losses(trained("sft", base.model, world, tmp_path / "ours", gradient_checkpointing=True))
    assert recomputed == pytest.approx(ours, abs=1e-6)
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        trained("sft", theirs, world, tmp_path / "theirs", gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in TRAINERS
        for name in ("lora", "bottleneck", "prefix")
        if WHOLE or kind == "sft" or name == "lora"
    ],
)
def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit_without_a_second_model(kind, name, world, tmp_path):
    model = read(world)
    adapter = attached(model, name)
    other = read(world)
    again = attached(other, name)
    gc.collect()
    before = sum(isinstance(thing, transformers.LlamaForCausalLM) for thing in gc.get_objects())
    trains = trained(kind, model, world, tmp_path, save_strategy="steps", save_steps=2)
    assert sum(isinstance(thing, transformers.LlamaForCausalLM) for thing in gc.get_objects()) == before
    assert getattr(trains, "ref_model", None) is None
    assert not (tmp_path / "checkpoint-2" / "config.json").exists()
    weights = sum(p.numel() for p in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())
    assert weights <= 2 * sum(p.numel() for p in adapter.parameters().values())  # a prefix has its start beside it
    saved = package.Base(read(world), transformers.AutoTokenizer.from_pretrained(world / "tiny"))
    package.load_adapter(saved, tmp_path / "checkpoint-4")
    assert torch.equal(logits(saved.model), logits(model))
    started = again.state()
    trained(kind, other, world, tmp_path, resume=tmp_path / "checkpoint-2")
    assert all(torch.equal(tensor, again.state()[key]) for key, tensor in adapter.state().items())
    assert not all(torch.equal(tensor, started[key]) for key, tensor in adapter.state().items())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.tensor(random_rows(11)), use_cache=False).logits


def test_without_precomputing_trl_loads_a_second_model(world, tmp_path):
    """The negative control of the count above; the losses are the same."""
    model = read(world)
    attached(model, "lora")
    gc.collect()
    before = sum(isinstance(thing, transformers.LlamaForCausalLM) for thing in gc.get_objects())
    trains = trained("dpo", model, world, tmp_path, precompute_ref_log_probs=False)
    assert sum(isinstance(thing, transformers.LlamaForCausalLM) for thing in gc.get_objects()) == before + 1
    other = read(world)
    attached(other, "lora")
    assert losses(trains) == pytest.approx(losses(trained("dpo", other, world, tmp_path)), abs=1e-6)


@pytest.mark.parametrize("flat", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}], ids=list)
def test_virtual_tokens_refuse_flattened_rows_and_say_what_to_set(flat, world, tmp_path):
    model = read(world)
    attached(model, "prefix")
    with pytest.raises(UnsupportedModel, match="Set packing=False and padding_free=False"):
        trained("sft", model, world, tmp_path, **flat)
    model = read(world)
    attached(model, "bottleneck")  # the negative control
    first, *_, last = losses(trained("sft", model, world, tmp_path, **flat))
    assert last < first - 0.01


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_trl_says_what_precomputing_excludes(kind, world, tmp_path):
    """docs/course.md says so too."""
    rows, model = datasets.Dataset.from_list(TRAINERS[kind][2][:4]), read(world)
    attached(model, "lora")
    trains = trained(kind, model, world, tmp_path)
    with pytest.raises(ValueError, match="after training has started"):
        trains.evaluate(rows)
    with pytest.raises(ValueError, match="cannot use `sync_ref_model=True` together"):
        trained(kind, model, world, tmp_path, sync_ref_model=True)


def test_the_adapter_alone_is_saved_where_trl_saves_a_model(world, tmp_path):
    model = read(world)
    attached(model, "lora")
    trained("sft", model, world, tmp_path / "run").save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(read(world), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
