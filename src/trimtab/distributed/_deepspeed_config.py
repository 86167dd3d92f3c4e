"""A user's DeepSpeed configuration, as JSON: read strictly, every key of it accounted for.

What makes passes faster is handed on. What would change the adapter that comes out (another number of rows in a step, another optimizer,
gradients or parameters of 16 bits) is refused by the path of its key, with the key of the recipe that says it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab.core.errors import RecipeError, listing
from trimtab.core.synonyms import suggest
from trimtab.data.strict_json import parse_json
from trimtab.train import TrainConfig

AUTO = "auto"
"""By which Transformers fills in what its own arguments say, and Trimtab what the recipe says."""

Kind = Literal["bool", "count", "number", "text", "any"]


class Key(NamedTuple):
    """A key that DeepSpeed knows."""

    kind: Kind
    neutral: tuple[Any, ...] | None = None
    """The values by which it changes no result; None for any."""
    reason: str = ""
    """Why others are refused."""
    handed: bool = False
    """Whether DeepSpeed is told; else it is what Trimtab does without being told, or concerns what Trimtab does not ask DeepSpeed for."""


def _speed(kind: Kind) -> Key:
    return Key(kind, handed=True)


def _idle(kind: Kind = "any") -> Key:
    return Key(kind)


def _only(*neutral: Any, reason: str, kind: Kind = "any") -> Key:
    return Key(kind, neutral, reason)


_OFF = (False, None)
_CASTS = (
    "it would cast the adapter to 16 bits, which loses most of its small updates. Leave it out: model.dtype is the base's, and the adapter "
    "is trained in float32."
)
_OFFLOAD = "offloading is not supported. Leave it out; a base that does not fit is held in 4 bits by model.quantize=nf4, or divided by fsdp."
_QUANTIZED = "it rounds what processes exchange to 8 or 4 bits, so that results depend on how many there are. Leave it out."
_MICRO = (
    "micro-batches are packs of tokens (train.pack_tokens), and their number changes no result. Leave it out, or write auto."
)
_ELSEWHERE = "it belongs to another way of training than an adapter's, and is not supported. Leave it out."
_FP32 = (None, "fp32")
DISABLED = {"enabled": False}

_OFFLOADED = {
    "device": _only("none", None, reason=_OFFLOAD),
    **dict.fromkeys(
        ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write"), _idle()
    ),
    **dict.fromkeys(("fast_init", "ratio", "super_offload", "cpuadam_cores_perc"), _idle()),
}
_STAGE_3 = {
    "prefetch_bucket_size": _speed("count"),
    "param_persistence_threshold": _speed("count"),
    "model_persistence_threshold": _speed("count"),
    "max_live_parameters": _speed("count"),
    "max_reuse_distance": _speed("count"),
    "allgather_sequential": _speed("bool"),
    "use_all_reduce_for_fetch_params": _speed("bool"),
    "module_granularity_threshold": _only(0, reason="whole decoder layers are gathered. Leave it out.", kind="count"),
    "gather_16bit_weights_on_model_save": _idle("bool"),
    "gather_fp16_weights_on_model_save": _idle("bool"),
}
ZERO: dict[str, Any] = {
    "stage": Key("count"),
    **dict.fromkeys(
        ("allgather_partitions", "overlap_comm", "reduce_scatter", "contiguous_gradients", "round_robin_gradients"),
        _speed("bool"),
    ),
    **dict.fromkeys(("use_multi_rank_bucket_allreduce",), _speed("bool")),
    **dict.fromkeys(("allgather_bucket_size", "reduce_bucket_size"), _speed("count")),
    **{f"stage3_{name}": key for name, key in _STAGE_3.items()},
    **_STAGE_3,  # as DeepSpeed reads them, too
    **dict.fromkeys(
        ("ignore_unused_parameters", "load_from_fp32_weights", "elastic_checkpoint", "override_module_apply"), _idle("bool")
    ),
    **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks", "pipeline_loading_checkpoint"), _idle("bool")),
    **dict.fromkeys(
        ("parameter_alignment", "save_muon_momentum_buffer_in_memory", "legacy_stage1"), _only(*_OFF, reason=_ELSEWHERE)
    ),
    "sub_group_size": _idle("count"),
    "compute_grad_norm": _only(True, reason="gradients are clipped by their norm, and every step logs it. Leave it out."),
    "memory_efficient_linear": _only(False, reason="it replaces torch's linear layers in the whole process. Leave it out."),
    "offload_optimizer": _OFFLOADED,
    "offload_param": _OFFLOADED,
    **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), _only(*_OFF, reason=_OFFLOAD)),
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_nontrainable_weights"), _only(*_OFF, reason=_QUANTIZED)),
    "zero_quantized_gradients": _only(*_OFF, reason=_QUANTIZED),
    "zero_hpz_partition_size": _only(
        1, reason="a second copy of the shares within a machine is not supported. Leave it out, or use fsdp."
    ),
    "mics_shard_size": _only(-1, None, reason="shares within a machine are what fsdp has. Leave it out, or use fsdp."),
    "mics_hierarchical_params_gather": _only(
        *_OFF, reason="shares within a machine are what fsdp has. Leave it out, or use fsdp."
    ),
    "zenflow": _only(None, reason=_OFFLOAD),
    "leaf_module": _only(None, {}, reason="whole decoder layers are gathered. Leave it out."),
}
_SCALING = (
    "loss_scale",
    "loss_scale_window",
    "initial_scale_power",
    "hysteresis",
    "min_loss_scale",
    "auto_cast",
    "consecutive_hysteresis",
)
_CHOICES = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads", "immediate_grad_update")
_HALF = {
    "enabled": _only(*_OFF, reason=_CASTS, kind="bool"),
    **dict.fromkeys((*_SCALING, "check_grad_overflow"), _idle()),
    **dict.fromkeys(_CHOICES, _only(*_OFF, reason=_CASTS)),
}
_TRACKER = {
    "enabled": _only(*_OFF, reason="the recipe's key for trackers is `track`. Leave it out.", kind="bool"),
    **dict.fromkeys(
        ("output_path", "job_name", "group", "team", "project", "samples_log_interval", "mode", "workspace"), _idle()
    ),
    **dict.fromkeys(("api_key", "online", "experiment_name", "experiment_key"), _idle()),
}
_MONITOR = {name: _TRACKER for name in ("tensorboard", "wandb", "csv_monitor", "comet")}
_SECTIONS_OFF = (
    "flops_profiler", "autotuning", "elasticity", "hybrid_engine", "tensor_parallel", "sparse_attention", "compression_training",
    "curriculum_learning", "data_efficiency", "progressive_layer_drop", "eigenvalue", "quantize_training", "weight_quantization", "aio",
    "amp", "torch_autocast", "pipeline", "expert_parallel", "checkpoint", "nebula", "compile", "random_ltd", "datastates",
)  # fmt: skip
TOP: dict[str, Any] = {
    "zero_optimization": ZERO,
    "bf16": _HALF,
    "bfloat16": _HALF,
    "fp16": _HALF,
    "train_micro_batch_size_per_gpu": _only(reason=_MICRO, kind="count"),
    "zero_allow_untested_optimizer": _only(True, reason="the optimizer is torch's AdamW, as the recipe says. Leave it out.", kind="bool"),
    "zero_force_ds_cpu_optimizer": _only(False, reason="the optimizer is torch's AdamW, as the recipe says. Leave it out.", kind="bool"),
    "prescale_gradients": _only(*_OFF, reason="gradients are added as they are. Leave it out.", kind="bool"),
    "gradient_predivide_factor": _only(1, reason="gradients are added as they are. Leave it out.", kind="number"),
    "gradient_allreduce_op": _only("sum", reason="gradients are added: the loss is divided by the tokens of the whole step. Leave it out."),
    "communication_data_type": _only(*_FP32, reason="gradients would be rounded to 16 bits. Leave it out."),
    "seq_parallel_communication_data_type": _only(*_FP32, reason=_ELSEWHERE),
    "data_types": {
        "grad_accum_dtype": _only(*_FP32, reason="gradients would be rounded to 16 bits. Leave it out."),
        "param_dtype": _only(None, reason=_CASTS),
        "buffer_dtype": _only(None, reason=_CASTS),
        "keep_in_fp32_modules": _idle(),
    },
    "sparse_gradients": _only(*_OFF, reason=_ELSEWHERE, kind="bool"),
    "disable_allgather": _only(*_OFF, reason="without it, processes would have different adapters. Leave it out.", kind="bool"),
    "managed_gradient_accumulation": _only(True, reason="Trimtab adds up micro-batches itself. Leave it out.", kind="bool"),
    "sequence_parallel_size": _only(1, None, reason=_ELSEWHERE),
    "scheduler": _only(None, reason="the learning rate is train.schedule, train.lr and train.warmup. Leave it out."),
    **dict.fromkeys(("activation_checkpointing",), _only(None, {}, reason="it is train.recompute here. Leave it out.")),
    **dict.fromkeys(_SECTIONS_OFF, _only(None, {}, DISABLED, reason=_ELSEWHERE)),
    **dict.fromkeys(("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "disable_python_gc"), _idle()),
    **dict.fromkeys(("dataloader_drop_last", "use_data_before_expert_parallelism", "timers"), _idle()),
    **dict.fromkeys(("comms_logger", "comms_config"), _idle()),
    "monitor_config": {"enabled": _idle("bool"), "tag": _idle(), **_MONITOR},
    **_MONITOR,
}  # fmt: skip
"""Keys by section. `train_batch_size`, `gradient_accumulation_steps`, `gradient_clipping` and `optimizer` are compared with the recipe."""
COMPARED = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "optimizer")


def read_config(path: Path, stage: int, train: TrainConfig | None = None) -> dict[str, Any]:
    """What of a configuration's `zero_optimization` DeepSpeed is told.

    Args:
        stage: That of the recipe's engine.
        train: What the file must not contradict; nothing unless given.

    Raises:
        RecipeError: The file cannot be read; or it has keys that nobody knows, or that contradict the recipe: all of them, by path.
    """
    problems, handed = list[str](), dict[str, Any]()
    raw = _read(path)
    for where, value, key in _walk(raw, TOP, "", problems):
        if value != AUTO and (problem := _problem(where, value, key, stage)):
            problems.append(problem)
        elif value != AUTO and key.handed:
            name = where.rpartition(".")[2]
            handed[f"stage3_{name}" if name in _STAGE_3 else name] = int(value) if key.kind == "count" else value
    for name in COMPARED:
        if train is not None and name in raw and (problem := _contradiction(name, raw[name], train)):
            problems.append(f"{name}: {problem}")
    if isinstance(raw.get("zero_optimization"), dict) and "stage" not in raw["zero_optimization"]:
        problems.append(f"zero_optimization.stage: missing. The engine zero{stage} is stage {stage}.")
    if problems:
        raise RecipeError(f"distributed.config: {path}:\n{listing(problems)}")
    return handed


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"distributed.config: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise RecipeError(f"distributed.config: {path} is not JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"distributed.config: {path} has no object at its top, as a DeepSpeed configuration has.")
    return raw


def _walk(raw: Mapping[str, Any], known: Mapping[str, Any], prefix: str, problems: list[str]) -> Iterator[tuple[str, Any, Key]]:
    """Every key that is known, with its path and value; to `problems`, those that are not."""
    for name, value in raw.items():
        where, key = f"{prefix}{name}", known.get(name)
        if key is None and not (known is TOP and name in COMPARED):
            names = [*known, *(COMPARED if known is TOP else ())]
            problems.append(f"{where}: no such key{suggest(name, names, _nothing)}")
        elif isinstance(key, Key):
            yield where, value, key
        elif isinstance(value, dict) and key is not None:
            yield from _walk(value, key, f"{where}.", problems)
        elif key is not None and value not in (None, AUTO):
            problems.append(f"{where}: expected an object, got {value!r}.")


def _nothing(name: str, known: Any) -> None:
    """Nothing: other tools' names of recipe keys are not meant in DeepSpeed's file."""


def _problem(where: str, value: Any, key: Key, stage: int) -> str | None:
    """What is wrong with a key's value; None if nothing."""
    if not _KINDS[key.kind][1](value) and value is not None:
        return f"{where}: expected {_KINDS[key.kind][0]}, got {value!r}."
    if where == "zero_optimization.stage":
        return None if value == stage else f"{where}: {value!r}, and the recipe's engine is zero{stage}. Make them agree."
    if key.neutral is not None and not any(_same(value, one) for one in key.neutral):
        return f"{where}: {value!r} is refused: {key.reason}"
    return None


def _same(value: Any, neutral: Any) -> bool:
    """Whether a value is a neutral one; a section that is off may have other keys."""
    if neutral == DISABLED and isinstance(value, dict):
        return value.get("enabled") is False
    return isinstance(value, bool) is isinstance(neutral, bool) and bool(value == neutral)


def _contradiction(name: str, value: Any, train: TrainConfig) -> str | None:
    """What is wrong with a key that the recipe has, too; None if they agree."""
    if value in (AUTO, None):
        return None
    if name == "optimizer":
        params = value.get("params", {}) if isinstance(value, dict) else None
        silent = isinstance(params, dict) and all(param == AUTO for param in params.values()) and value.get("type") == "AdamW"
        return None if silent else "it is train.optimizer, train.lr and train.weight_decay here. Leave it out."
    if not _number(value):
        return f"expected a number, got {value!r}."
    if name == "gradient_accumulation_steps":
        advice = (
            "a step's rows are train.rows_per_step or train.tokens_per_step, over all processes. Leave it out, or write auto."
        )
        return None if value == 1 else f"{value!r} is refused: {advice}"
    own = train.rows_per_step if name == "train_batch_size" else train.clip or 0
    key = "train.rows_per_step" if name == "train_batch_size" else "train.clip"
    return None if value == own else f"{value!r}, and {key} is {own or 'not given'}. Make them agree, or write auto."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[Kind, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number", lambda value: _number(value) and value >= 0 and value == int(value)),
    "number": ("a number", _number),
    "text": ("a text", lambda value: isinstance(value, str)),
    "any": ("anything", lambda value: True),
}
"""What a value may be: in words, and whether it is."""
