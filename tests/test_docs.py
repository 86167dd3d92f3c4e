"""What the documents say is true: generated pages are current, READMEs' commands parse and their code runs, links and paths exist."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from templates import saved_base

from trimtab import cli
from trimtab.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "docs" / "README.zh.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
both_readmes = pytest.mark.parametrize("readme", [README, CHINESE], ids=["English", "Chinese"])


def blocks(readme, language):
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_is_written_from_the_code_is_current():
    specification = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: make docs"
    assert module.readme() == README, "run: make docs"
    assert module.methods() == module.METHODS.read_text(encoding="utf-8"), "run: make docs"
    assert module.performance() == module.PERFORMANCE.read_text(encoding="utf-8"), "run: make docs"
    assert module.preference() == module.PREFERENCE.read_text(encoding="utf-8"), "run: make docs"
    assert module.faults() == module.FAULTS.read_text(encoding="utf-8"), "run: make docs"
    assert module.templates() == module.TEMPLATES.read_text(encoding="utf-8"), "run: make docs"
    assert module.models() == module.MODELS.read_text(encoding="utf-8"), "run: make docs"
    assert module.gpu() == module.GPU.read_text(encoding="utf-8"), "run: make docs"
    assert module.migration() == module.MIGRATION.read_text(encoding="utf-8"), "run: make docs"
    source = ROOT / "src" / "trimtab"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^   ([\w/]+\.py) ", module.tree(), flags=re.MULTILINE)) == files | {"__init__.py"}


@both_readmes
def test_the_readmes_recipe_is_a_recipe(readme):
    text, *others = blocks(readme, "yaml")
    assert Recipe.parse(yaml.safe_load(text)).output == Path("runs/first")
    for other in others:
        Recipe.parse(yaml.safe_load(other))


@both_readmes
def test_the_readmes_commands_are_commands(readme):
    lines = [line for line in readme.splitlines() if line.startswith("trimtab ")]
    assert len(lines) >= 11
    for line in lines:
        cli._parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_names_paths_that_exist():
    table = README[README.index("Where to change what") : README.index("<!-- tree -->")]
    paths = [path for path in re.findall(r"`([\w/.<>]+(?:\.py|/))`", table) if "<" not in path]
    assert len(paths) >= 12
    assert [path for path in paths if not (ROOT / "src" / "trimtab" / path).exists()] == []


def test_messages_that_pages_quote_are_in_the_code():
    messages = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in getattr(node, "values", [node]))
        for path in (ROOT / "src" / "trimtab").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    quotes = re.findall("“([^”]+)”", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quotes) >= 30
    patterns = {quote: ".*".join(re.escape(part.strip()) for part in quote.split("…")) for quote in quotes}
    assert [
        quote for quote, pattern in patterns.items() if not any(re.search(pattern, message, re.DOTALL) for message in messages)
    ] == []


@both_readmes
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_readmes_python_runs(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_base("tiny")
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(8)))
    text = "".join(blocks(readme, "python"))
    exec(compile(text.replace("smollm2-135m-instruct", "./tiny"), "README.md", "exec"), {})
    assert Path("my-adapter/adapter_model.safetensors").exists()
    assert Path("my-model/model.safetensors").exists()


def test_every_exit_code_is_in_the_readme():
    from trimtab.core import errors

    codes = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TrimtabError)
    }
    for code in codes - {1}:
        assert re.search(
            rf"\b{code}\b", README[README.index("### Exit codes") : README.index("## What it has been measured at")]
        )


def test_the_tutorials_method_is_a_method(tmp_path, monkeypatch):
    """The page's file, put beside the others: trained, saved, loaded, merged; and the contract's promises."""
    import torch
    from families import perturb, random_rows, tiny

    import trimtab.methods
    from trimtab.base import Base
    from trimtab.data import pack_all
    from trimtab.data.example import TokenRow
    from trimtab.deploy import load_adapter, merge, save_adapter
    from trimtab.methods import Method, attach
    from trimtab.objectives.sft import SFT
    from trimtab.train import TrainConfig, train

    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    file, more = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    whole = file + "\n" + more
    assert len(whole.splitlines()) < 50
    assert set(re.findall(r"^from (trimtab\S*) import", file, flags=re.MULTILINE)) == {"trimtab.methods"}
    assert not re.search(r"import.*\b_", whole)
    (tmp_path / "gates.py").write_text(whole)
    monkeypatch.setattr(trimtab.methods, "__path__", [*trimtab.methods.__path__, str(tmp_path)])
    assert "gates" in Method.names()
    recipe = Recipe.parse({"data": {"train": "x"}, "method": {"name": "gates", "targets": "q_proj"}})
    assert recipe.method.targets == ("q_proj",)

    base = Base(tiny("qwen2"))
    ids = torch.tensor(random_rows(9))
    before = base.model(input_ids=ids).logits
    adapter = attach(base.model, Method.pick("gates"))
    assert torch.equal(base.model(input_ids=ids).logits, before)
    perturb(adapter.parameters())
    layer = adapter.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(3, 32)
    expected = (1 + layer.g.double().tanh()) * (x.double() @ layer.base.weight.double().T + layer.base.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    rows = [TokenRow(row, list(range(1, len(row))), "row") for row in random_rows(9, 7)]
    losses = [step.loss for step in train(base, adapter, SFT(), [pack_all(rows, 64)] * 30, TrainConfig(), 1e-1)]
    assert losses[-1] < losses[0]
    save_adapter(base, adapter, tmp_path / "saved")
    merge(base, adapter, tmp_path / "merged")
    again = Base(tiny("qwen2"))
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(again.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
