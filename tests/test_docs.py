"""What the documents say is so: generated pages are current, the README's code runs, its tree is the tree."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from templates import CHATML, base_of, bytes_tokenizer

from trimtab import cli
from trimtab.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_what_is_written_from_the_code_is_current():
    specification = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: make docs"
    assert module.readme() == README, "run: make docs"
    source = ROOT / "src" / "trimtab"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^   ([\w/]+\.py) ", module.tree(), flags=re.MULTILINE)) == files | {"__init__.py"}


def test_the_readmes_recipe_is_a_recipe():
    (text,) = blocks("yaml")
    assert Recipe.parse(yaml.safe_load(text)).output == Path("runs/first")


def test_the_readmes_commands_are_commands():
    lines = [line for line in README.splitlines() if line.startswith("trimtab ")]
    assert len(lines) >= 5
    for line in lines:
        cli._parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = base_of(bytes_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>")), CHATML, eos_token="<|im_end|>")
    base.model.save_pretrained("tiny")
    base.tokenizer.save_pretrained("tiny")
    Path("train.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(8)))
    (text,) = blocks("python")
    exec(compile(text.replace("smollm2-135m-instruct", "./tiny"), "README.md", "exec"), {})
    assert Path("my-adapter/adapter_model.safetensors").exists()
    assert Path("my-model/model.safetensors").exists()


def test_every_exit_code_is_in_the_readme():
    from trimtab import errors

    codes = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TrimtabError)
    }
    for code in codes - {1}:
        assert re.search(rf"\b{code}\b", README[README.index("Exit codes") : README.index("## What it has been measured at")])
