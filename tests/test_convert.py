"""Files of Axolotl, LLaMA-Factory, ms-swift, Unsloth and TRL become recipes that mean the same, and every setting is accounted for."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from templates import saved_base

from trimtab import cli
from trimtab.base import Base
from trimtab.commands import convert as command
from trimtab.core.errors import RecipeError
from trimtab.core.synonyms import meaning_of
from trimtab.data import DataConfig, load_data
from trimtab.methods import Method, attach
from trimtab.migrate import TOOLS, account, convert, options_of
from trimtab.migrate._settings import Settings
from trimtab.run.recipe import Recipe

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "other_tools"
EXAMPLES = {
    (tool, name): settings
    for tool in ("llamafactory", "axolotl", "swift", "unsloth")
    for name, settings in yaml.safe_load((FIXTURES / f"{tool}.yaml").read_text(encoding="utf-8")).items()
}
"""Twenty recipes of the first two, by the names of the files in their folders `examples`, and five of each other: settings as facts."""
REFUSED = {
    ("llamafactory", "train_lora/qwen3_lora_reward"): "stage: rm: Trimtab trains models that answer",
    ("llamafactory", "train_lora/qwen3vl_lora_sft"): "image_max_pixels: 262144: images, video and audio are not supported",
    ("llamafactory", "extras/llama_pro/llama3_freeze_sft"): "finetuning_type: freeze: blocks are not unfrozen by number",
    ("llamafactory", "extras/nlg_eval/llama3_lora_predict"): "do_train: False: it does not train",
    ("axolotl", "llama-3/qlora-1b-gdpo"): "rl: gdpo: Trimtab trains on existing examples",
    ("axolotl", "llama-2/gptq-lora"): "gptq: True: weights of GPTQ are not trained on",
    ("axolotl", "gemma3/gemma-3-4b-vision-qlora"): "processor_type: AutoProcessor: images are not supported",
    ("swift", "grpo, which is refused"): "rlhf_type: grpo: Trimtab trains on existing examples",
    ("axolotl", "qwen2/reward-model"): "reward_model: True: Trimtab trains models that answer, not ones that judge",
}
"""What can't be the same task here, and the reason that is given."""
WHOLE = os.environ.get("TRIMTAB_WHOLE") == "1"
TRAINED = [example for example in EXAMPLES if example not in REFUSED]

ANSWERS = [
    {"messages": [{"role": "user", "content": f"{n} and {n}"}, {"role": "assistant", "content": f"{2 * n}"}]} for n in range(8)
]
DATA = {
    "answers": ANSWERS,
    "text": [{"text": f"{n} and {n} make {2 * n}."} for n in range(8)],
    "pair": [{"prompt": f"{n} and {n}", "chosen": f"{2 * n}", "rejected": f"{n}"} for n in range(1, 9)],
    "judged": [{"prompt": f"{n} and {n}", "completion": f"{2 * n}", "label": n % 2 == 0} for n in range(8)],
}


def converted(folder, settings, tool=None, **more):
    file = folder / "theirs.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return convert(file, tool, **more)


@pytest.mark.parametrize("example", EXAMPLES, ids="/".join)
def test_every_setting_of_the_examples_is_accounted_for(example, tmp_path):
    if example in REFUSED:
        with pytest.raises(RecipeError, match=r"theirs\.yaml: ") as caught:
            converted(tmp_path, EXAMPLES[example])
        assert REFUSED[example] in str(caught.value)
        return
    found = converted(tmp_path, EXAMPLES[example])
    assert found.tool == {"unsloth": "trl"}.get(example[0], example[0]), "told apart by their keys"
    given = EXAMPLES[example]
    names = [name for part in given.values() for name in part] if example[0] == "unsloth" else given
    assert set(names) - {setting.name for setting in found.settings} == set()
    assert [
        setting.name for setting in found.settings if setting.outcome == "unknown" and example[0] in ("swift", "unsloth")
    ] == []
    assert Recipe.parse(yaml.safe_load(found.text)) == found.recipe
    assert all(setting.said for setting in found.settings if setting.outcome in ("derived", "missing", "unknown"))
    assert account(found.settings).count("\n") > 10


def test_a_setting_that_nobody_knows_is_named(tmp_path):
    found = converted(tmp_path, {**EXAMPLES["axolotl", "llama-3/lora-1b"], "lora_rr": 3, "wandb_watch": "all"})
    by_name = {setting.name: setting for setting in found.settings}
    assert (by_name["lora_rr"].outcome, by_name["lora_rr"].said) == ("unknown", "did you mean lora_r?")
    assert by_name["wandb_watch"].outcome == "missing"
    assert by_name["wandb_entity"].outcome == "unset"


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (("axolotl", "llama-3/lora-1b"), {
            "model.name": "NousResearch/Llama-3.2-1B", "data.overlong": "drop", "data.eval": 0.1, "method.rank": 16, "method.alpha": 32.0,
            "train.tokens_per_step": 2 * 2 * 2048, "train.lr": 2e-4, "train.warmup": 0.1, "train.epochs": 1.0, "train.rows_per_step": None,
        }),
        (("axolotl", "qwen2/dpo"), {
            "data.train.alpaca_messages_2k_dpo_test.columns": {"messages": "conversation"}, "train.rows_per_step": 8, "method.name": "full",
            "objective.name": "dpo", "objective.beta": 0.1, "data.eval": 0,
        }),
        (("axolotl", "llama-3/qlora-1b-kto"), {
            "model.quantize": "nf4", "objective.name": "kto", "objective.beta": 0.5, "objective.desirable": 0.2, "method.dropout": 0.0,
        }),
        (("axolotl", "mistral/orpo/mistral-qlora-orpo"), {
            "objective.name": "orpo", "objective.weight": 0.1, "data.train.ultrafeedback_binarized_preferences_cleaned.columns": {
                "prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response",
            },
        }),
        (("llamafactory", "train_lora/qwen3_lora_sft"), {
            "method.rank": 8, "method.alpha": 16.0, "method.targets": ["all-linear"], "train.rows_per_step": 8, "data.max_length": 2048,
            "data.overlong": "truncate", "data.train.identity.limit": 1000, "train.warmup": 0.1, "data.eval": 0, "model.dtype": "bfloat16",
        }),
        (("llamafactory", "train_lora/qwen3_lora_pretrain"), {"data.overlong": "split", "train.tokens_per_step": 8 * 2048}),
        (("llamafactory", "extras/pissa/llama3_lora_sft"), {"method.init": "pissa"}),
        (("llamafactory", "extras/loraplus/llama3_lora_sft"), {"method.b_rate": 16.0}),
        (("llamafactory", "extras/oft/llama3_oft_sft"), {"method.name": "oft", "method.block_size": 32}),
        (("llamafactory", "train_qlora/qwen3_lora_sft_otfq"), {"model.quantize": "nf4"}),
        (("swift", "lora sft"), {
            "model.name": "Qwen/Qwen2.5-7B-Instruct", "model.dtype": "bfloat16", "method.rank": 8, "method.alpha": 32.0, "method.dropout": 0.05,
            "method.targets": ["all-linear"], "train.rows_per_step": 16, "train.lr": 1e-4, "train.warmup": 0.05, "train.evaluate_every": 50,
            "train.keep": 2, "train.schedule": "cosine", "train.weight_decay": 0.1, "data.overlong": "drop", "data.max_length": 2048,
            "data.system": "You are a helpful assistant.", "data.train.self_cognition.limit": 500, "data.eval": 0,
        }),
        (("swift", "qlora of a local file, older names"), {
            "model.quantize": "nf4", "data.train": ["train.jsonl"], "data.eval": "dev.jsonl", "method.targets": [".*(q_proj|v_proj)"],
            "data.columns": {"prompt": "question", "completion": "answer"}, "data.overlong": "truncate", "method.b_rate": 16.0,
            "train.tokens_per_step": 2 * 4 * 4096, "train.patience": 3, "method.rank_stabilized": True, "train.lr": 1e-4, "train.epochs": 3.0,
        }),
        (("swift", "full, last answers"), {
            "method.name": "full", "data.train.talk.subset": "en", "data.train.talk.limit": 2000, "data.train_on": "last", "data.eval": 0.01,
            "train.floor": 0.5, "train.rows_per_step": 16, "train.max_steps": 200, "train.optimizer.betas": [0.9, 0.95],
        }),
        (("swift", "pretraining"), {"data.overlong": "split", "data.train_on": "everything", "train.tokens_per_step": 16 * 1024}),
        (("swift", "dpo"), {"objective.name": "dpo", "objective.beta": 0.1, "objective.sft": 0.1, "method.dropout": 0.0}),
        (("unsloth", "llama sft"), {
            "model.name": "unsloth/Llama-3.2-1B-Instruct", "model.quantize": "nf4", "method.rank": 16, "method.alpha": 16.0, "train.seed": 3407,
            "data.max_length": 2048, "train.optimizer.name": "adamw_8bit", "train.rows_per_step": 8, "train.max_steps": 60, "train.lr": 2e-4,
        }),
        (("unsloth", "defaults"), {
            "model.quantize": "nf4", "data.max_length": 2048, "method.rank": 32, "method.dropout": 0.0,
            "method.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }),
        (("unsloth", "sixteen bits, packed"), {
            "model.quantize": "none", "data.max_length": 512, "train.tokens_per_step": 8 * 512, "train.seed": 11, "train.neftune": 5.0,
        }),
        (("unsloth", "full"), {"method.name": "full", "model.quantize": "none", "train.epochs": 2.0}),
        (("unsloth", "dpo"), {"objective.name": "dpo", "model.quantize": "nf4", "train.rows_per_step": 8, "data.max_length": 4096}),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_examples_mean_the_same_here(example, expected, tmp_path):
    plain = converted(tmp_path, EXAMPLES[example]).recipe.plain()
    for key, value in expected.items():
        node = plain
        for part in key.split("."):
            node = node[part]
        assert node == value, key


@pytest.mark.parametrize("example", TRAINED if WHOLE else [*TRAINED[2:30:6], TRAINED[-8], TRAINED[-5]], ids="/".join)
def test_they_train_on_a_tiny_model(example, tmp_path, monkeypatch, capsys):
    """With the names that are not here replaced: the model, the data, its columns and limits, and what needs a GPU or hours."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    found = converted(tmp_path, EXAMPLES[example])
    kind = found.recipe.objective.data_kind
    texts = found.recipe.data.overlong == "split"
    data = tmp_path / "train.jsonl"
    rows = DATA["text" if texts else {"pairs": "pair", "judged": "judged"}.get(str(kind), "answers")]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    plain = yaml.safe_load(found.text)
    plain["model"] = {"name": str(saved_base(tmp_path / "tiny")), "dtype": "float32"}
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in ("train", "eval")}
    plain["data"] |= {"train": str(data), "eval": 0, "max_length": 64}
    plain["train"] = {key: value for key, value in plain["train"].items() if key not in FOR_HOURS}
    plain["train"] |= {"epochs": 1, "rows_per_step": 4}
    plain["method"] |= {"block_size": 16} if plain["method"]["name"] == "oft" else {}
    plain |= {"output": str(tmp_path / "run"), "certify": False}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert cli.main(["train", str(recipe)]) == 0, capsys.readouterr().err


FOR_HOURS = {"optimizer", "tokens_per_step", "max_steps", "epochs", "evaluate_every", "save_every", "keep", "warmup"}


def arguments(**more):
    return {"LoraConfig": {"r": 4, "target_modules": ["q_proj"]}, "SFTConfig": {"learning_rate": 1e-3, **more}}


def test_scripts_arguments_have_the_classes_defaults(tmp_path):
    found = converted(tmp_path, arguments()).recipe.plain()
    assert (found["method"]["alpha"], found["method"]["targets"]) == (8.0, ["q_proj"])
    assert (found["train"]["epochs"], found["train"]["rows_per_step"], found["train"]["schedule"]) == (3.0, 8, "linear")
    assert (found["data"]["max_length"], found["data"]["overlong"], found["data"]["eval"]) == (1024, "truncate", 0)
    flat = converted(
        tmp_path,
        {"r": 4, "lora_alpha": 8, "beta": 0.3, "loss_type": ["ipo"], "ld_alpha": None, "f_divergence_type": "reverse_kl"},
    )
    assert flat.recipe.objective.plain() | {"beta": 0.3, "loss_type": "ipo"} == flat.recipe.objective.plain()
    weighted = {"DPOConfig": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, "LoraConfig": {"r": 4}}
    assert converted(tmp_path, weighted).recipe.objective.plain()["sft"] == 0.2


def test_swifts_names_of_data_sets_are_taken_apart(tmp_path):
    def sources(*names, **more):
        settings = {"model": "org/x", "tuner_type": "lora", "dataset": list(names), **more}
        return converted(tmp_path, settings, "swift").recipe.plain()["data"]["train"]

    assert sources("HF::org/first", "HF::org/second") == ["org/first", "org/second"]
    found = sources("HF::org/first#500", "org/second:en/de")
    assert [(one["path"], one.get("subset"), one.get("limit")) for one in found.values()] == [
        ("org/first", None, 500), ("org/second", "en", None), ("org/second", "de", None),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"MS::org/first is ModelScope's"):
        sources("MS::org/first")
    for name, more in (("org/first:en/de#50", {}), ("org/first:en/de", {"interleave_prob": [1.0]})):
        with pytest.raises(RecipeError, match="counts several subsets together"):
            sources(name, **more)


@pytest.mark.parametrize(
    ("settings", "init"),
    [({"init_lora_weights": "gaussian"}, "gaussian"), ({"init_lora_weights": "olora"}, "default"), ({}, "default")],
    ids=str,
)
def test_peft_s_initial_values_are_ours(settings, init, tmp_path):
    theirs = arguments()
    theirs["LoraConfig"] |= settings
    found = converted(tmp_path, theirs)
    assert found.recipe.plain()["method"].get("init", "default") == init
    outcome = {setting.name: setting.outcome for setting in found.settings}.get("init_lora_weights")
    assert outcome == {"gaussian": "key", "olora": "missing"}.get(settings.get("init_lora_weights"))
    in_swift = {
        "model": "org/x",
        "train_type": "lora",
        "init_weights": settings.get("init_lora_weights", "true"),
        "lora_rank": 4,
    }
    swift = converted(tmp_path, {**in_swift, "dataset": ["a.jsonl"]}, "swift")
    assert swift.recipe.plain()["method"].get("init", "default") == init
    theirs["LoraConfig"] |= {"use_dora": True}  # which starts from its own values
    found = converted(tmp_path, theirs)
    assert found.recipe.plain()["method"]["name"] == "dora"
    assert not settings or {s.name: s.outcome for s in found.settings}["init_lora_weights"] == "missing"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"learning_rate": 1e-4, "output_dir": "x"},
            "its keys are settings of several tools: say --from axolotl|llamafactory|swift|trl.",
        ),
        ({"nonsense": 1}, "none of its keys is a setting of Axolotl, LLaMA-Factory, ms-swift, Unsloth or TRL"),
        ({"LoraConfig": {"r": 4, "task_type": "SEQ_CLS"}}, "task_type: SEQ_CLS: models that answer are trained: CAUSAL_LM."),
        ({"DPOConfig": {"loss_type": ["robust"]}}, "loss_type: ['robust']: sigmoid, dpo, hinge, ipo are there"),
        ({"SFTConfig": 3}, "SFTConfig: expected a mapping of its arguments, got 3."),
        (
            {"base_model": "x", "micro_batch_size": 1, "adapter": "lora", "lora_r": -1, "sequence_len": 8},
            "method.rank: expected a number of",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_with_its_reason(settings, said, tmp_path):
    with pytest.raises(RecipeError, match=r"theirs\.yaml") as caught:
        converted(tmp_path, settings)
    assert said in str(caught.value)


def test_names_of_datasets_are_looked_up(tmp_path):
    (tmp_path / "data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}, "num_samples": 50},
        "theirs": {"hf_hub_url": "org/theirs", "split": "test"},
        "code": {"script_url": "x"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    known = {
        "model_name_or_path": "x",
        "stage": "sft",
        "do_train": True,
        "template": "qwen",
        "dataset": "mine,theirs",
        "max_samples": 70,
    }
    train = converted(tmp_path, known).recipe.plain()["data"]["train"]
    assert train["mine"]["path"] == str(tmp_path / "data" / "mine.json")
    assert (train["mine"]["columns"], train["mine"]["limit"]) == ({"instruction": "q", "output": "a"}, 50)
    assert (train["theirs"]["path"], train["theirs"]["split"], train["theirs"]["limit"]) == ("org/theirs", "test", 70)
    for name, said in (
        ("code", "is made by a script, which is never run"),
        ("none", "no dataset is called none. Known: mine, theirs, code."),
    ):
        with pytest.raises(RecipeError, match=r"dataset_info\.json") as caught:
            converted(tmp_path, {**known, "dataset": name})
        assert said in str(caught.value)
    away = converted(tmp_path, {**known, "dataset_dir": "elsewhere"})
    assert "mine is a name in elsewhere/dataset_info.json, which is not here" in away.text


def test_devices_and_words_of_ones_own(tmp_path):
    found = converted(
        tmp_path,
        arguments(per_device_train_batch_size=2, gradient_accumulation_steps=3),
        devices=4,
        words=("data.train=x.jsonl",),
    )
    assert (found.recipe.train.rows_per_step, found.recipe.data.train) == (24, ("x.jsonl",))
    assert "train: x.jsonl" in found.text


def test_the_command_writes_a_recipe(tmp_path, capsys):
    file, recipe = tmp_path / "args.json", tmp_path / "recipe.yaml"
    file.write_text(json.dumps(arguments()), encoding="utf-8")
    assert cli.main(["convert", str(file), "--output", str(recipe)]) == 0
    assert "learning_rate: 0.001 → train.lr: 0.001" in capsys.readouterr().out
    assert Recipe.read(recipe).train.lr == 1e-3
    assert cli.main(["convert", str(file), "--output", str(recipe)]) != 0, "nothing is overwritten"
    capsys.readouterr()
    assert cli.main(["convert", str(file)]) == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out) == yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert "Converted:" in shown.err


def test_a_converted_recipe_trains_as_the_script_did(tmp_path, monkeypatch):
    """Every example in every step, so that their order does not matter; the same first adapter, and the same tokens as targets."""
    pytest.importorskip("trl")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    base = Base.load_folder(saved_base(tmp_path / "tiny"), torch.float32, torch.device("cpu"))
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ANSWERS), encoding="utf-8")
    rows = load_data(DataConfig(train=str(data), eval=0), base, None, 0).train
    tokens = [
        {"input_ids": row.ids, "completion_mask": [int(n in row.target_indices) for n in range(len(row.ids))]} for row in rows
    ]
    settings = {
        "LoraConfig": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "task_type": "CAUSAL_LM"},
        "SFTConfig": {
            "learning_rate": 0.01, "num_train_epochs": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "cosine", "max_grad_norm": 0.5, "completion_only_loss": True, "weight_decay": 0.1,
        },
    }  # fmt: skip
    for name, value in (("rows", tokens), ("settings", settings)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trl_script.py")), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = (f"data.train={data}", f"model.name={tmp_path / 'tiny'}", f"start={tmp_path / 'start'}", "certify=false")
    words = (f"data.train={data}", f"model.name={tmp_path / 'tiny'}", "certify=false", f"output={tmp_path / 'ours'}")
    plain = yaml.safe_load(convert(tmp_path / "theirs.json", words=words).text)
    method = Method.pick(plain.pop("method"))
    fresh, saved = attach(base.model, method), load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in fresh.parameters().values()} == {tuple(tensor.shape) for tensor in saved.values()}
    assert len(fresh.parameters()) == len(saved), "the same modules are adapted"
    fresh.detach()
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({**plain, "start": str(tmp_path / "start")}), encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "ours.yaml")]) == 0
    theirs = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = [line["loss"] for line in lines if line["kind"] == "train"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(ours) == 6
    assert ours[-1] < ours[0] - 0.1, "something was learned on the way"


def test_options_are_those_of_the_installed_classes():
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    specification = importlib.util.spec_from_file_location("options", ROOT / "benchmarks" / "options.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    known = options_of("trl")
    for name, kind in (
        ("SFTConfig", trl.SFTConfig),
        ("DPOConfig", trl.DPOConfig),
        ("KTOConfig", trl.KTOConfig),
        ("LoraConfig", peft.LoraConfig),
    ):
        assert json.loads(json.dumps(module.fields(kind))) == known[name], "run: python benchmarks/options.py"


def test_the_table_has_every_option_and_most_of_what_examples_use():
    for tool in TOOLS:
        names = {name for options in options_of(tool).values() for name in options}
        assert [name for name in sorted(names) if meaning_of(name) is None] == []
    assert meaning_of("lora_rr") is None
    for usage in json.loads((FIXTURES / "usage.json").read_text(encoding="utf-8")).values():
        outcomes = {name: meaning_of(name) for name in usage["keys"]}
        covered = sum(n for name, n in usage["keys"].items() if (m := outcomes[name]) and m.outcome in ("key", "derived"))
        assert covered >= 0.9 * sum(usage["keys"].values())


def of_axolotl(tmp_path, *datasets):
    settings = {
        "base_model": "a/b",
        "adapter": "lora",
        "lora_target_linear": True,
        "sequence_len": 64,
        "datasets": list(datasets),
    }
    found = converted(tmp_path, settings, "axolotl")
    return found.recipe.data, {one.name: one for one in found.settings if one.name.startswith("datasets[")}


def test_axolotls_own_formats_become_templates_of_the_datas_columns(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "One?", "ctx": "Of two.", "a": "First.", "sys": "Be brief."}\n', encoding="utf-8")
    kind = {
        "system_prompt": "Be kind.", "field_system": "sys", "field_instruction": "q", "field_input": "ctx", "field_output": "a",
        "format": "Q: {instruction}\nC: {input}\nA:",
    }  # fmt: skip
    data, said = of_axolotl(tmp_path, {"path": str(rows), "type": kind})
    (source,) = data.train_sources["rows"]
    assert (source.prompt, source.completion, source.columns) == ("Q: {q}\nC: {ctx}\nA:", "{a}", {"system": "sys"})
    assert data.system == "Be kind."
    assert said["datasets[0].system_prompt"].outcome == "key"
    base = saved_base(tmp_path / "tiny")
    (row,) = load_data(data.model_copy(update={"max_length": None}), Base.load(str(base)), None, 0).train
    assert "Q: One?\nC: Of two.\nA:" in Base.load(str(base)).tokenizer.decode(row.ids)
    data, said = of_axolotl(tmp_path, {"path": "x.jsonl", "type": kind}, {"path": "y.jsonl", "type": "alpaca"})
    assert (data.system, said["datasets[0].system_prompt"].outcome) == (None, "missing"), "it would be the other's, too"


@pytest.mark.parametrize(
    ("roles", "train_on"),
    [
        (["gpt"], "assistant"),
        (["assistant"], "assistant"),
        (["gpt", "human"], ("assistant", "user")),
        (["tool", "model"], ("tool", "assistant")),
    ],
)
def test_axolotls_roles_are_ours(roles, train_on, tmp_path):
    data, _ = of_axolotl(tmp_path, {"path": "x.jsonl", "type": "chat_template", "roles_to_train": roles})
    assert data.train_on == train_on


@pytest.mark.parametrize(("key", "read", "other"), [
    ("message_property_mappings", {"role": "from", "content": "value"}, {"role": "who", "content": "said"}),
    ("message_field_role", "from", "speaker"),
    ("message_field_training", "train", "learn"),
    ("train_on_eos", "turn", "none"),
])  # fmt: skip
def test_what_messages_are_called_is_there_or_said_to_be_missing(key, read, other, tmp_path):
    for value, outcome in ((read, "derived"), (other, "missing")):
        _, said = of_axolotl(tmp_path, {"path": "x.jsonl", "type": "chat_template", key: value})
        assert said[f"datasets[0].{key}"].outcome == outcome
        assert (
            "rename" in said[f"datasets[0].{key}"].said
            or "is a target" in said[f"datasets[0].{key}"].said
            or outcome == "derived"
        )


def test_trls_yaml_of_the_command_line(tmp_path):
    settings = {
        "model_name_or_path": "a/b", "dataset_name": "trl-lib/Capybara", "learning_rate": 2e-4, "use_peft": True, "lora_r": 16, "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "v_proj"], "eval_strategy": "steps", "eval_steps": 10, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8, "max_length": 2048, "packing": True, "bf16": True, "num_train_epochs": 1, "dataset_test_split": "test",
    }  # fmt: skip
    recipe = converted(tmp_path, settings).recipe
    assert (recipe.model.name, recipe.model.dtype, recipe.data.train) == ("a/b", "bfloat16", ("trl-lib/Capybara",))
    assert recipe.data.eval["Capybara"].split == "test"
    assert (recipe.train.tokens_per_step, recipe.train.evaluate_every, recipe.method.rank) == (2 * 8 * 2048, 10, 16)
    mixture = {**settings, "datasets": [{"path": "x", "name": "en", "split": "train", "columns": ["prompt", "completion"]}]}
    del mixture["dataset_name"]
    found = converted(tmp_path, mixture)
    assert {one.name: one.outcome for one in found.settings}["datasets[0].columns"] == "derived"


# The contract of the family: every file of the folder is a tool


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_knows_its_options_and_accounts_for_each_of_them(tool, tmp_path):
    """Nearly an empty file is a recipe; an option of nobody's is named; and none of the tool's own is unknown or lost."""
    folder = ROOT / "src" / "trimtab" / "migrate"
    assert (
        {path.stem for path in folder.glob("[a-z]*.py")}
        == {path.stem for path in (folder / "options").glob("*.json")}
        == set(TOOLS)
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert next(action.choices for action in parser._actions if action.dest == "tool") == tuple(TOOLS)
    assert TOOLS[tool].TITLE
    options = options_of(tool)
    name = {"axolotl": "base_model", "swift": "model"}.get(tool, "model_name_or_path")
    given = {"trl": {"LoraConfig": {}, "SFTConfig": {"learning_rate": 1e-4}}, "llamafactory": {"do_train": True}}.get(tool, {})
    found = converted(tmp_path, {**given, name: "org/model", "nobodys_setting": 3}, tool)
    assert found.tool == tool
    assert found.recipe.model.name == "org/model"
    assert [(one.name, one.outcome) for one in found.settings if one.outcome == "unknown"] == [("nobodys_setting", "unknown")]
    known = {key: value for part in options.values() for key, value in part.items()}
    settings = Settings(TOOLS[tool].TITLE, "x", known, known)
    settings.settle_rest(known)
    assert {one.name for one in settings.settled} == set(known)
    assert [one.name for one in settings.settled if one.outcome == "unknown"] == []


# Devices


@pytest.mark.parametrize(
    ("given", "engine", "config"),
    [
        ({"deepspeed": "ds_z2.json"}, "zero2", True),
        ({"deepspeed": "examples/deepspeed/ds_z3_offload_config.json"}, "zero3", False),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, "zero1", False),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3", False),
        ({"deepspeed": "ds_z0.json"}, "ddp", False),
        ({"deepspeed": "ds_z3.json", "finetuning_type": "full"}, "fsdp", False),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"min_num_params": 0}}, "fsdp", False),
        ({"ddp_timeout": 180000000}, None, False),
    ],
)
def test_devices_and_engines_are_those_of_the_launcher_and_its_file(given, engine, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_z2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}))
    settings = {
        "model_name_or_path": "x/y",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "a",
        **given,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}}))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**settings, "dataset_dir": ".", "output_dir": "o"}))
    found = convert(tmp_path / "train.yaml", "llamafactory", devices=4)
    said = yaml.safe_load(found.text).get("distributed", {})
    assert found.recipe.devices == 4
    assert said.get("engine") == engine
    assert ("config" in said) is config
    assert {one.outcome for one in found.settings if one.name in given} <= {"key", "derived"}
