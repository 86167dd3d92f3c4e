"""Adapters on the hub are used by name wherever a folder is, at the commit that a revision means; and nothing else is downloaded."""

import fake_hub
import huggingface_hub
import pytest
import torch
from families import perturb
from templates import saved_base

from trimtab.base import Base
from trimtab.core.errors import ArtifactError, RecipeError, StorageError
from trimtab.deploy import adapter_folder, load_adapter, load_model, save_adapter
from trimtab.methods import attach
from trimtab.methods.lora import LoRA


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and an adapter for it."""
    root = tmp_path_factory.mktemp("hub")
    model = saved_base(root / "model")
    base = Base.load(str(model))
    adapter = attach(base.model, LoRA(rank=2))
    perturb(adapter.parameters())
    save_adapter(base, adapter, root / "adapter")
    return model, root / "adapter"


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.serving() as hub:
        fake_hub.use(hub, monkeypatch, tmp_path)
        yield hub


def same(first, second):
    ours, theirs = first.state(), second.state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_is_used_by_its_name(hub, folders):
    model, folder = folders
    commit = hub.put(
        "them/adapter",
        {**files_of(folder), "training_args.bin": b"pickle", "checkpoint-1/README.md": b"", "big.safetensors": b"x"},
    )
    local, loaded = load_model(str(folder)), load_model("them/adapter")
    assert same(local.adapter, loaded.adapter)
    assert loaded.notes == (f"the adapter them/adapter@{commit} of the hub",)
    assert {path.name for path in loaded.folder.iterdir()} == set(files_of(folder))  # and nothing of the rest
    base = Base.load(str(model))
    assert same(load_adapter(base, "them/adapter"), local.adapter)


def test_a_revision_is_one_of_the_repository(hub, folders):
    model, folder = folders
    files = files_of(folder)
    first = hub.put("them/adapter", files)
    base = Base.load(str(model))
    adapter = attach(base.model, LoRA(rank=3))
    save_adapter(base, adapter, folder.parent / f"second-{first[:6]}")
    hub.put("them/adapter", files_of(folder.parent / f"second-{first[:6]}"))
    assert load_model("them/adapter").adapter.method.rank == 3
    assert load_model(f"them/adapter@{first}").adapter.method.rank == 2
    with pytest.raises(StorageError, match="could not be downloaded from the hub"):
        load_model("them/adapter@made-up-branch")


def test_without_the_hub_the_cache_is_used(hub, folders, monkeypatch):
    _, folder = folders
    commit = hub.put("them/adapter", files_of(folder))
    load_model("them/adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert load_model("them/adapter").folder.name == commit
    assert load_model(f"them/adapter@{commit}").folder.name == commit
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert load_model("them/adapter").folder.name == commit
    assert len(hub.requests) == asked
    with pytest.raises(StorageError, match=r"them/another: no such folder here .* the hub cannot be reached"):
        load_model("them/another")


def test_pickles_are_refused_by_name_and_not_downloaded(hub, folders, tmp_path):
    files = files_of(folders[1])
    pickled = {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"cos\nsystem\n"}
    hub.put("them/pickled", pickled)
    with pytest.raises(ArtifactError, match=r"them/pickled: .* it has adapter_model\.bin, a pickle, which is never read"):
        load_model("them/pickled")
    assert not any(path.endswith(".bin") for _, path in hub.requests)
    hub.put("them/incomplete", {"adapter_config.json": files["adapter_config.json"]})
    with pytest.raises(ArtifactError, match=r"holds no adapter_model\.safetensors: it is incomplete"):
        load_model("them/incomplete")


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "adapter_model.safetensors"])
def test_what_differs_from_its_manifest_is_refused(hub, folders, name):
    files = files_of(folders[1])
    changed = files[name].replace(b'"r": 2', b'"r": 3') if name == "adapter_config.json" else files[name][:-1] + b" "
    hub.put("them/changed", {**files, name: changed})
    with pytest.raises(ArtifactError):
        load_model("them/changed")
    without = {path: content for path, content in files.items() if path != "tokenizer.json"}
    hub.put("them/without", without)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing"):
        load_model("them/without")


def test_pefts_adapters_have_no_manifest_and_are_read_all_the_same(hub, folders):
    model, folder = folders
    files = files_of(folder)
    hub.put("them/peft", {name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")})
    loaded = load_model("them/peft", str(model))
    assert same(loaded.adapter, load_model(str(folder)).adapter)


def test_a_repository_without_an_adapter_is_a_model_or_nothing(hub, folders):
    hub.put("them/model", {"config.json": b"{}"})
    assert adapter_folder("them/model") is None
    assert adapter_folder("them/nothing") is None
    assert adapter_folder("them/model@no-branch") is None
    with pytest.raises(RecipeError, match="so --model x does not apply"):
        load_model("them/model", "x")


@pytest.mark.parametrize(("fault", "error", "words"), [
    (403, RecipeError, "does not let you"), (500, StorageError, r"the hub fails \(500\)"), (503, StorageError, "Try again later"),
])  # fmt: skip
def test_what_the_hub_answers_is_said(hub, folders, fault, error, words):
    hub.put("them/adapter", files_of(folders[1]))
    hub.faults["resolve"] = fault
    with pytest.raises(error, match=words):
        load_model("them/adapter")


def test_training_starts_from_one_at_its_commit_and_says_which(hub, folders, tmp_path):
    from trimtab.artifacts import read_record
    from trimtab.run.recipe import Recipe
    from trimtab.run.script import run_recipe

    model, folder = folders
    commit = hub.put("them/adapter", files_of(folder))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "completion": "{n + 1}"}}\n' for n in range(6)))
    raw = {"model": str(model), "data": {"train": str(data), "eval": 2}, "start": "them/adapter", "certify": False}
    recipe = Recipe.parse({**raw, "train": {"max_steps": 1, "lr": 0.01}, "output": str(tmp_path / "run")})
    run_recipe(recipe)
    assert read_record(tmp_path / "run")["start"]["hub"] == f"them/adapter@{commit}"
    with pytest.raises(
        RecipeError, match=r"start: them/nobody is no run or adapter folder .* and the hub has no adapter of that name"
    ):
        run_recipe(Recipe.parse({**raw, "start": "them/nobody", "output": str(tmp_path / "never")}))


def test_saved_adapters_have_the_tokenizer_beside_them(folders, tmp_path):
    import transformers

    model, folder = folders
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, model))
    text = "<|im_start|>user\nhällo<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    base = Base.load(str(model))
    adapter = attach(base.model, LoRA(rank=2))
    save_adapter(base, adapter, tmp_path / "bare", tokenizer=False)
    assert "tokenizer.json" not in files_of(tmp_path / "bare")
    alone = Base(base.model)
    save_adapter(alone, adapter, tmp_path / "alone")
    assert files_of(tmp_path / "alone").keys() == files_of(tmp_path / "bare").keys()


def test_a_tokenizer_that_cannot_be_written_is_left_out(folders, tmp_path, monkeypatch):
    from trimtab.base import export_files

    base = Base.load(str(folders[0]))
    adapter = attach(base.model, LoRA(rank=2))
    monkeypatch.setattr(export_files, "_reads_as", lambda *_: False)
    save_adapter(base, adapter, tmp_path / "adapter")
    assert files_of(tmp_path / "adapter").keys() == {"adapter_config.json", "adapter_model.safetensors", "trimtab.json"}
    assert load_adapter(Base.load(str(folders[0])), tmp_path / "adapter")


def test_switches_of_training_are_defaults_of_the_template_beside_it(folders, tmp_path):
    import shutil

    import transformers

    from trimtab.base import ModelConfig

    switched = shutil.copytree(folders[0], tmp_path / "model")
    template = switched / "chat_template.jinja"
    template.write_text("{{ 'LOUD' if loud else '' }}" + template.read_text())
    base = Base.load(ModelConfig(name=str(switched), template={"loud": True}))
    save_adapter(base, attach(base.model, LoRA(rank=2)), tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith("LOUD")
    assert not tokenizer.apply_chat_template(messages, tokenize=False, loud=False).startswith("LOUD")
    assert load_model(str(tmp_path / "adapter")).base.fingerprint == base.fingerprint
