"""A recipe says exactly one thing, or is refused by the path of what is wrong with it."""

import types
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from families import NEEDED
from pydantic import BaseModel, Field, ValidationError

from trimtab.base import ModelConfig
from trimtab.core import yaml12
from trimtab.core.config import Choice, Config
from trimtab.core.errors import RecipeError
from trimtab.data import DataConfig, Source
from trimtab.evaluate import EvalConfig
from trimtab.evaluate.metrics import Metric
from trimtab.methods import Method
from trimtab.methods.lora import LoRA
from trimtab.objectives import Objective
from trimtab.run.recipe import Recipe
from trimtab.track import Tracker
from trimtab.train import TrainConfig, UpdateRule

DATA = "data: {train: a.jsonl}\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(text, *words):
    Path("r.yaml").write_text(text, encoding="utf-8")
    return Recipe.read(Path("r.yaml"), words)


def refusal(text, *words):
    with pytest.raises(RecipeError) as caught:
        recipe(text, *words)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Keys that are not
        ("modle: x\n" + DATA, "modle: no such key. Did you mean 'model'?"),
        (
            DATA + "zzz: 1",
            "zzz: no such key. Known: model, data, method, objective, train, devices, distributed, eval, track, start, certify, resume, output.",
        ),
        (DATA + "train: {epocs: 2}", "train.epocs: no such key. Did you mean 'epochs'?"),
        (DATA + "model: {nam: x}", "model.nam: no such key. Did you mean 'name'?"),
        (DATA + "method: {name: lora, rnak: 2}", "method.rnak: no such key. Did you mean 'rank'?"),
        (DATA + "method: {rnak: 2}", "method.rnak: no such key. Did you mean 'rank'?"),
        (DATA + "objective: {name: sft, beta: 2}", "objective.beta: no such key. It has none."),
        ("data: {train: a, columns: {promt: q}}",
         "data.columns.promt: expected 'messages', 'conversations', 'instruction', 'input', 'output', 'system', 'history', 'tools', "
         "'prompt', 'completion', 'text', 'chosen', 'rejected', 'label', 'kto_tag' or 'chat_template_kwargs', got 'promt'."),
        # Keys that are missing
        ("", "data: missing, and it has no default."),
        ("model: x", "data: missing, and it has no default."),
        ("data: {}", "data.train: missing, and it has no default."),
        (DATA + "model: {device: cpu}", "model.name: missing, and it has no default."),
        # Types
        (DATA + "method: {rank: '8'}", "method.rank: expected a whole number, got '8' (a text: leave the quotes out)."),
        (DATA + "method: {rank: true}", "method.rank: expected a whole number, got true."),
        (DATA + "method: {rank: 8.5}", "method.rank: expected a whole number, got 8.5."),
        (DATA + "method: {rank: 8.0}", "method.rank: expected a whole number, got 8.0 (write 8)."),
        (DATA + "train: {rows_per_step: 1e3}", "train.rows_per_step: expected a whole number, got 1000.0 (write 1000)."),
        (DATA + "method: {rank: }", "method.rank: expected a whole number, got null."),
        (DATA + "method: {rank: [8]}", "method.rank: expected a whole number, got a list."),
        (DATA + "method: {rank: {}}", "method.rank: expected a whole number, got an empty mapping."),
        (DATA + "train: {epochs: two}", "train.epochs: expected 'auto' or a number, got 'two'."),
        (DATA + "train: {epochs: '2'}", "train.epochs: expected 'auto' or a number, got '2' (a text: leave the quotes out)."),
        (DATA + "train: {epochs: true}", "train.epochs: expected 'auto' or a number, got true."),
        (DATA + "train: {epochs: 1:30}", "train.epochs: expected 'auto' or a number, got '1:30'."),
        (DATA + "train: {seed: 1_000}", "train.seed: expected a whole number, got '1_000'."),
        (DATA + "train: {lr: fast}", "train.lr: expected 'auto' or a number, got 'fast'."),
        (DATA + "train: {lr: '1e-4'}", "train.lr: expected 'auto' or a number, got '1e-4' (a text: leave the quotes out)."),
        (DATA + "train: {schedule: cosin}", "train.schedule: expected 'cosine', 'linear', 'constant', 'wsd' or 'inverse_sqrt', got 'cosin'."),
        (DATA + "train: null", "train: expected a mapping with keys such as epochs, got null."),
        (DATA + "train: [1]", "train: expected a mapping with keys such as epochs, got a list."),
        (DATA + "model: 3", "model: expected a mapping with keys such as name, got 3."),
        (DATA + "model: ''", "model: expected a text that is not empty, got ''."),
        (DATA + "model: {name: x, dtype: fp16}", "model.dtype: expected 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got 'fp16'."),
        ("data: a.jsonl", "data: expected a mapping with keys such as train, got 'a.jsonl'."),
        ("data: {train: []}", "data.train: expected a list that is not empty, got an empty list."),
        ("data: {train: [a, 3]}", "data.train.1: expected a text, got 3."),
        ("data: {train: 3}", "data.train: expected a list, got 3."),
        ("data: {train: a, columns: q}", "data.columns: expected a mapping, got 'q'."),
        ("data: {train: a, columns: {prompt: 3}}", "data.columns.prompt: expected a text, got 3."),
        ("data: {train: a, overlong: no}", "data.overlong: expected 'refuse', 'truncate', 'drop' or 'split', got 'no'."),
        (DATA + "output: ", "output: expected a path, got null."),
        (DATA + "output: 3", "output: expected a path, got 3."),
        (DATA + "output: ''", "output: expected a path, got ''."),
        (DATA + "method: {targets: []}", "method.targets: expected a list that is not empty, got an empty list."),
        (DATA + "method: {targets: [q_proj, 3]}", "method.targets.1: expected a text, got 3."),
        # Ranges
        (DATA + "train: {epochs: -1}", "train.epochs: expected 'auto' or a number above 0, got -1."),
        (DATA + "train: {epochs: 0}", "train.epochs: expected 'auto' or a number above 0, got 0."),
        (DATA + "train: {epochs: .nan}", "train.epochs: expected 'auto' or a finite number, got nan."),
        (DATA + "train: {epochs: 1e400}", "train.epochs: expected 'auto' or a finite number, got inf."),
        (DATA + "train: {lr: -1}", "train.lr: expected 'auto' or a number above 0, got -1."),
        (
            DATA + "train: {warmup: 1.0}",
            "train.warmup: expected a fraction of the steps (below 1) or a whole number of them, got 1.0 (write 1 for one step).",
        ),
        (
            DATA + "train: {warmup: 100.0}",
            "train.warmup: expected a fraction of the steps (below 1) or a whole number of them, got 100.0 (write 100 for so many steps).",
        ),
        (
            DATA + "train: {warmup: 2.5}",
            "train.warmup: expected a fraction of the steps (below 1) or a whole number of them, got 2.5.",
        ),
        (DATA + "train: {warmup: -0.1}", "train.warmup: expected a fraction of the steps (below 1) or a whole number of them, got -0.1."),
        (
            DATA + "train: {floor: 0.1, schedule: constant}",
            "train: floor: constant does not decay to an end. It is read with cosine, linear, wsd.",
        ),
        (DATA + "train: {decay: 0.1}", "train: decay: it is read with schedule: wsd alone, and cosine decays from the warm-up on."),
        (
            DATA + "train: {schedule: inverse_sqrt, warmup: 0}",
            "train: schedule: inverse_sqrt decays in proportion to the length of the warm-up, so warmup must not be 0.",
        ),
        (DATA + "train: {min_improvement: 0.1}", "train: min_improvement: it is read with patience alone."),
        (
            "data: {train: x.jsonl, eval: 0}\ntrain: {patience: 2}",
            "train.patience: it waits for the validation loss to improve, and data.eval: 0 holds out no examples.",
        ),
        (DATA + "resume: 0", "resume: expected 'auto' or 'never' or a number of at least 1, got 0."),
        (DATA + "train: {clip: 0}", "train.clip: expected a number above 0, got 0."),
        (DATA + "train: {rows_per_step: 0}", "train.rows_per_step: expected a number of at least 1, got 0."),
        (DATA + "train: {seed: -1}", "train.seed: expected a number of at least 0, got -1."),
        (DATA + f"train: {{seed: {2**32}}}", "train.seed: expected a number below 4294967296, got 4294967296."),
        (DATA + "method: {rank: 0}", "method.rank: expected a number of at least 1, got 0."),
        (DATA + "method: {alpha: 0}", "method.alpha: expected a number above 0, got 0."),
        (DATA + "method: {dropout: 1}", "method.dropout: expected a number below 1, got 1."),
        ("data: {train: a, max_length: 1}", "data.max_length: expected a number of at least 2, got 1."),
        # The members of a family
        (DATA + "method: lroa", "method.name: no such choice: 'lroa'. Did you mean 'lora'?"),
        (DATA + "method: {name: lroa, rank: 2}", "method.name: no such choice: 'lroa'. Did you mean 'lora'?"),
        (DATA + "method: {name: 3}", f"method.name: no such choice: 3. Known: {', '.join(Method.names())}."),
        (DATA + "method: null", f"method: expected one of {', '.join(Method.names())}, or a mapping with a name, got null."),
        (DATA + "method: xyzzy", f"method.name: no such choice: 'xyzzy'. Known: {', '.join(Method.names())}."),
        (DATA + "objective: xyzzy", f"objective.name: no such choice: 'xyzzy'. Known: {', '.join(Objective.names())}."),
        (DATA + "method: _base", f"method.name: no such choice: '_base'. Known: {', '.join(Method.names())}."),
        # Two keys that contradict each other
        (DATA + "train: {rows_per_step: 4, tokens_per_step: 5}",
         "train: rows_per_step and tokens_per_step both set the effective batch size: give one of them."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_path(text, message):
    assert refusal(text) == f"r.yaml: {message}"


def test_all_problems_are_listed_each_once():
    text = "data: {train: a, bad_rows: x, max_length: '3', overlong: f}\ntrain: {epochs: 0, lr: 0, clip: 0}"
    assert refusal(text) == (
        "r.yaml:\n"
        "  data.max_length: expected a whole number, got '3' (a text: leave the quotes out).\n"
        "  data.overlong: expected 'refuse', 'truncate', 'drop' or 'split', got 'f'.\n"
        "  data.bad_rows: expected 'stop' or 'skip', got 'x'.\n"
        "  train.epochs: expected 'auto' or a number above 0, got 0.\n"
        "  train.lr: expected 'auto' or a number above 0, got 0.\n"
        "  train.clip: expected a number above 0, got 0."
    )


def test_a_long_value_is_cut_in_the_message():
    assert (
        refusal(DATA + f"train: {{epochs: {'x' * 500}}}")
        == f"r.yaml: train.epochs: expected 'auto' or a number, got '{'x' * 79}…."
    )


@pytest.mark.parametrize(
    "text", [DATA + "train: {epochs: &a [*a]}", DATA + "method: &a {targets: *a}", DATA + "objective: &a {b: *a}"]
)
def test_a_recipe_that_holds_itself_is_refused(text):
    assert refusal(text).startswith("r.yaml: ")


# YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", ":2: not valid YAML: the key 'a' is given twice."),
        (DATA + "train:\n  epochs: 1\n  seed: 3\n  epochs: 2\n", ":5: not valid YAML: the key 'epochs' is given twice."),
        (DATA + "train: {seed: 1,\n seed: 1}", ":3: not valid YAML: the key 'seed' is given twice."),
        ("data: {train: a\n", ":2: not valid YAML: expected ',' or '}', but got '<stream end>'."),
        ("model: x\ndata:\n\ttrain: a", ":3: not valid YAML: found character '\\t' that cannot start any token."),
        ("model: x\n model: y", ":2: not valid YAML: mapping values are not allowed here."),
        ("a: *b", ":1: not valid YAML: found undefined alias 'b'."),
        ("---\na: 1\n---\nb: 2\n", ":3: not valid YAML: expected a single document in the stream, but found another document."),
        (DATA + "? [1, 2]\n: 3", ":2: not valid YAML: a key that is not a text."),
        (DATA + "1: 2", ":2: not valid YAML: a key that is not a text."),
        (DATA + "model: a\x00b", ":2: not valid YAML: the character '\\x00' is not allowed."),
        ("data: !!python/object/apply:os.getcwd []",
         ":1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'."),
        ("data: !!timestamp x", ":1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'."),
        ("data: !!int x", ": not valid YAML: invalid literal for int() with base 10: 'x' is not what its !!tag says."),
        ("data: " + "[" * 5000, ": not valid YAML: nested too deeply."),
        ("- 1\n- 2", ": a recipe is a mapping of keys such as `model:` and `data:`, not a list."),
        ("hello", ": a recipe is a mapping of keys such as `model:` and `data:`, not 'hello'."),
        ("3", ": a recipe is a mapping of keys such as `model:` and `data:`, not 3."),
        (DATA + "<<: {output: x}", ": <<: no such key. Known: model, data, method, objective, train, devices, distributed, eval, track, start, "
         "certify, resume, output."),
    ],
)  # fmt: skip
def test_what_is_not_a_yaml_mapping_is_refused_with_its_line(text, message):
    assert refusal(text) == f"r.yaml{message}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e3", 1500.0), ("+1e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-.5e-2", -0.005), ("1e5", 1e5),
        ("010", 10), ("-7", -7), ("08", 8), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("-.inf", float("-inf")), ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("y", "y"), ("1_000", "1_000"), ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("'1e-4'", "1e-4"), ("=", "="), ("<<", "<<"),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(written, meant):
    read_back = yaml12.load(f"a: {written}", "here")["a"]
    assert read_back == meant
    assert type(read_back) is type(meant)


@pytest.mark.parametrize(
    "value",
    ["1e-4", "1e5", "no", "017", "1:30", "2024-01-01", "~", "null", "true", "", " a ", "a: b", "#5", "- a", "ä…\u2028\x85", "a\nb", "1_0",
     "x " * 200, "'\"", "*a", "&a", "!a", "%a", "@a", "=", "<<", "\ud7ff", 3, -3, 0.1, 1e-5, 1e300, 5e-324, True, None, [], {}, ["a", []]],
)  # fmt: skip
def test_what_is_dumped_is_read_back_as_the_same_by_us_and_by_readers_of_yaml_1_1(value):
    for plain in ({"a": value}, {"a": {"b": [value, value]}}):
        text = yaml12.dump(plain)
        assert yaml12.load(text, "here") == plain
        assert repr(yaml12.load(text, "here")) == repr(plain)  # 1 == 1.0 == True
        assert yaml.safe_load(text) == plain


def test_a_recipe_that_cannot_be_read_says_why():
    with pytest.raises(RecipeError) as caught:
        Recipe.read(Path("nope.yaml"))
    assert str(caught.value) == f"nope.yaml: no such recipe (looked in {Path.cwd()})."
    with pytest.raises(RecipeError) as caught:
        Recipe.read(Path.cwd())
    assert str(caught.value) == f"{Path.cwd()}: cannot be read as a recipe: Is a directory."
    Path("r.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RecipeError) as caught:
        Recipe.read(Path("r.yaml"))
    assert str(caught.value) == "r.yaml: not a recipe: byte 7 is not UTF-8 text."


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + DATA.encode())
    assert Recipe.read(Path("r.yaml")).data.train == ("a.jsonl",)


# Words on the command line


def test_words_lie_over_the_recipe():
    found = recipe(
        "model: somewhere\nmethod: lora\ntrain: {epochs: 3}\n" + DATA,
        "model.device=cpu", "method.rank=8", "train.lr=1e-4", "data.eval=held.jsonl", "data.columns.prompt=q", "output=runs/x",
        "method.targets=[q_proj, v_proj]", "method.rank=9", "train.clip=null",
    )  # fmt: skip
    assert found.model == ModelConfig(name="somewhere", device="cpu")
    assert found.method == LoRA(rank=9, targets=("q_proj", "v_proj"))
    assert found.train == TrainConfig(epochs=3, lr=1e-4, clip=None)
    assert found.data == DataConfig(train="a.jsonl", eval="held.jsonl", columns={"prompt": "q"})
    assert found.output == Path("runs/x")


def test_a_word_can_replace_a_short_form_and_a_whole_section():
    assert recipe(DATA, "model=other").model.name == "other"
    assert recipe("model: {name: x, device: cpu}\n" + DATA, "model=other").model == ModelConfig(name="other")
    assert recipe("", "data.train=b.jsonl").data.train == ("b.jsonl",)
    assert recipe(DATA, "method={name: lora, rank: 3}", "method.alpha=5").method == LoRA(rank=3, alpha=5.0)
    assert recipe(DATA, "output=a=b").output == Path("a=b")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr", "'train.lr': expected section.key=value, for example train.lr=1e-4."),
        ("=3", "'=3': expected section.key=value, for example train.lr=1e-4."),
        ("train..lr=3", "'train..lr=3': expected section.key=value, for example train.lr=1e-4."),
        ("train.=3", "'train.=3': expected section.key=value, for example train.lr=1e-4."),
        (".lr=3", "'.lr=3': expected section.key=value, for example train.lr=1e-4."),
        ("", "'': expected section.key=value, for example train.lr=1e-4."),
        (
            "method.targets=[qv]_proj",
            "'method.targets=[qv]_proj': not valid YAML: expected '<document start>', but found '<scalar>'. "
            """If it is meant as a text, quote it twice: "method.targets='[qv]_proj'\"""",
        ),
        (
            "train.lr={a: 1, a: 2}",
            "'train.lr={a: 1, a: 2}': not valid YAML: the key 'a' is given twice. "
            """If it is meant as a text, quote it twice: "train.lr='{a: 1, a: 2}'\"""",
        ),
        ("output.x=3", "'output.x=3': output is 3 in the recipe, so it has no keys."),
        ("train.lrr=3", "r.yaml: train.lrr: no such key. Did you mean 'lr'?"),
        ("train.lr=fast", "r.yaml: train.lr: expected 'auto' or a number, got 'fast'."),
        ("data=b", "r.yaml: data: expected a mapping with keys such as train, got 'b'."),
        ("data.train.x=3", "r.yaml: data.train: it is 'a.jsonl' in the recipe, which has no name: give every source one."),
        ("trian.lr=3", "r.yaml: trian: no such key. Did you mean 'train'?"),
        ("output=", "r.yaml: output: expected a path, got null."),
    ],
)
def test_a_word_that_says_nothing_is_refused(word, message):
    assert refusal(DATA + "output: 3" if word == "output.x=3" else DATA, word) == message


# The short forms, and Python


def test_a_name_is_short_for_a_mapping_with_a_name():
    assert recipe("model: m\nmethod: lora\nobjective: sft\n" + DATA) == recipe(
        "model: {name: m}\nmethod: {name: lora}\nobjective: {name: sft}\n" + DATA
    )
    assert recipe("method: {rank: 3}\n" + DATA).method == LoRA(rank=3)
    assert recipe("data: {train: a}").data == DataConfig(train=("a",)) == DataConfig(train=["a"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), "rank: expected a number of at least 1, got 0."),
        (lambda: LoRA(rank="8"), "rank: expected a whole number, got '8' (a text: leave the quotes out)."),
        (lambda: LoRA(rank=True), "rank: expected a whole number, got true."),
        (lambda: LoRA(rnak=8), "rnak: no such key. Did you mean 'rank'?"),
        (lambda: LoRA(rank=0, alpha=0.0), "  rank: expected a number of at least 1, got 0.\n  alpha: expected a number above 0, got 0.0."),
        (lambda: TrainConfig(rows_per_step=4, tokens_per_step=5),
         "rows_per_step and tokens_per_step both set the effective batch size: give one of them."),
        (lambda: TrainConfig(lr=-1.0), "lr: expected 'auto' or a number above 0, got -1.0."),
        (lambda: ModelConfig(), "name: missing, and it has no default."),
        (lambda: Recipe(data={"train": "a"}, train={"epochs": 0}), "train.epochs: expected 'auto' or a number above 0, got 0."),
        (lambda: Recipe(data=3), "data: expected a mapping with keys such as train, got 3."),
        (lambda: Recipe.parse({"data": {"train": "a"}, "method": "lroa"}), "method.name: no such choice: 'lroa'. Did you mean 'lora'?"),
        (lambda: Recipe.parse(3), "expected a mapping with keys such as model, got 3."),
        (lambda: LoRA.parse({"rank": 1.5}), "rank: expected a whole number, got 1.5."),
        (lambda: Method.member("lroa"), "no such choice: 'lroa'. Did you mean 'lora'?"),
    ],
)  # fmt: skip
def test_python_raises_the_same_error(make, message):
    with pytest.raises(RecipeError) as caught:
        make()
    assert str(caught.value) == message


def test_a_config_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        LoRA().rank = 3


def test_every_file_of_a_family_is_a_member_that_says_its_name():
    for family in (Method, Objective, UpdateRule):
        folder = Path(__import__(family.family, fromlist=["_"]).__file__).parent
        assert family.names() == sorted(path.stem for path in folder.glob("[!_]*.py"))
        assert family.default in family.names()
        for name in family.names():
            needed = NEEDED.get(name, {})
            assert family.member(name)(**needed).name == name
            assert family.pick({"name": name, **needed}) == family.member(name)(**needed)
            assert needed or family.pick(name) == family.member(name)()


# Every key


def parts(kind=Recipe, path=""):
    """Every config class in a recipe, members of families among them, with a path that it can stand at."""
    yield kind, path
    for name, field in kind.model_fields.items():
        for inner in configs(field.annotation):
            members = [inner.member(n) for n in inner.names()] if issubclass(inner, Choice) else [inner]
            for member in members:
                yield from parts(member, f"{path}.{name}".strip("."))


def configs(annotation):
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in get_args(annotation):
        yield from configs(inner)


KEYS = [(kind, path, key) for kind, path in parts() for key in kind.model_fields]
NAMES = [f"{path}.{kind.__name__}.{key}" if path else key for kind, path, key in KEYS]


def test_the_walk_reaches_every_kind_of_config():
    assert {ModelConfig, DataConfig, TrainConfig, LoRA, Recipe} <= {kind for kind, _, _ in KEYS}
    assert len(KEYS) >= 30
    assert not any(issubclass(kind, BaseModel) and not issubclass(kind, Config) for kind, _, _ in KEYS)


@pytest.mark.parametrize(("kind", "path", "key"), KEYS, ids=NAMES)
def test_every_key_says_what_it_is_for(kind, path, key):
    """The text under it in the source, which is what the page of recipe keys is made of."""
    description = kind.model_fields[key].description
    assert description
    assert description[-1] in ".`", description
    assert description[0].isupper() or not description[0].isalpha() or description.split()[0].rstrip("'s") in ("lr", "AdamW")


CANDIDATES = [
    1, 2, 3, 64, 100, 0.5, 0.25, 1e-5, 3.0, "cpu", "no", "1e5", ["q_proj"], ["a: b", "#c"], {"prompt": "1e5"}, {"q": "x"},
    {"q_proj": 3}, [0.5, 0.25], "adafactor", True, False, None, "Say {q}: {{}}", ["rouge"], "/abs/scores.py:length",
]  # fmt: skip


TOGETHER = {
    (TrainConfig, "deterministic"): {"pack_tokens": 64, "recompute": "none"},
    (TrainConfig, "decay"): {"schedule": "wsd"},
    (TrainConfig, "min_improvement"): {"patience": 2},
    (EvalConfig, "top_p"): {"temperature": 0.7},
    (EvalConfig, "top_k"): {"temperature": 0.7},
}
"""What else a key's other value asks for."""


def others(kind, key):
    """Values for a key that it takes and that are not its default: found by trying, so that a new key needs no list."""
    required = {name: "x" for name, field in kind.model_fields.items() if field.is_required() and field.annotation is not None}
    required |= {name: value for name, value in NEEDED.get(_member(kind), {}).items() if name != key}
    required |= TOGETHER.get((kind, key), {})
    default = {} if key in required else {key: kind.model_fields[key].get_default(call_default_factory=True)}
    for candidate in [*CANDIDATES, *literals(kind.model_fields[key].annotation)]:
        try:
            made = kind.model_validate({**required, key: candidate})
        except ValidationError:
            continue
        if default != {key: getattr(made, key)}:
            yield candidate


def _member(kind):
    return kind.__module__.rpartition(".")[2]


def literals(annotation):
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for inner in get_args(annotation):
            yield from literals(inner)


OF_LISTS = (Recipe, Source, Metric, Tracker)
"""Configs that have no section of their own; each is tried by itself."""


@pytest.mark.parametrize(
    ("kind", "path", "key"),
    [k for k in KEYS if not issubclass(k[0], OF_LISTS)],
    ids=[n for k, n in zip(KEYS, NAMES, strict=True) if not issubclass(k[0], OF_LISTS)],
)
def test_every_key_survives_the_round_trip_with_each_value_it_takes(kind, path, key):
    tried = list(others(kind, key))
    assert tried, f"no other value found for {path}.{key}: add one to CANDIDATES"
    for value in tried:
        section = {name: "x" for name, field in kind.model_fields.items() if field.is_required()} | {key: value}
        section |= TOGETHER.get((kind, key), {})
        if issubclass(kind, Choice):
            section = NEEDED.get(_member(kind), {}) | section | {kind.key: _member(kind)}
        for outer in reversed(path.split(".")):
            section = {outer: section}
        made = Recipe.parse({"data": {"train": "a.jsonl"}, "output": "/abs/run"} | section)
        assert_survives(made)
        again, part = recipe(made.to_yaml()), attrgetter(path)
        assert getattr(part(again), key) == getattr(part(made), key)
        assert getattr(part(again), key) != getattr(part(Recipe.parse({"data": {"train": "other.jsonl"}})), key, ...)


@pytest.mark.parametrize("name", Tracker.names())
def test_a_tracker_survives_the_round_trip_with_every_key(name):
    kind = Tracker.member(name)
    whole = {key: next(others(kind, key)) for key in kind.model_fields}
    made = Recipe.parse({"data": {"train": "a.jsonl"}, "track": [{"name": name, **whole}], "output": "/abs/run"})
    assert_survives(made)
    assert made.track[0].model_dump() == {"name": name, **whole} != kind().model_dump()
    assert recipe("data: {train: a.jsonl}", f"track={name}").track == (kind(),)


def test_a_source_survives_the_round_trip_with_every_key():
    whole = {
        "path": "org/name", "subset": "a", "split": "test", "revision": "v1", "weight": 2.0, "limit": 3, "columns": {"messages": "q"},
        "prompt": "Say {q}", "completion": "{a}",
    }  # fmt: skip
    assert whole.keys() == Source.model_fields.keys()
    held = {"b": {key: value for key, value in whole.items() if key != "weight"}}
    made = Recipe.parse({"data": {"train": {"a": whole}, "eval": held}, "output": "/abs/run"})
    assert_survives(made)
    assert made.data.train["a"].model_dump() == whole
    named = recipe("data: {train: {a: x.jsonl, b: y.jsonl}}", "data.train.a.weight=2", "data.train.b.weight=1").data.train
    assert named == {"a": Source(path="x.jsonl", weight=2.0), "b": Source(path="y.jsonl", weight=1.0)}
    assert_survives(Recipe.parse({"data": {"train": {"a": "x.jsonl", "b-2": "y.jsonl"}}, "output": "/abs/run"}))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{}", "train: an empty mapping names no source."),
        ("{path: a}", "train.path: path is a key of a source, and sources have names here: write {NAME: {path: …}}."),
        ("{a.b: x}", "train.a.b: expected a name of letters, digits, - and _ that begins with a letter, got 'a.b'."),
        ("{a: 3}", "train.a: expected a mapping with keys such as path, got 3."),
        ("{a: {split: b}}", "train.a.path: missing, and it has no default."),
        ("{a: {path: x, wieght: 2}}", "train.a.wieght: no such key. Did you mean 'weight'?"),
        ("{a: {path: x, weight: 0}}", "train.a.weight: expected a number above 0, got 0."),
        ("{a: {path: x, weight: -1}}", "train.a.weight: expected a number above 0, got -1."),
        ("{a: {path: x, limit: 0}}", "train.a.limit: expected a number of at least 1, got 0."),
        ("{a: {path: x, weight: 1}, b: y}", "train: a has a weight, and b has none: give one to every source, or to none."),
        ("a, eval: {b: {path: y, weight: 1}}", "eval: weight: validation examples are all evaluated, once. Leave it out."),
        ("a, eval: {b: {path: y, limit: x}}", "eval.b.limit: expected a whole number, got 'x'."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_source_is_named_by_its_path(train, message):
    assert refusal(f"data: {{train: {train}}}") == f"r.yaml: data.{message}"


def assert_survives(made):
    text = made.to_yaml()
    again = recipe(text)
    assert again == made
    assert repr(again) == repr(made)
    assert again.to_yaml() == text


def test_the_recipe_with_every_default_survives_and_says_every_key():
    made = Recipe.parse({"data": {"train": "a.jsonl"}, "output": "/abs/run"})
    assert_survives(made)
    written: Any = yaml.safe_load(made.to_yaml())
    assert list(written) == list(Recipe.model_fields)
    for key in ("model", "data", "train"):
        assert list(written[key]) == list(type(getattr(made, key)).model_fields)
    assert list(written["method"]) == ["name", *LoRA.model_fields]


def test_local_paths_become_absolute_and_names_stay(monkeypatch):
    Path("model").mkdir()
    for name in ("a.jsonl", "b.jsonl", "held.jsonl"):
        Path(name).touch()
    here = Path.cwd()
    made = recipe("model: model\ndata: {train: [a.jsonl, ./b.jsonl, org/set], eval: held.jsonl}\noutput: runs/x")
    absolute = made.absolute()
    assert absolute.model.name == f"{here}/model"
    assert absolute.data.train == (f"{here}/a.jsonl", f"{here}/b.jsonl", "org/set")
    assert absolute.data.eval == f"{here}/held.jsonl"
    assert absolute.output == here / "runs" / "x"
    text = made.to_yaml()
    assert recipe(text) == absolute
    monkeypatch.chdir("/")
    assert Recipe.parse(yaml.safe_load(text)).to_yaml() == text  # the same from anywhere


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("m").mkdir()
    made = recipe("model: ~/m\noutput: ~/runs/x\n" + DATA)
    assert made.output == Path.cwd() / "runs" / "x"
    assert made.absolute().model.name == str(Path.cwd() / "m")
    assert recipe("output: ~nobody-of-this-name/x\n" + DATA).output == Path("~nobody-of-this-name/x")


class Odd(Config):
    """A part with keys of kinds that no recipe has yet: their messages must read well before they are needed."""

    flag: bool = False
    several: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] = (1, 2)
    either: bool | Annotated[float, Field(lt=0.5)] = False


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"flag": "yes"}, "flag: expected true or false, got 'yes'."),
        ({"flag": 1}, "flag: expected true or false, got 1."),
        ({"several": (1, 0)}, "several.1: expected a number of at least 1, got 0."),
        ({"either": 3}, "either: expected true or false or a number below 0.5, got 3."),
    ],
)
def test_other_kinds_of_keys_are_explained_too(raw, message):
    with pytest.raises(RecipeError) as caught:
        Odd.parse(raw)
    assert str(caught.value) == message
