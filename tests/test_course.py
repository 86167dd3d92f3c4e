"""What a course on fine-tuning with adapters goes through, step by step: examples/0*.py, docs/course.md and the notebook."""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from families import tiny
from worlds import WHOLE

import trimtab as package
from trimtab import cli
from trimtab.core.errors import UnsupportedModel
from trimtab.methods import Method

pytestmark = pytest.mark.usefixtures("one_thread")

# How many parameters are trained, from a configuration alone

QWEN25_1_5B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
"""Qwen2.5-1.5B: 12 heads of 128 for queries, and 2 for keys and values."""
LORA = ("method.rank=8", "method.alpha=32", "method.dropout=0.1", "method.targets=[q_proj, v_proj]")


@pytest.fixture
def qwen(tmp_path):
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN25_1_5B))
    return str(tmp_path / "qwen")


def methods(capsys, *words):
    assert cli.main(["methods", *words]) == 0
    return capsys.readouterr().out


def test_qwens_loras_parameters_follow_from_its_configuration_alone(qwen, capsys):
    q, v = 8 * (1536 + 1536), 8 * (1536 + 2 * 128)
    assert 28 * (q + v) == 1_089_536
    facts = json.loads(methods(capsys, qwen, *LORA, "--json"))
    assert (facts["parameters"], facts["base_parameters"]) == (1_089_536, 1_543_714_304)
    assert facts["trainable"] == "trainable params: 1,089,536 || all params: 1,544,803,840 || trainable%: 0.0705"
    assert [
        (one["modules"], one["count"], one["shape"], one["formula"], one["each"], one["sum"]) for one in facts["derivation"]
    ] == [
        ("model.layers.[0-27].self_attn.q_proj", 28, [1536, 1536], "8·(1,536 + 1,536)", q, "28 · 24,576 = 688,128"),
        ("model.layers.[0-27].self_attn.v_proj", 28, [1536, 256], "8·(1,536 + 256)", v, "28 · 14,336 = 401,408"),
    ]
    page = methods(capsys, qwen, *LORA)
    assert "A 8×1536, B 256×8: 8·(1,536 + 256) = 14,336" in page
    assert page.rstrip().endswith("688,128 + 401,408 = 1,089,536")
    assert max(map(len, page.splitlines()[1:])) <= 82
    square = json.loads(methods(capsys, qwen, *LORA, "method.targets=[q_proj, o_proj]", "--json"))
    assert square["parameters"] == 28 * 2 * q == 1_376_256, "what the formula for square matrices gives"
    with pytest.raises(UnsupportedModel, match=r"holds no \*\.safetensors"):
        package.load(qwen)


@pytest.mark.parametrize("name", ["bottleneck", "prefix", "ptuning_v2", "tokens", "bitfit", "full"])
def test_every_derivation_adds_up(name, qwen, capsys):
    facts = json.loads(
        methods(capsys, qwen, f"method={name}", *(["method.tokens=[3, 5]"] if name == "tokens" else []), "--json")
    )
    assert sum(one["parameters"] for one in facts["derivation"]) == facts["parameters"] > 0
    for one in facts["derivation"]:
        total = sum(torch.Size(shape).numel() for shape in one["tensors"].values())
        assert one["each"] == total
        assert eval(one["formula"].replace(",", "").replace("·", "*")) == total  # noqa: S307
        assert one["parameters"] == one["count"] * total or one["sum"] == f"{one['parameters']:,} shared"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_says_what_it_replaced_and_pefts_line():
    peft = pytest.importorskip("peft")
    model = tiny("qwen2")
    adapter = package.attach(model, package.LoRA(rank=4, targets=["q_proj", "v_proj"]))
    theirs = peft.get_peft_model(
        tiny("qwen2"), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    trained, total = theirs.get_nb_trainable_parameters()
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"
    assert adapter.trainable_parameters() == line
    assert str(adapter).splitlines() == [
        "model.layers.[0-1].self_attn.q_proj: 2 × Linear 32→32, 4·(32 + 32) each: 2 · 256 = 512",
        "model.layers.[0-1].self_attn.v_proj: 2 × Linear 32→16, 4·(32 + 16) each: 2 · 192 = 384",
        line,
    ]
    package.attach(model, Method.member("bottleneck")(), name="other")
    assert int(re.search(r"all params: ([\d,]+)", adapter.trainable_parameters())[1].replace(",", "")) > total
    assert isinstance(model, transformers.PreTrainedModel)


# The steps

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
PAGE = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
LINE = 'MODEL = "smollm2-135m-instruct"'


def small_model(tokenizer, folder):
    """A random Llama with SmolLM2's tokenizer: the steps run on it by changing one line, and print what they print for SmolLM2."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def printed(tmp_path_factory, request):
    """What each step prints, two training steps long: on a tiny model; of `make whole`, on SmolLM2 as it stands."""
    pytest.importorskip("trl")
    work, before = tmp_path_factory.mktemp("course"), Path.cwd()
    model = None if WHOLE else small_model(request.getfixturevalue("smollm2").tokenizer, work / "tiny")
    (work / "demo").symlink_to(ROOT / "demo")
    (work / "steps").mkdir()
    os.environ["COURSE_STEPS"] = "2"
    os.chdir(work)
    said = {}
    try:
        for script in SCRIPTS:
            text = script.read_text(encoding="utf-8")
            assert text.count(LINE) == 1, "one line names the model"
            copy = work / "steps" / script.name
            copy.write_text(text if model is None else text.replace(LINE, f"MODEL = {model!r}"), encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(copy), run_name="__main__")
            said[script.stem] = out.getvalue()
        yield said
    finally:
        os.chdir(before)
        del os.environ["COURSE_STEPS"]


def of_page(stem):
    """What docs/course.md shows of a step's output."""
    return re.search(rf"examples/{stem}\.py\).*?```text\n(.*?)```", PAGE, flags=re.DOTALL)[1].splitlines()


ANSWERS = r"^(Before training|base|adapter|switched off|sampled|orders|prefix|in one batch, \w+|mixed: rank \d+, error \S+): .*"


def without_numbers(line):
    """A line without what another model, or another processor's rounding, says otherwise: numbers, and what a model answers."""
    line = re.sub(r"^\S+: ([\d,]+ parameters)", r"MODEL: \1", re.sub(ANSWERS, r"\1:", line))
    line = re.sub(r" *[\d,.]*\d(e[-+]?\d+)?", "#", line)
    return re.sub(r"(step-#)(, step-#)+", r"\1", line)  # how many checkpoints are kept follows from the number of steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stem", [script.stem for script in SCRIPTS])
def test_each_step_prints_the_lines_that_the_page_shows_and_no_others(stem, printed):
    said, sampled, _ = printed[stem].partition("\nsampled: ")  # the last line of its step, in which a model may begin new ones
    assert {without_numbers(line) for line in of_page(stem)} == {
        without_numbers(line) for line in (said + sampled).splitlines()
    }
    if WHOLE and stem == "01_load_and_count":
        assert [line for line in of_page(stem) if not re.match(ANSWERS, line)] == [
            line for line in said.splitlines() if not re.match(ANSWERS, line)
        ]


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_depend_on_the_model_is_shown_to_the_letter(printed):
    assert of_page("02_data") == printed["02_data"].splitlines(), "the tokenizer is SmolLM2's"
    for stem, words in (
        ("04_resume", "the resumed adapter is that of a run without interruption: True"),
        ("08_switch_and_mix", "all off; the base is unchanged"),
        ("09_merge", "unmerged, the logits are what they were: True"),
    ):
        assert words in printed[stem].splitlines()
        assert words in of_page(stem)
    assert re.findall(r"second model: (\w+)", printed["10_in_their_trainers"]) == ["None"] * 3


def test_the_page_counts_smollm2s_parameters_as_its_configuration_does(capsys):
    words = {"lora": LORA, "bottleneck": ("method.reduction=16",), "prefix": ("method.tokens=20",)}
    for name, keys in words.items():
        facts = json.loads(methods(capsys, "smollm2-135m-instruct", f"method={name}", *keys, "--json"))
        assert facts["trainable"] in of_page("01_load_and_count")


def test_the_page_shows_qwens_derivation_to_the_letter(qwen, capsys, monkeypatch):
    monkeypatch.chdir(Path(qwen).parent)
    Path(qwen).rename("qwen2.5-1.5b")
    command, shown = re.search(r"```\n\$ trimtab methods (.*?)\n(.*?)```", PAGE, flags=re.DOTALL).groups()
    assert [line.rstrip() for line in methods(capsys, *shlex.split(command)).splitlines()] == shown.splitlines()


def test_the_page_shows_a_model_that_has_learned():
    lines = dict.fromkeys(of_page("05_chat"))
    expected = [line.removeprefix("expected: ") for line in lines if line.startswith("expected: ")]
    answered = [line.removeprefix("adapter:  ") for line in lines if line.startswith("adapter: ")]
    assert len(expected) == len(answered) == 3
    assert sum(one == other for one, other in zip(answered, expected, strict=True)) >= 2
    right, asked = map(int, re.search(r"^right: (\d+) of (\d+)$", "\n".join(lines), flags=re.MULTILINE).groups())
    assert right >= 0.8 * asked
    assert f"base:    {expected[0]}" not in lines


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_step_is_short_and_on_the_page(script):
    text = script.read_text(encoding="utf-8")
    assert text.count("\n") <= 60
    assert f"examples/{script.name})" in PAGE


def module_of(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_pages_outputs_are_written_by_a_script(tmp_path, monkeypatch):
    make = module_of("make_course")
    (tmp_path / "runs" / "course" / "of an earlier run").mkdir(parents=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, path in (
        ("ROOT", tmp_path),
        ("PAGE", tmp_path / "page.md"),
        ("SECONDS", tmp_path / "runs" / "course" / "s.json"),
    ):
        monkeypatch.setattr(make, name, path)
    monkeypatch.setattr(make, "computed", iter(range(0, 6000, 60)).__next__)  # a minute each
    monkeypatch.setattr(make, "printed", lambda script: "\n".join(of_page(script.stem)))
    make.PAGE.write_text(PAGE, encoding="utf-8")
    make.main([])
    assert [path.name for path in make.SECONDS.parent.iterdir()] == ["s.json"]
    same = re.sub(make.TOOK, "They took 10 minutes of a core's time", PAGE)
    assert make.PAGE.read_text(encoding="utf-8") == same
    monkeypatch.setattr(make, "printed", lambda script: r"another \1")
    make.main(["04"])
    assert make.PAGE.read_text(encoding="utf-8") == same.replace("\n".join(of_page("04_resume")), r"another \1")
    make.PAGE.write_text(PAGE.replace("04_resume.py)", "4"), encoding="utf-8")
    with pytest.raises(SystemExit, match="nothing matches"):
        make.main(["04"])


def test_the_notebook_is_the_scripts():
    module = module_of("make_notebook")
    text = module.NOTEBOOK.read_text(encoding="utf-8")
    assert text == module.notebook(), "run: make docs"
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    codes = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(codes) == len(SCRIPTS)
    for cell, script in zip(codes, SCRIPTS, strict=True):
        assert cell.source.strip() in script.read_text(encoding="utf-8")
        assert not cell.outputs
