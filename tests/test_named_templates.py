"""Several chat templates by name: the one that Transformers chooses writes an example, in training, evaluation and chat alike."""

import json
import shutil

import pytest
import transformers
from chat_templates import FOLDER, TOOLS, base_with
from test_chat_templates import runs
from worlds import CHATML, make_model

from trimtab.base import Base, ModelConfig
from trimtab.base.template_file import read_template
from trimtab.core.errors import ArtifactError, RecipeError
from trimtab.data import SourceReport, tokenize_answers, tokenize_examples
from trimtab.data.formats import read_examples
from trimtab.data.token_rows import tokenize_prompt
from trimtab.deploy import load_model, merge
from trimtab.run.recipe import Recipe
from trimtab.run.script import run_recipe

WITH_TOOLS = (
    "{% for tool in tools %}<|im_start|>tool\n{{ tool | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>helper\n{% endif %}"
).replace("{{ m.role }}", "{{ 'helper' if m.role == 'assistant' else m.role }}")
SHORT = [{"type": "function", "function": {"name": "f"}}]
NAMED = {
    "default": CHATML,
    "tool_use": WITH_TOOLS,
    "rag": CHATML.replace("<|im_start|>{{", "<|im_start|>!{{").replace("<|im_start|>assistant", "<|im_start|>!assistant"),
}
ONE = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}]}


def sequences(on, row):
    report = SourceReport(("rows",))
    rows = tokenize_examples(list(read_examples([("rows:1", row)], {}, report)), on, report)
    return rows or report.rejected[0].reason


def named_base(**named):
    on = base_with(CHATML, "<|im_end|>")
    on.tokenizer.chat_template = named or NAMED
    return on


def test_tool_use_writes_examples_with_tools_and_default_the_others():
    on = named_base()
    ((before, answer),) = runs(on, sequences(on, ONE))
    assert (before, answer) == ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", "First.<|im_end|>")
    ((before, answer),) = runs(on, sequences(on, {**ONE, "tools": TOOLS}))
    assert before.startswith("<|im_start|>tool\n{")
    assert before.endswith("One?<|im_end|>\n<|im_start|>helper\n")
    assert answer == "First.<|im_end|>"
    for row in (ONE, {**ONE, "tools": TOOLS}):
        theirs = on.tokenizer.apply_chat_template(
            row["messages"][:1], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
        )
        asked = tokenize_prompt(row["messages"][:1], on, row.get("tools", ()))
        assert on.tokenizer.decode(asked) == theirs
        (example,) = read_examples([("rows:1", row)], {}, SourceReport(("rows",)))
        assert tokenize_answers([example], on)[0][0] == asked, "what is evaluated is asked alike"


def test_each_template_is_probed_by_itself():
    """The first ends a turn in another way than the second, and only the second reads reasoning and a switch."""
    qwen = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    on = base_with(CHATML.replace("<|im_end|>", "<|end|>") + qwen, "<|im_end|>", ("<|end|>",))
    on.tokenizer.chat_template = {"default": CHATML.replace("<|im_end|>", "<|end|>"), "tool_use": qwen}
    ((_, answer),) = runs(on, sequences(on, ONE))
    assert answer == "First.<|end|>"
    thinking = {"messages": [ONE["messages"][0], {**ONE["messages"][1], "reasoning_content": "Hm."}]}
    assert "does not write reasoning_content" in sequences(on, thinking)
    ((_, answer),) = runs(on, sequences(on, {**thinking, "tools": TOOLS}))
    assert answer == "<think>\nHm.\n</think>\n\nFirst.<|im_end|>"
    switched = {**ONE, "chat_template_kwargs": {"enable_thinking": False}}
    assert "chat_template_kwargs.enable_thinking: the chat template does not read it: it has no switches" in sequences(
        on, switched
    )
    ((before, answer),) = runs(on, sequences(on, {**switched, "tools": TOOLS}))
    assert before.endswith("<think>\n\n</think>\n\n")
    assert answer == "First.<|im_end|>"
    assert on.template.switch_names == ["enable_thinking"]


def test_without_a_default_an_example_without_tools_says_what_there_is():
    on = named_base(tool_use=WITH_TOOLS, rag=CHATML)
    assert "several chat templates by name (tool_use, rag), and none that is called default: choose one with model.chat_template=tool_use" in (
        sequences(on, ONE)
    )  # fmt: skip
    assert len(sequences(on, {**ONE, "tools": TOOLS})) == 1


# In folders


def folder_with(path, place):
    """A model whose tokenizer has the three templates there."""
    make_model(path, 0)
    if place == "a list in tokenizer_config.json":
        (path / "chat_template.jinja").unlink()
        file = path / "tokenizer_config.json"
        listed = [{"name": name, "template": template} for name, template in NAMED.items()]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    else:
        (path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (path / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])
    return path


PLACES = ("a list in tokenizer_config.json", "additional_chat_templates")


@pytest.mark.parametrize("place", PLACES)
def test_they_are_read_from_where_they_are_and_merging_keeps_them_all(place, tmp_path):
    folder = folder_with(tmp_path / "tiny", place)
    assert Base.load(str(folder)).tokenizer.chat_template == NAMED
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [ONE, {**ONE, "tools": SHORT}] * 4))
    recipe = {
        "model": str(folder), "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0}, "method": {"rank": 2}, "train": {"max_steps": 2},
        "output": str(tmp_path / "run"), "certify": False,
    }  # fmt: skip
    run_recipe(Recipe.parse(recipe))
    target = load_model(str(tmp_path / "run"))
    assert target.base.tokenizer.chat_template == NAMED
    merge(target.base, target.adapter, tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == NAMED
    assert Base.load(str(tmp_path / "merged")).fingerprint["template"] == target.base.fingerprint["template"]


@pytest.mark.parametrize("place", PLACES)
def test_one_is_chosen_by_name_and_kept_with_the_adapter(place, tmp_path):
    folder = folder_with(tmp_path / "tiny", place)
    base = Base.load(ModelConfig(name=str(folder), chat_template="rag"))
    assert base.tokenizer.chat_template == NAMED["rag"]
    assert base.config.chat_template == "rag"
    with pytest.raises(
        RecipeError, match=r"model\.chat_template: rga is no file, and none of the model's templates: default, .*rag.* Give one"
    ):
        Base.load(ModelConfig(name=str(folder), chat_template="rga"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ONE) + "\n")
    recipe = {
        "model": {"name": str(folder), "chat_template": "rag"}, "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0},
        "method": {"rank": 2}, "train": {"max_steps": 1}, "output": str(tmp_path / "run"), "certify": False,
    }  # fmt: skip
    run_recipe(Recipe.parse(recipe))
    assert load_model(str(tmp_path / "run")).base.tokenizer.chat_template == NAMED["rag"]


def test_a_file_may_have_several_which_go_with_the_adapter(tmp_path):
    make_model(tmp_path / "tiny", 0)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": [{"name": n, "template": t} for n, t in NAMED.items()]}))
    assert read_template(file) == NAMED
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ONE, "tools": SHORT}) + "\n")
    recipe = {
        "model": {"name": str(tmp_path / "tiny"), "chat_template": str(file)}, "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0},
        "method": {"rank": 2}, "train": {"max_steps": 1}, "output": str(tmp_path / "run"), "certify": False,
    }  # fmt: skip
    run_recipe(Recipe.parse(recipe))
    file.unlink()
    target = load_model(str(tmp_path / "run"))
    assert target.base.tokenizer.chat_template == NAMED
    merge(target.base, target.adapter, tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == NAMED
    kept = tmp_path / "run" / "adapter" / "training_templates.json"
    shutil.copy(kept, tmp_path / "copy.json")
    assert read_template(tmp_path / "copy.json") == NAMED
    kept.write_text(kept.read_text().replace("helper", "Helper"))
    with pytest.raises(ArtifactError, match=r"training_templates\.json: changed since it was saved"):
        load_model(str(tmp_path / "run"))
