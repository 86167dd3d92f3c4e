"""Adapters on a model that others hold, train and save: Hugging Face's Trainer, TRL, `save_pretrained`; and a Base that comes after them."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from families import NEEDED, perturb, random_rows, tiny
from safetensors.torch import load_file

import trimtab as package
from trimtab.artifacts import read_adapter
from trimtab.base import Base
from trimtab.core import files
from trimtab.core.errors import ArtifactError, RecipeError, UnsupportedModel
from trimtab.deploy import attach, load_adapter, merge, save_adapter
from trimtab.methods import Method, Sample
from trimtab.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
ROWS = [{"input_ids": row, "labels": list(row)} for row in random_rows(*[12] * 8)]
IDS = torch.tensor(random_rows(11, 11))
SAMPLE = Sample(rows=random_rows(40, seed=5))
OURS = {"adapter_config.json", "adapter_model.safetensors", "trimtab.json"}


def method_of(name, **settings):
    return Method.member(name)(**NEEDED.get(name, {}), **settings)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny("llama").save_pretrained(folder := tmp_path_factory.mktemp("models") / "llama")
    return folder


@pytest.fixture
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


# A Base that is made after the adapter was attached


@pytest.mark.parametrize("name", Method.names())
def test_a_base_may_come_after_its_adapter(name, folder, model, tmp_path):
    wanted = Base(transformers.AutoModelForCausalLM.from_pretrained(folder))
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    adapter = attach(model, method_of(name), sample=SAMPLE)
    base = Base(model)
    assert base.fingerprint == wanted.fingerprint
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters().values()}
    perturb(adapter.parameters(), 0.05)
    save_adapter(base, adapter, tmp_path / "adapter")
    load_adapter(wanted, tmp_path / "adapter")
    assert torch.equal(logits(wanted.model), logits(model))
    base.check_unchanged()
    adapter.detach()
    assert flags.keys() == dict(model.named_parameters()).keys()
    assert Base(model).fingerprint == base.fingerprint


# Hugging Face's Trainer


def trained(model, folder, *, resume=None, **settings):
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 100, "seed": 0, **settings}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to=[], per_device_train_batch_size=2, **settings
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {}),
        ("lora", {"init": "pissa", "rank": 4}),
        ("prefix", {}),
        ("ptuning", {"width": 8}),
        ("bottleneck", {}),
        ("tokens", {}),
    ],
    ids=str,
)
def test_trainer_saves_the_adapter_alone_and_resumes_from_it_to_the_bit(name, settings, folder, model, tmp_path):
    adapter = attach(model, method_of(name, **settings), sample=SAMPLE)
    trained(model, tmp_path)
    held = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    weights = "adapter.safetensors" if name == "bottleneck" else "adapter_model.safetensors"
    assert {"adapter_config.json", weights, "trimtab.json", "model.safetensors"} <= held
    assert "config.json" not in held  # so that nobody takes model.safetensors for a model
    assert sum(p.numel() for p in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values()) < 3 * sum(
        p.numel() for p in adapter.parameters().values()
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = attach(other, method_of(name, **settings), seed=1, sample=Sample(rows=random_rows(40, seed=6)))  # another start
    trained(other, tmp_path, resume=tmp_path / "checkpoint-2")
    assert all(torch.equal(tensor, again.state()[key]) for key, tensor in adapter.state().items())
    base = Base(transformers.AutoModelForCausalLM.from_pretrained(folder))
    load_adapter(base, tmp_path / "checkpoint-4")
    assert torch.equal(logits(base.model), logits(model))


@pytest.mark.usefixtures("one_thread")
def test_trainer_finds_its_best_checkpoint_again(model, tmp_path):
    adapter = attach(model, LoRA(rank=2))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 30.0}
    trainer = trained(model, tmp_path, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # at that rate it gets worse
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(any(torch.equal(tensor, theirs) for theirs in best.values()) for tensor in adapter.state().values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainer_refuses_a_quantized_model_with_any_adapter_but_pefts(kind, folder, tmp_path):
    """docs/course.md says so. A Trainer that takes ours makes this test fail, and the page's line old."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")

    def trainer(adapt):
        base = Base.load_folder(folder, torch.float32, torch.device("cpu"), quantize=kind, with_tokenizer=False)
        settings = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        return transformers.Trainer(model=adapt(base.model), args=settings, train_dataset=ROWS)

    def ours(model):
        attach(model, LoRA(rank=2))
        return model

    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(ours)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    assert trainer(lambda model: peft.get_peft_model(model, settings))


def test_transformers_and_peft_read_what_was_saved(folder, model, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter.parameters())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == OURS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # the base that it names, with it
        fresh = transformers.AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")), logits(theirs))


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "parallel"])
def test_peft_refuses_by_name_what_it_has_no_method_for(kind, folder, model, tmp_path):
    peft = pytest.importorskip("peft")
    attach(model, method_of("bottleneck", kind=kind))
    model.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(KeyError, match="TRIMTAB_BOTTLENECK"):
        peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")


# save_pretrained


def test_several_adapters_are_saved_as_peft_does_and_over_older_ones(folder, model, tmp_path):
    for name in ("default", "other"):
        perturb(attach(model, LoRA(rank=2), name=name).parameters(), seed=len(name))
    for _ in range(2):  # the second time over the first
        model.save_pretrained(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {*OURS, "other"}
    for name, saved in (("default", tmp_path / "both"), ("other", tmp_path / "both" / "other")):
        base = Base(transformers.AutoModelForCausalLM.from_pretrained(folder))
        load_adapter(base, saved)
        package.activate(model, name)
        assert torch.equal(logits(base.model), logits(model))


def test_a_save_that_breaks_off_is_noticed(model, tmp_path, monkeypatch):
    """Files are put over older ones one by one, and the manifest last: what is torn is refused."""
    adapter = attach(model, LoRA(rank=2))
    model.save_pretrained(tmp_path / "adapter")
    perturb(adapter.parameters())
    real = files.os.replace

    def replace(source, target):
        if target == tmp_path / "adapter" / "trimtab.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="has changed since it was saved"):
        read_adapter(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == OURS


def test_what_was_saved_fits_the_base_that_it_was_trained_on_alone(model, tmp_path):
    attach(model, LoRA(rank=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"another base than LlamaForCausalLM .*: different weights"):
        load_adapter(Base(tiny("llama", seed=1)), tmp_path / "adapter")


def test_saving_says_what_it_can_not_do(model, tmp_path):
    adapter = attach(model, LoRA(rank=2))
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()
    with pytest.raises(RecipeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    next(iter(adapter.parameters().values())).data = torch.empty(0)
    with pytest.raises(UnsupportedModel, match="sharded over processes"):
        model.save_pretrained(tmp_path / "adapter")
    other = tiny("llama")
    attach(other, LoRA(rank=2), name="../up")
    with pytest.raises(RecipeError, match=r"'\.\./up' is no valid folder name"):
        other.save_pretrained(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_without_adapters_the_model_saves_itself_again(folder, model, tmp_path):
    one, two = attach(model, LoRA(rank=2)), attach(model, LoRA(rank=2), name="two")
    twin = copy.deepcopy(model)
    one.detach()
    model.save_pretrained(tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["two"]
    two.detach()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert Base(again).fingerprint == Base(transformers.AutoModelForCausalLM.from_pretrained(folder)).fingerprint
    twin.save_pretrained(tmp_path / "twin")  # a copy has adapters of its own
    assert {path.name for path in (tmp_path / "twin").iterdir()} == {*OURS, "two"}


def test_a_model_with_adapters_is_merged_whole(model, tmp_path):
    base = Base(model)
    adapter = attach(model, LoRA(rank=2))
    perturb(adapter.parameters())
    merge(base, adapter, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_was_loaded_is_saved_alone_too(folder, tmp_path):
    base = Base(transformers.AutoModelForCausalLM.from_pretrained(folder))
    save_adapter(base, attach(base.model, LoRA(rank=2)), tmp_path / "adapter")
    again = Base(transformers.AutoModelForCausalLM.from_pretrained(folder))
    load_adapter(again, tmp_path / "adapter")
    again.model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "trimtab.json").read_text())["method"]["rank"] == 2


# TRL


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "prefix"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_trls_reference_needs_no_second_model(kind, name, world, tmp_path):
    """With precompute_ref_log_probs it is computed before training, by the model unchanged: losses are those of a second one."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    said = [(f"Is {n} a number?", "yes", "no, it is not") for n in range(8)]
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in said]
    judged = [{"prompt": p, "completion": bad if n % 2 else good, "label": n % 2 == 0} for n, (p, good, bad) in enumerate(said)]
    trainer, config, rows = (trl.DPOTrainer, trl.DPOConfig, pairs) if kind == "dpo" else (trl.KTOTrainer, trl.KTOConfig, judged)
    read = transformers.AutoModelForCausalLM.from_pretrained

    def losses(second):
        model = read(world / "tiny")
        adapter = attach(model, method_of(name), sample=SAMPLE)
        settings = config(
            output_dir=str(tmp_path), max_steps=3, save_strategy="no", learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, per_device_train_batch_size=4, logging_steps=1, seed=0, precompute_ref_log_probs=second is None,
        )  # fmt: skip
        trains = trainer(
            model=model, ref_model=second, args=settings, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(world / "tiny"),
        )  # fmt: skip
        assert (trains.ref_model is None) == (second is None)
        before = adapter.state()
        trains.train()
        assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter.state().items())
        return [line["loss"] for line in trains.state.log_history if "loss" in line]

    ours = losses(None)
    assert ours[0] == pytest.approx({"dpo": 0.693147, "kto": 0.5}[kind], abs=1e-5)
    if name == "lora":  # which starts as the base
        assert ours == pytest.approx(losses(read(world / "tiny")), abs=1e-6)
