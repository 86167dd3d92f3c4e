"""A user's DeepSpeed JSON: published files are read, what contradicts the recipe is refused by path, and no key passes unseen."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

from trimtab.base import ModelConfig
from trimtab.core.errors import RecipeError
from trimtab.core.processes import processes
from trimtab.distributed import Engine
from trimtab.distributed._deepspeed import OLDEST
from trimtab.distributed._deepspeed_config import TOP, ZERO, Key, read_config
from trimtab.methods import Method
from trimtab.objectives.sft import SFT
from trimtab.run.recipe import Recipe
from trimtab.train import TrainConfig

AUTOMATIC = {name: "auto" for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
# As LLaMA-Factory's examples/deepspeed has them.
FACTORY = AUTOMATIC | {
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": FP16,
    "bf16": {"enabled": "auto"},
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
}
FACTORY_2 = FACTORY | {
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    }
}
FACTORY_3 = FACTORY | {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
}
# As Axolotl's deepspeed_configs has them.
AXOLOTL_1 = AUTOMATIC | {
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "bf16": {"enabled": "auto"},
    "fp16": FP16 | {"auto_cast": False, "initial_scale_power": 32},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "wall_clock_breakdown": False,
}
AXOLOTL_3 = AUTOMATIC | {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "reduce_bucket_size": "auto",
        "prefetch_bucket_size": "auto",
        "param_persistence_threshold": "auto",
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
        "gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": True},
}


def write(folder: Path, value) -> Path:
    path = folder / "ds.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def changed(value: dict, where: str, new) -> dict:
    """A copy with another value at a path."""
    copy = json.loads(json.dumps(value))
    node, names = copy, where.split(".")
    for name in names[:-1]:
        node = node.setdefault(name, {})
    node[names[-1]] = new
    return copy


def refusal(folder, value, stage=2, **train) -> str:
    with pytest.raises(RecipeError) as caught:
        read_config(write(folder, value), stage, TrainConfig(**train))
    return str(caught.value)


@pytest.mark.parametrize(
    ("published", "stage", "told"),
    [
        (
            FACTORY_2,
            2,
            {
                "allgather_partitions": True,
                "allgather_bucket_size": 500_000_000,
                "overlap_comm": False,
                "reduce_scatter": True,
                "reduce_bucket_size": 500_000_000,
                "contiguous_gradients": True,
                "round_robin_gradients": True,
            },
        ),
        (
            FACTORY_3,
            3,
            {
                "overlap_comm": False,
                "contiguous_gradients": True,
                "stage3_max_live_parameters": 10**9,
                "stage3_max_reuse_distance": 10**9,
            },
        ),
        (AXOLOTL_1, 1, {"overlap_comm": True}),
        (
            changed(AXOLOTL_3, "bf16.enabled", "auto"),
            3,
            {
                "overlap_comm": True,
                "contiguous_gradients": True,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            },
        ),
    ],
)
def test_published_files_are_read(published, stage, told, tmp_path):
    handed = read_config(write(tmp_path, published), stage, TrainConfig())
    assert handed == told
    assert all(type(value) in (int, bool) for value in handed.values())


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("bf16.enabled", True, "bf16.enabled: True is refused: it would cast the adapter"),
        ("bfloat16.enabled", True, "bfloat16.enabled: True is refused"),
        ("fp16.enabled", True, "fp16.enabled: True is refused"),
        ("bf16.bf16_master_weights_and_grads", True, "bf16.bf16_master_weights_and_grads: True"),
        ("gradient_accumulation_steps", 4, "gradient_accumulation_steps: 4 is refused"),
        ("train_batch_size", 64, "train_batch_size: 64, and train.rows_per_step is not given"),
        ("train_micro_batch_size_per_gpu", 2, "train_micro_batch_size_per_gpu: 2 is refused"),
        ("gradient_clipping", 0.5, "gradient_clipping: 0.5, and train.clip is 1.0"),
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}}, "optimizer: it is train.optimizer"),
        ("optimizer", {"type": "Lion", "params": {}}, "optimizer: it is train.optimizer"),
        ("optimizer", {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}, "optimizer: it is train.optimizer"),
        ("scheduler", {"type": "WarmupLR", "params": {}}, "scheduler: "),
        ("zero_optimization.stage", 3, "zero_optimization.stage: 3, and the recipe's engine is zero2"),
        ("zero_optimization.stage", True, "zero_optimization.stage: expected a whole number"),
        ("zero_optimization.offload_optimizer.device", "cpu", "zero_optimization.offload_optimizer.device: 'cpu' is refused"),
        ("zero_optimization.offload_param.device", "nvme", "zero_optimization.offload_param.device: 'nvme'"),
        ("zero_optimization.zero_quantized_gradients", True, "zero_optimization.zero_quantized_gradients: True"),
        ("zero_optimization.zero_quantized_weights", True, "zero_optimization.zero_quantized_weights: True"),
        ("zero_optimization.reduce_bucket_size", "5e8", "zero_optimization.reduce_bucket_size: expected a whole number, got '5e8'"),
        ("zero_optimization.reduce_bucket_size", 0.5, "zero_optimization.reduce_bucket_size: expected a whole number"),
        ("zero_optimization.reduce_scatter", 1, "zero_optimization.reduce_scatter: expected true or false"),
        ("zero_optimization.reduce_buket_size", 1, "zero_optimization.reduce_buket_size: no such key. Did you mean 'reduce_bucket_size'?"),
        ("zero_optimisation", {}, "zero_optimisation: no such key. Did you mean 'zero_optimization'?"),
        ("gradient_cliping", 1.0, "gradient_cliping: no such key. Did you mean 'gradient_clipping'?"),
        ("zero_optimization", 2, "zero_optimization: expected an object, got 2"),
        ("communication_data_type", "fp16", "communication_data_type: 'fp16' is refused"),
        ("data_types.grad_accum_dtype", "bf16", "data_types.grad_accum_dtype: 'bf16' is refused"),
        ("gradient_predivide_factor", 2.0, "gradient_predivide_factor: 2.0 is refused"),
        ("gradient_allreduce_op", "mean", "gradient_allreduce_op: 'mean' is refused"),
        ("prescale_gradients", True, "prescale_gradients: True is refused"),
        ("compression_training", {"weight_quantization": {}}, "compression_training: "),
        ("curriculum_learning", {"enabled": True}, "curriculum_learning: "),
        ("sparse_attention", {"mode": "fixed"}, "sparse_attention: "),
        ("activation_checkpointing", {"partition_activations": True}, "activation_checkpointing: "),
        ("wandb.enabled", True, "wandb.enabled: True is refused"),
        ("monitor_config.csv_monitor.enabled", True, "monitor_config.csv_monitor.enabled: True is refused"),
        ("zero_allow_untested_optimizer", False, "zero_allow_untested_optimizer: False is refused"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_its_path(where, value, says, tmp_path):
    assert says in refusal(tmp_path, changed(FACTORY_2, where, value))


@pytest.mark.parametrize(
    ("where", "value", "train"),
    [
        ("train_batch_size", 16, {"rows_per_step": 16}),
        ("gradient_accumulation_steps", 1, {}),
        ("gradient_clipping", 1.0, {}),
        ("gradient_clipping", 0.0, {"clip": None}),
        ("bf16.enabled", False, {}),
        ("gradient_predivide_factor", 1.0, {}),
        ("flops_profiler", {"enabled": False, "profile_step": 1}, {}),
        ("zero_optimization.offload_optimizer", {"device": "none", "pin_memory": True}, {}),
        ("zero_optimization.sub_group_size", 1e9, {}),
        ("communication_data_type", "fp32", {}),
        ("steps_per_print", 10, {}),
    ],
)
def test_what_agrees_is_accepted_and_changes_nothing(where, value, train, tmp_path):
    handed = read_config(write(tmp_path, changed(FACTORY_2, where, value)), 2, TrainConfig(**train))
    assert handed == read_config(write(tmp_path, FACTORY_2), 2, TrainConfig())


def test_all_problems_are_said_at_once_with_the_file(tmp_path):
    value = changed(changed(FACTORY_2, "bf16.enabled", True), "zero_optimization.stag", 2)
    said = refusal(tmp_path, value)
    assert str(tmp_path / "ds.json") in said
    assert "bf16.enabled" in said
    assert "zero_optimization.stag" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{'stage': 2}", "is not JSON"),
        ("zero_optimization: {stage: 2}", "is not JSON"),
        ('{"zero_optimization": {"stage": 2}} // mine', "is not JSON: something follows it"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' is given twice"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON value"),
        ("[]", "has no object at its top"),
        ('{"zero_optimization": {}}', "zero_optimization.stage: missing"),
    ],
)
def test_only_json_is_read(text, says, tmp_path):
    assert says in refusal(tmp_path, text)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"distributed\.config: .*nowhere\.json cannot be read: No such file"):
        read_config(tmp_path / "nowhere.json", 2, TrainConfig())


def leaves(known, prefix=""):
    for name, key in known.items():
        if isinstance(key, Key):
            yield f"{prefix}{name}", key
        else:
            yield from leaves(key, f"{prefix}{name}.")


def test_what_is_handed_on_concerns_speed_alone():
    handed = {where for where, key in leaves(TOP) if key.handed}
    assert {where.partition(".")[0] for where in handed} == {"zero_optimization"}
    assert "zero_optimization.reduce_bucket_size" in handed
    assert not any("quantize" in where or "offload" in where or "dtype" in where for where in handed)


@pytest.mark.parametrize("where", [where for where, key in leaves(TOP) if key.neutral is not None])
def test_every_key_that_could_change_a_result_is_refused_at_another_value(where, tmp_path):
    """The negative control of each: a value that is none of its neutral ones."""
    key = dict(leaves(TOP))[where]
    other = {"bool": key.neutral != (True,), "count": 7, "number": 7, "text": "other", "any": ["other"]}[key.kind]
    if key.kind == "bool" and True in key.neutral:
        other = False
    assert f"{where}: " in refusal(tmp_path, changed(FACTORY_2, where, other))


def test_the_keys_are_those_of_deepspeed():
    """Of 0.19.8, where it is installed (make scale)."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = config.DeepSpeedZeroConfig.model_fields
    missing = {field.alias or name for name, field in fields.items()} - ZERO.keys()
    assert not missing, missing


def check(engine: str, config: Path | None = None, optimizer="adamw"):
    raw = {"engine": engine, **({"config": str(config)} if config else {})}
    train = TrainConfig(optimizer=optimizer)
    Engine.pick(raw).check(ModelConfig(name="tiny"), Method.pick("lora"), SFT(), train)


def test_the_file_is_read_before_anything_else(tmp_path):
    path = write(tmp_path, FACTORY_2)
    check("zero2", path)
    with pytest.raises(RecipeError, match=r"zero_optimization\.stage: 2, and the recipe's engine is zero1"):
        check("zero1", path)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit", "muon"])
def test_optimizers_that_cannot_be_divided_are_refused(optimizer):
    with pytest.raises(RecipeError, match=rf"zero2 cannot divide what {optimizer} holds"):
        check("zero2", optimizer=optimizer)


def test_without_deepspeed_several_processes_are_told_to_install_it(monkeypatch):
    monkeypatch.setattr(type(processes), "size", 2)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'trimtab\[deepspeed\]'"):
        check("zero2")


@pytest.mark.parametrize("version", ["0.15.4", "0.18.9", "0.19.8", "0.19.9+cu130", "1.0"])
def test_a_version_that_does_otherwise_is_named(version, monkeypatch):
    monkeypatch.setattr(type(processes), "size", 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if version in ("0.15.4", "0.18.9"):
        with pytest.raises(RecipeError, match=rf"needs DeepSpeed, and {version} is too old: 0\.19\.8 is needed"):
            check("zero3")
    else:
        check("zero3")


def test_the_oldest_version_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["deepspeed"] == [f"deepspeed>={'.'.join(map(str, OLDEST))}"]


def test_a_run_knows_the_file_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, FACTORY_2)
    recipe = Recipe.parse({"data": {"train": "rows.jsonl"}, "distributed": {"engine": "zero2", "config": "ds.json"}})
    plain = recipe.absolute().plain()["distributed"]
    assert plain == {"engine": "zero2", "config": str(tmp_path / "ds.json")}
    assert Recipe.parse(recipe.absolute().plain()) == recipe.absolute()
