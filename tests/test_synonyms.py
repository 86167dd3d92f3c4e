"""What other tools call a key is answered with what it is called here; and every such answer is true."""

import re

import pytest

from trimtab.core.config import Config
from trimtab.core.errors import RecipeError
from trimtab.core.other_tools import AUTOMATIC, SAME
from trimtab.core.other_tools_only import UNSUPPORTED
from trimtab.core.synonyms import (
    CHOICES,
    key_for_option,
    suggest,
    translate_choice,
    translate_key,
)
from trimtab.data import Source
from trimtab.methods import Method
from trimtab.objectives import Objective
from trimtab.run.recipe import Recipe


def test_the_nearest_name_is_suggested_or_all_are():
    assert suggest("epocs", ["epochs", "seed"], translate_key) == ". Did you mean 'epochs'?"
    assert suggest("Epochs", ["epochs", "seed"], translate_key) == ". Did you mean 'epochs'?"
    assert suggest("zzz", ["epochs", "seed"], translate_key) == ". Known: epochs, seed."
    assert suggest(3, [], translate_key) == ". It has none."


def real_keys():
    """Every key of a recipe, those of methods and objectives included."""
    found = set()
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        kinds = [inner.member(one) for one in inner.names()] if inner in (Method, Objective) else [inner]
        parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]
        found |= {
            name,
            *(f"{name}.{key}" for kind in parts for key in kind.model_fields),
            *({f"{name}.name"} if len(parts) > 1 else ()),
        }
    return found


PEERS_WORDS = """
    learning_rate num_train_epochs early_stopping_patience per_device_train_batch_size gradient_accumulation_steps batch_size lora_r lora_alpha
    lora_dropout target_modules load_in_4bit gradient_checkpointing max_grad_norm save_steps eval_steps cutoff_len template packing
    report_to micro_batch_size sequence_len base_model adapter sample_packing val_set_size lora_target_modules lora_target_linear
    num_epochs lr_scheduler_type warmup_ratio warmup_steps bf16 fp16 flash_attn output_dir deepspeed optim wandb_project
    model_name_or_path finetuning_type dataset dataset_dir lora_target lora_rank quantization_bit val_size pref_beta stage
    logging_steps max_seq_length dataset_text_field neftune_noise_alpha assistant_only_loss use_rslora use_dora torch_dtype
    resume_from_checkpoint
""".split()  # noqa: SIM905


@pytest.mark.parametrize("word", PEERS_WORDS)
def test_the_words_of_other_tools_are_known(word):
    said = translate_key(word)
    assert said
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"data": {"train": "x"}, word: 1})
    assert str(caught.value) == f"{word}: no such key: {said}."
    assert translate_key(word.replace("_", "-").upper()) == said


@pytest.mark.parametrize(
    "word", ["qlora", "LoRA+", "prefix-tuning", "p-tuning", "AdaLoRA", "grpo", "PPO", "pt", "ipo", "rslora"]
)
def test_the_names_of_other_tools_methods_and_objectives_are_known(word):
    said = translate_choice(word)
    section = "objective" if word.lower() in ("grpo", "ppo", "pt", "ipo") else "method"
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"data": {"train": "x"}, section: word})
    assert str(caught.value) == f"{section}.name: no such choice: {word!r}: {said}."


def test_what_other_words_are_said_to_be_here_is_here():
    keys = real_keys()
    assert {"train.lr", "method.rank", "objective.beta", "model.name", "output"} <= keys
    for word, here in SAME.items():
        key = here.partition(" ")[0].partition("=")[0]
        source = key.removeprefix("data.train.NAME.") if key.startswith("data.train.NAME.") else None
        option = key.removeprefix("train.optimizer.") if key.startswith("train.optimizer.") else None
        known = source in Source.model_fields if source else option in ("betas", "eps") if option else key in keys
        assert known or key.startswith(("model.template.", "data.columns.")) or key in ("method", "distributed.engine"), (
            word,
            here,
        )
    words = [*SAME, *AUTOMATIC, *UNSUPPORTED]
    assert len(words) == len(set(words))
    for said in [*AUTOMATIC.values(), *UNSUPPORTED.values(), *CHOICES.values()]:
        for key in re.findall(r"\b(?:train|data|model|method|objective)\.\w+", said):
            assert key in keys, said


def test_every_key_of_ones_own_is_found_from_the_command_line():
    for key in real_keys():
        section, _, leaf = key.partition(".")
        if section in ("train", "model") and leaf:
            assert key_for_option(f"--{leaf}") in (f"{key}=…", None) or leaf == "name"
    assert key_for_option("--lr=1e-4") == "train.lr=1e-4"
    assert key_for_option("--train.lr") == "train.lr=…"
    assert key_for_option("--load-in-4bit") == "model.quantize=nf4"
    assert key_for_option("--nonsense") is None


def test_all_problems_are_said_at_once():
    raw = {
        "data": {"train": "x", "cutoff_len": 3},
        "train": {"lrr": 1, "epochs": "two", "warmup": 1.5},
        "method": {"rnak": 1},
        "x": 1,
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(raw)
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0].strip() for line in lines) == [
        "data.cutoff_len",
        "method.rnak",
        "train.epochs",
        "train.lrr",
        "train.warmup",
        "x",
    ]
    assert "  train.warmup: expected a fraction of the steps (below 1) or a whole number of them, got 1.5." in lines
    assert "  train.epochs: expected 'auto' or a number, got 'two'." in lines


def test_a_key_of_another_section_is_pointed_to_it_and_one_of_another_method_is_not():
    for raw, said in (
        ({"lr": 1}, "lr: no such key: it is train.lr here."),
        ({"objective": {"name": "sft", "beta": 1}}, "objective.beta: no such key. It has none."),
        ({"method": {"name": "layernorm", "rank": 1}}, "method.rank: no such key. Known: targets, layers."),
    ):
        with pytest.raises(RecipeError) as caught:
            Recipe.parse({"data": {"train": "x"}, **raw})
        assert str(caught.value) == said
