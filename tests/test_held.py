"""A base is held as it was when an adapter was trained on it: its number type, device, quantization and template's switches."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from worlds import make_model

import trimtab as package
from trimtab.artifacts import read_adapter
from trimtab.base import Base, ModelConfig, config, fit_to_machine
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.deploy import load_model
from trimtab.evaluate import reference
from trimtab.run import script as running
from trimtab.run.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SWITCHED = (
    "{% if enable_thinking is not defined or enable_thinking %}{% set open = '<think>' %}{% else %}{% set open = '' %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ open }}{% endif %}"
)


def wrapped(folder, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return Base(model, transformers.AutoTokenizer.from_pretrained(folder))


def saved(base, folder):
    adapter = package.attach(base.model, package.LoRA(rank=2))
    package.save_adapter(base, adapter, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_base_in_any_number_type_comes_back_in_it(dtype, here):
    base = wrapped("tiny", getattr(torch, dtype))
    assert base.config == ModelConfig(name="tiny", dtype=dtype, device="cpu")
    saved(base, "adapter")
    assert base.config == ModelConfig(name="tiny", dtype=dtype, device="cpu"), "with an adapter on it"
    target = load_model("adapter")
    assert target.notes == ()
    assert target.base.config == ModelConfig(name=str(here / "tiny"), dtype=dtype, device="cpu")
    assert target.base.model.dtype == getattr(torch, dtype)
    with pytest.raises(ArtifactError, match="different weights"):
        Base.load(ModelConfig(name="tiny", dtype="float32" if dtype != "float32" else "bfloat16")).check_is(
            base.fingerprint, "it"
        )


def test_the_switches_of_its_template_come_back(here):
    make_model(here / "switched", 0, template=SWITCHED)
    asked = ModelConfig(name="switched", template={"enable_thinking": False})
    saved(Base.load(asked), "adapter")
    target = load_model("adapter")
    assert target.base.config.template == {"enable_thinking": False}
    assert "<think>" not in target.base.template.render([{"role": "user", "content": "x"}], prompt=True)


def accelerator(monkeypatch, kind):
    """As if there were one: `meta` holds nothing, but is a device."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if kind else None)
    monkeypatch.setattr(config, "_problem", lambda device, dtype: "no" if (device.type, dtype) == ("mps", "float64") else None)


@pytest.mark.parametrize(
    ("asked", "dtype", "there", "chosen"),
    [
        ("auto", "auto", None, ("cpu", "float32")),
        ("auto", "auto", "meta", ("meta", "bfloat16")),
        ("auto", "float32", "meta", ("meta", "float32")),
        ("cpu", "auto", "meta", ("cpu", "float32")),
        ("cpu", "bfloat16", "meta", ("cpu", "bfloat16")),
        ("auto", "float64", "mps", ("cpu", "float64")),
        ("auto", "float16", "mps", ("mps", "float16")),
    ],
)
def test_where_it_goes(asked, dtype, there, chosen, monkeypatch):
    accelerator(monkeypatch, there)
    wanted = ModelConfig(name="x", device=asked, dtype=dtype)
    device = config.resolve_device(wanted)
    assert (device.type, str(config.resolve_dtype(wanted, device)).removeprefix("torch.")) == chosen


def test_a_run_on_the_cpu_stays_there_though_an_accelerator_is_found(here, monkeypatch):
    """What its certificate, eval, chat and merge open, too: all of them open it so."""
    running.run_recipe(Recipe.read(Path("r.yaml"), ["output=new", "train.epochs=0.3", "model.device=cpu"]))
    for folder in (*Path("new/checkpoints").iterdir(), Path("new/adapter")):
        assert read_adapter(folder).base["model"] == ModelConfig(name=str(here / "tiny"), dtype="float32", device="cpu").plain()
    loaded = []
    accelerator(monkeypatch, "meta")
    monkeypatch.setattr(Base, "load_folder", lambda place, dtype, device, **_: loaded.append((dtype, device)) or 1 / 0)
    for name in ("new", "run"):  # the second was trained wherever it was best
        with pytest.raises(ZeroDivisionError):
            load_model(name)
    assert loaded == [(torch.float32, torch.device("cpu")), (torch.float32, torch.device("meta"))]


def test_a_device_that_is_not_here_is_said_and_another_is_taken(here, trimtab):
    manifest = json.loads(Path("run/adapter/trimtab.json").read_text())
    manifest["base"]["model"]["device"] = "cuda:7"
    del manifest["digest"]
    package.core.files.write_manifest(Path("run/adapter/trimtab.json"), manifest.pop("format"), manifest)
    said = "trimtab: run/adapter: it was trained on cuda:7, which this machine lacks, so it runs on cpu: results may differ by rounding.\n"
    for words in (["chat", "run", "--prompt", "x"], ["eval", "run"], ["merge", "--force", "run", "merged"]):
        done = trimtab(*words)
        assert (done.code, done.err) == (0, said)
    with pytest.raises(RecipeError, match=r"model\.device: cuda:7 cannot be used here"):
        Base.load(ModelConfig(name="tiny", device="cuda:7"))
    assert fit_to_machine(ModelConfig(name="x", dtype="float16", quantize="nf4", device="cuda:7"))[0] == ModelConfig(
        name="x", dtype="float16", quantize="nf4"
    ), "what an adapter has learned on stays"


@pytest.mark.parametrize("news", [{"device": "nowhere"}, {"code": "run me"}, {"dtype": 3}], ids=str)
def test_a_manifest_that_asks_for_what_there_is_not_is_refused_by_its_name(news, here):
    manifest = json.loads(Path("run/adapter/trimtab.json").read_text())
    manifest["base"]["model"] |= news
    del manifest["digest"]
    package.core.files.write_manifest(Path("run/adapter/trimtab.json"), manifest.pop("format"), manifest)
    with pytest.raises(ArtifactError, match=rf"run/adapter/trimtab\.json: base\.model: {next(iter(news))}: "):
        load_model("run")


def test_a_base_that_no_recipe_has_words_for_is_held_somewhere():
    assert config.nearest_config("x", torch.float8_e5m2, "hpu:0", "none", {}) == ModelConfig(name="x")
    assert config.nearest_config("x", torch.float32, "cuda:1", "int8", {"a": 1}) == ModelConfig(
        name="x", dtype="float32", device="cuda:1", quantize="int8", template={"a": 1}
    )


def test_a_model_that_is_compared_with_is_held_as_the_policy_is(here):
    make_model(here / "switched", 0, template=SWITCHED)
    asked = ModelConfig(name="switched", dtype="bfloat16", device="cpu", template={"enable_thinking": False})
    base = Base.load(asked)
    adapter = package.attach(base.model, package.LoRA(rank=2))
    with reference._open(base, adapter, str(here / "other")) as other:
        assert other.base.model.dtype == torch.bfloat16
        assert (other.base.config.device, other.base.config.template) == ("cpu", {})


@pytest.mark.parametrize(("native", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_what_the_card_computes_in_and_is_said_where_it_is_float16(native, chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    card = torch.device("cuda", 1)
    assert config.resolve_dtype(ModelConfig(name="x"), card) == chosen
    assert asked == [card]
    said = config.dtype_note(ModelConfig(name="x"), card)
    assert (said is None) == native
    assert said is None or "float16, because cuda here does not compute in bfloat16" in said
    for dtype in ("bfloat16", "float16", "float32"):
        assert config.resolve_dtype(ModelConfig(name="x", dtype=dtype), card) == getattr(torch, dtype)
        assert config.dtype_note(ModelConfig(name="x", dtype=dtype), card) is None


def test_auto_is_float16_where_tensors_of_bfloat16_cannot_be_made(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *size, dtype, device: ones(*size, dtype=dtype) if dtype != torch.bfloat16 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):  # not every error is taken for an answer
        config.resolve_dtype(ModelConfig(name="x"), torch.device("mps"))

    def refuse(*size, dtype, device):
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuse)
    assert config.resolve_dtype(ModelConfig(name="x"), torch.device("mps")) == torch.float16


def test_the_base_is_let_go_of_before_another_process_loads_it(here, monkeypatch):
    held = []

    def certified(folder, base, *rest):
        held.extend(one.numel() for one in (*base.model.parameters(), *base._frozen_weights.values()))
        return {"passed": True, "tests": []}

    monkeypatch.setattr(running, "certify", certified)
    running.run_recipe(Recipe.read(Path("r.yaml"), ["output=new", "certify=true", "train.epochs=0.3"]))
    assert len(held) > 50
    assert sum(held) == 0


def test_what_is_known_of_a_base_that_was_let_go_of_stays_known(here):
    base, other = Base.load("tiny"), Base.load("tiny")
    size = sum(p.nbytes for p in base.model.parameters())
    assert size > 100_000
    base.release()
    assert sum(p.nbytes for p in base.model.parameters()) == 0
    assert base.fingerprint == other.fingerprint
    assert base.config == other.config
