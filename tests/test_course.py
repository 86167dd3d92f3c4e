"""What a course on fine-tuning with adapters goes through, step by step: examples/0*.py, docs/course.md and the notebook."""

import json
import re

import pytest
import torch
import transformers
from families import tiny

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
