"""What is pushed to the hub is all that others need, says what was measured, works as its card says, and gives nothing away."""

import contextlib
import io
import json
import re
import shutil
import socket

import fake_hub
import huggingface_hub
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from templates import saved_base
from transformers import AutoTokenizer

from trimtab.artifacts import read_adapter, read_certificate
from trimtab.base import Base
from trimtab.cli import main
from trimtab.core.errors import RecipeError
from trimtab.deploy import hub_client, load_model, privacy, save_adapter
from trimtab.deploy.base_facts import BaseFacts, base_facts
from trimtab.deploy.model_card import model_card, text
from trimtab.deploy.publication import publication
from trimtab.methods import attach
from trimtab.methods.lora import LoRA
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "certificate.json", "chat_template.jinja", "recipe.yaml",
    "tokenizer.json", "tokenizer_config.json", "trimtab.json",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client uploads by an old word
SECRET_WORDS = "nobody but us may read this"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A certified run of a tiny model, whose card has a licence, on a file with words that nobody else may read."""
    root = tmp_path_factory.mktemp("secret-customer")
    model = saved_base(root / "model")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n\n# Tiny\n")
    rows = [{"prompt": f"{SECRET_WORDS} {n}", "completion": f"{n + 1}"} for n in range(16)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"model": str(model), "data": {"train": str(root / "data.jsonl"), "eval": 4}, "method": {"name": "lora", "rank": 2}}
    run_recipe(Recipe.parse({**raw, "train": {"epochs": 30, "lr": 0.01, "rows_per_step": 4}, "output": str(root / "run")}))
    return root / "run"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub.serving() as hub:
        fake_hub.use(hub, monkeypatch, tmp_path)
        yield hub


def failing(capsys, *words):
    code = main(["push", *map(str, words)])
    return code, capsys.readouterr().err


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_commit_holds_what_others_need_and_nothing_else(hub, run, capsys):
    assert main(["push", str(run), "ours/first", "--private", "--base-model", "them/base"]) == 0
    (commit,) = hub.commits["ours/first"]
    assert commit["files"].keys() == FILES
    assert hub.private["ours/first"]
    assert commit["branch"] == "main"
    assert re.fullmatch(r"Push the lora adapter with Trimtab \S+", commit["message"])
    assert commit["files"]["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert commit["files"]["tokenizer.json"] == (run / "adapter" / "tokenizer.json").read_bytes()
    assert json.loads(commit["files"]["adapter_config.json"])["base_model_name_or_path"] == "them/base"
    for name, content in commit["files"].items():
        assert b"secret-customer" not in content, name
        assert SECRET_WORDS.encode() not in content, name
    said = capsys.readouterr().out
    assert "Pushed to ours/first: README.md, adapter_config.json" in said
    assert "trimtab chat ours/first" in said
    assert main(["push", str(run), "ours/first", "--revision", "next", "--base-model", "them/base"]) == 0
    assert [commit["branch"] for commit in hub.commits["ours/first"]] == ["main", "next"]


def test_the_card_has_the_hubs_metadata_and_the_measured_results(hub, run):
    assert main(["push", str(run), "ours/first", "--base-model", "them/base"]) == 0
    card, certificate = hub.commits["ours/first"][0]["files"]["README.md"].decode(), read_certificate(run)
    data = metadata(card)
    assert (data["base_model"], data["license"], data["language"]) == ("them/base", "mit", "de")
    assert (data["library_name"], data["pipeline_tag"], data["base_model_relation"]) == ("peft", "text-generation", "adapter")
    assert data["tags"] == ["trimtab", "lora", "sft", "adapter"]
    assert "datasets" not in data
    results = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in data["model-index"][0]["results"]}
    assert results == {on: pytest.approx(loss, abs=1e-6) for on, loss in certificate["losses"]["adapter"].items()}
    gain = next(test["words"] for test in certificate["tests"] if test["name"] == "gain")
    low, high = re.search(r"interval (\S+) to (\S+)\)", gain).groups()
    assert f"({low} to {high})" in card
    assert f"{certificate['losses']['base']['held_out']:.4f}" in card
    assert "| data.jsonl | 16 | 16 | 0 |" in card
    assert "4 of the examples were held out" in card
    published = json.loads(hub.commits["ours/first"][0]["files"]["certificate.json"])
    assert published["tests"] == certificate["tests"]
    assert not {"canaries", "answers"} & published.keys()
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(card.split("---\n", 2)[2])
    assert html.count("<table>") == 4
    assert html.count("<h2>") == 7


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which PEFT still asks for
def test_what_is_pushed_is_loaded_again_and_the_cards_programs_run(hub, run):
    model = run.parent / "model"
    hub.put("them/base", {path.name: path.read_bytes() for path in model.iterdir()})
    assert main(["push", str(run), "ours/first", "--base-model", "them/base"]) == 0
    ours, theirs = load_model(str(run)), load_model("ours/first")
    assert theirs.base.source == "them/base"
    ids = torch.tensor([ours.base.encode(["one and two"])[0].ids])
    with torch.no_grad():
        expected = ours.base.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        assert torch.equal(theirs.base.model(input_ids=ids, use_cache=False).logits.log_softmax(-1), expected)
    card = hub.commits["ours/first"][0]["files"]["README.md"].decode()
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(programs) == 2
    assert "AutoPeftModelForCausalLM" in programs[1]
    said, names = [], {}
    for program in programs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(
                compile(
                    program.replace("max_new_tokens=256", "max_new_tokens=20").replace('?"))', '?", max_new_tokens=20))'),
                    "card",
                    "exec",
                ),
                names,
            )
        said.append(out.getvalue())
    assert said[0] == said[1]  # Trimtab and PEFT answer alike
    with torch.no_grad():
        logits = names["model"](input_ids=ids, use_cache=False).logits.log_softmax(-1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_is_written_without_the_network(run, tmp_path, monkeypatch, capsys):
    def no_network(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert main(["push", str(run), "ours/first", "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in metadata(card)
    assert "FOLDER_OF_THE_BASE_MODEL" in card
    assert read_adapter(tmp_path / "out").base["model"]["name"] == "model"
    assert load_model(str(tmp_path / "out"), str(run.parent / "model")).adapter is not None
    assert failing(capsys, run, "ours/first", "--output", tmp_path / "out")[0] == 6


def test_merged_models_are_pushed_whole(hub, run, capsys):
    assert main(["push", str(run), "ours/whole", "--merged", "--base-model", "them/base"]) == 0
    files = hub.commits["ours/whole"][0]["files"]
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "certificate.json",
    } <= files.keys()
    assert "adapter_config.json" not in files
    assert b"secret-customer" not in b"".join(files.values())
    data = metadata(files["README.md"].decode())
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    assert "AutoModelForCausalLM" in files["README.md"].decode()
    code, said = failing(capsys, run, "ours/whole")
    assert code == 2
    assert "holds a model (config.json)" in said


def test_what_an_earlier_push_left_is_not_read_with_the_new_files(hub, run):
    old = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "chat_template.jinja": b"x",
        "more.jinja": b"y",
    }
    hub.put("ours/whole", {**old, "config.json": b"{}", "notes/model.safetensors": b"2", "eval.json": b"3"})
    assert main(["push", str(run), "ours/whole", "--merged", "--base-model", "them/base"]) == 0
    there = hub.repositories["ours/whole"]["main"]
    assert old.keys() & there.keys() == {"chat_template.jinja"}
    assert there["chat_template.jinja"] != b"x"
    assert {"notes/model.safetensors", "eval.json", "model.safetensors"} <= there.keys()


def test_a_branch_is_asked_what_it_holds(hub, run, capsys):
    hub.put("ours/both", {"README.md": b""})
    hub.put("ours/both", {"config.json": b"{}"}, "whole")
    code, said = failing(capsys, run, "ours/both", "--revision", "whole")
    assert (code, "holds a model" in said) == (2, True)
    assert main(["push", str(run), "ours/both", "--revision", "next"]) == 0
    card = hub.commits["ours/both"][0]["files"]["README.md"].decode()
    assert "trimtab chat ours/both@next" in card
    assert 'revision="next"' in card


def test_trackers_are_not_anybody_elses_matter(hub, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    tracker = {"name": "mlflow", "uri": "http://tracking.inside:5000"}
    (other / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "track": [tracker]}))
    assert main(["push", str(other), "ours/first"]) == 0
    files = hub.commits["ours/first"][0]["files"]
    assert b"tracking.inside" not in b"".join(files.values())
    assert "track" not in yaml.safe_load(files["recipe.yaml"])


def test_a_folder_is_told_from_the_end_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(privacy.Path, "cwd", lambda: privacy.Path("/data"))
    assert list(privacy.leaks("https://huggingface.co/org/data and org/data")) == []
    assert list(privacy.leaks("in /data/x")) == ["the path of a folder of this machine"]


def test_an_uncertified_run_is_refused_unless_it_is_forced(hub, run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    (other / "certificate.json").unlink()
    code, said = failing(capsys, other, "ours/first")
    assert code == 7
    assert "--force" in said
    assert "ours/first" not in hub.commits
    assert main(["push", str(other), "ours/first", "--force"]) == 0
    assert "None: this adapter comes without a certified run" in hub.commits["ours/first"][0]["files"]["README.md"].decode()


@pytest.mark.parametrize(("path", "fault", "code", "words"), [
    ("repos/create", 403, 2, "does not let you"), ("repos/create", 500, 6, r"the hub fails \(500\)"),
    ("repos/create", 401, 2, "hf auth login"), ("commit/", 409, 2, "changed meanwhile"), ("commit/", 412, 2, r"refuses it \(412\)"),
    ("preupload", 503, 6, "Try again later; nothing is lost"),
    ("lfs/", 403, 2, "does not let you"), ("repos/create", "hang", 6, "no answer within"),
])  # fmt: skip
def test_whatever_the_hub_does_is_said_and_leaves_nothing_behind(
    hub, run, monkeypatch, tmp_path, capsys, path, fault, code, words
):
    hub.faults[path] = fault
    monkeypatch.setattr(hub_client, "SECONDS", 0.5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found, said = failing(capsys, run, "ours/first")
    assert found == code, said
    assert re.search(words, said)
    assert not hub.commits
    assert not list((tmp_path / "temporary").iterdir())


def test_who_is_not_logged_in_or_names_nobody_is_told(hub, run, monkeypatch, capsys):
    assert failing(capsys, run, "theirs/first")[0] == 2  # another's namespace
    monkeypatch.delenv("HF_TOKEN")
    code, said = failing(capsys, run, "ours/first")
    assert code == 2
    assert "hf auth login" in said
    code, said = failing(capsys, run, "first")
    assert code == 2
    assert "expected a name on the hub such as org/name, got 'first'" in said
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = failing(capsys, run, "ours/first")
    assert code == 6
    assert "cannot be reached" in said
    assert "--output FOLDER" in said


@pytest.mark.parametrize(("secret", "what"), [
    (fake_hub.TOKEN, "a token of the Hugging Face hub"), ("sk-" + "a1" * 20, "a key of OpenAI"), ("https://me:word@host/x", "a password"),
    ("see /home/jane/notes", "the path of a user's folder"), ("our-own-word-8", "the value of the environment variable OUR_API_KEY"),
])  # fmt: skip
def test_secrets_are_never_pushed(hub, run, tmp_path, monkeypatch, capsys, secret, what):
    monkeypatch.setenv("OUR_API_KEY", "our-own-word-8")
    other = shutil.copytree(run, tmp_path / "run")
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("system: null", f"system: 'Be kind. {secret} .'"))
    if "/home" in secret:  # of a path in a sentence, the last part is left
        assert main(["push", str(other), "ours/first"]) == 0
        assert b"jane" not in hub.commits["ours/first"][0]["files"]["recipe.yaml"]
        return
    code, said = failing(capsys, other, "ours/first")
    assert code == 2
    assert f"recipe.yaml would hold {what}" in said
    assert secret not in said
    assert not hub.commits


def test_paths_keep_their_last_part():
    value = {
        "a": "/home/jane doe/x.jsonl",
        "b": ["~/y.py:f", "org/name", "C:\\Users\\j\\z.txt"],
        "/tmp/k": "read /data/deep/z.csv:3 and ./w, 1/2",
    }
    kept = privacy.without_folders(value)
    assert kept == {"a": "x.jsonl", "b": ["y.py:f", "org/name", "z.txt"], "k": "read z.csv:3 and ./w, 1/2"}
    assert list(privacy.leaks("nothing here: org/name, 1/2, https://huggingface.co/org/name")) == []


def test_hostile_names_stay_texts(run):
    about = publication(
        run / "adapter", "ours/first", BaseFacts(None, None, {"license": "a\nlicense: gpl"}, None), merged=False
    )
    evil = "](http://evil) <script>alert(1)</script> | `x` ![i](y) {{7*7}}\n\n# Title\n---\nlicense: evil"
    about.data = {
        "sources": [{"name": evil, "source": evil, "rows": 1, "used": 1}],
        "files": {f"/a/{evil}": evil},
        "held_out": [],
        "digest": evil,
    }
    about.recipe = {"model": {"name": "```\n# Title"}, "data": {"system": evil}}
    about.adapter.base["model"]["name"] = evil
    card = model_card(about)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("\n---\n", 1)[1])
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("<h1>") == 1
    assert 'evil"' not in html.replace("&quot;", "")
    assert not re.search(r'href="(?!https://(huggingface\.co|pypi\.org))', html)
    assert metadata(card)["license"] == "a\nlicense: gpl"
    assert text("a_b*c") == r"a\_b\*c"


def test_facts_about_a_base_are_found_where_they_stand(tmp_path, run):
    assert base_facts("smollm2-135m-instruct").licence == {"license": "apache-2.0"}
    snapshot = tmp_path / "models--them--base-1" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    found = base_facts(str(snapshot))
    assert (found.hub_name, found.revision) == ("them/base-1", "a" * 40)
    assert found.licence == {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    (snapshot / "README.md").write_text("---\n: [broken\n---\n")
    assert base_facts(str(snapshot)).licence == {}
    (snapshot / "README.md").unlink()
    assert base_facts(str(snapshot)).licence == {}
    assert base_facts(str(tmp_path)).hub_name is None
    card = model_card(publication(run / "adapter", "ours/first", BaseFacts(None), merged=False))
    assert "Licence of the base model: unknown" in card
    assert "license" not in metadata(card)


def test_templates_by_name_are_published_with_the_tokenizer(run, tmp_path):
    base = Base.load(str(run.parent / "model"))
    named = {"default": base.tokenizer.chat_template, "tool_use": "{{ messages[0].content }}"}
    base.tokenizer.chat_template = named
    save_adapter(base, attach(base.model, LoRA(rank=2)), tmp_path / "adapter")
    assert main(["push", str(tmp_path / "adapter"), "ours/first", "--force", "--output", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == named
    assert read_adapter(tmp_path / "out").method == read_adapter(tmp_path / "adapter").method


def test_what_trimtab_did_not_save_is_not_pushed(hub, run, tmp_path, capsys):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (folder / "trimtab.json").unlink()
    code, said = failing(capsys, folder, "ours/first")
    assert code == 4
    assert "hf upload" in said
    assert RecipeError.exit_code == failing(capsys, tmp_path / "nothing", "ours/first")[0]
