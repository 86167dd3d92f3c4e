"""How long, how fast and with what is trained: the settings that all tools have from Transformers' Trainer."""

from typing import Any

from trimtab.migrate._devices import engine
from trimtab.migrate._settings import OFF, Settings
from trimtab.migrate._trackers import trackers

SCHEDULES = {
    "cosine": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd", "inverse_sqrt": "inverse_sqrt",
}  # fmt: skip
NEAREST = {
    "polynomial": "linear", "cosine_with_restarts": "cosine", "cosine_warmup_with_min_lr": "cosine", "one_cycle": "cosine", "rex": "linear",
    "reduce_lr_on_plateau": "constant", "greedy": "constant",
}  # fmt: skip
ADAMW = "adamw_torch adamw_torch_fused adamw_hf adamw adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused".split()  # noqa: SIM905
EIGHT_BIT = "adamw_8bit adamw_bnb_8bit adamw_torch_8bit".split()  # noqa: SIM905
PAGED = "paged_adamw paged_adamw_32bit paged_adamw_8bit".split()  # noqa: SIM905
OTHER = {"adafactor": "adafactor", "muon": "muon"}


def training(settings: Settings, per_device: str, devices: int, packed: int | None = None) -> None:
    """All of it.

    Args:
        per_device: What the tool calls the examples of a micro-batch on each device.
        packed: The tokens that a packed sequence holds, if `per_device` counts such.
    """
    _length(settings)
    _batch(settings, per_device, devices, packed)
    engine(settings, devices)
    _rate(settings)
    _optimizer(settings)
    _intervals(settings)
    _precision(settings)
    trackers(settings)
    said = "train.recompute is auto: gradient checkpointing is used as far as memory asks for it"
    for name in (
        "gradient_checkpointing",
        "disable_gradient_checkpointing",
        "activation_checkpointing",
        "use_gradient_checkpointing",
    ):
        settings.derive(name, said=said)


def _length(settings: Settings) -> None:
    steps = settings.get("max_steps")
    epochs = settings.first("num_train_epochs", "num_epochs")
    if steps and steps > 0:
        settings.put("max_steps", int(steps))
        for name in ("num_train_epochs", "num_epochs"):
            settings.settle(name, "unset", "max_steps decides")
        return
    settings.settle("max_steps", "unset")
    if epochs:
        settings.put(epochs, float(settings.get(epochs)))


def _batch(settings: Settings, per_device: str, devices: int, packed: int | None) -> None:
    each, accumulated = int(settings.get(per_device) or 1), settings.get("gradient_accumulation_steps")
    total = settings.get("batch_size")
    if total and not settings.given.get("gradient_accumulation_steps"):
        accumulated = max(1, int(total) // each)
    count = each * int(accumulated or 1) * devices
    on = f"{devices} devices" if devices > 1 else "1 device (convert with --devices N for more)"
    said = f"effective batch size: {each} × {accumulated or 1} on {on}"
    if packed is None:
        settings.put(per_device, count, said, like="rows_per_step")
    else:
        settings.put(per_device, count * packed, f"{said}, of {packed:,} tokens each", like="tokens_per_step")
    settings.derive("gradient_accumulation_steps", "batch_size", said="part of the effective batch size")


def _rate(settings: Settings) -> None:
    rate = settings.first("learning_rate")
    if rate:
        settings.put(rate, float(settings.get(rate)))
    name = settings.first("lr_scheduler_type", "lr_scheduler")
    given = str(settings.get(name)) if name else "linear"
    if name and given in SCHEDULES:
        settings.put(name, SCHEDULES[given])
    elif name:
        nearest = NEAREST.get(given, "cosine")
        settings.put(name, nearest, f"{given} is not there; {nearest} is the nearest")
    more = settings.get("lr_scheduler_kwargs")
    if isinstance(more, dict):
        _schedule_details(settings, dict(more))
    floor = settings.get("cosine_min_lr_ratio")
    if floor is not None:
        settings.put("cosine_min_lr_ratio", float(floor))
    _warmup(settings, given)


def _schedule_details(settings: Settings, more: dict[str, Any]) -> None:
    """`lr_scheduler_kwargs`, which hold what the schedule needs."""
    peak = settings.get("learning_rate")
    floor = more.pop("min_lr_rate", more.pop("min_lr_ratio", None))
    if (lowest := more.pop("min_lr", None)) is not None and floor is None and peak:
        floor = float(lowest) / float(peak)
    said = []
    if floor is not None:
        settings.put("lr_scheduler_kwargs", float(floor), like="min_lr_rate")
        said.append("the floor")
    if (steps := more.pop("num_decay_steps", None)) is not None:
        settings.put("lr_scheduler_kwargs", steps, like="num_decay_steps")
        said.append("the decay")
    if more:
        settings.settle("lr_scheduler_kwargs", "missing", f"{', '.join(more)}: the schedule has no such setting here")


def _warmup(settings: Settings, schedule: str) -> None:
    name = settings.first("warmup_steps", "warmup_ratio")
    value = settings.get(name) if name else 0
    ratio = settings.given.get("warmup_ratio")
    if not value and ratio:
        name, value = "warmup_ratio", ratio
    for other in {"warmup_steps", "warmup_ratio"} - {name}:
        settings.settle(other, "unset")
    if schedule == "constant":
        settings.put(name or "warmup_ratio", 0, "the schedule `constant` of Transformers has no warm-up")
    elif settings.tool == "Axolotl" and name is None:
        settings.put("warmup_ratio", 0.03, "Axolotl's default: 3 % of the steps, and at most 100")
    else:
        settings.put(name or "warmup_steps", value)


def _optimizer(settings: Settings) -> None:
    name = settings.first("optim", "optimizer")
    given = str(settings.get(name)) if name else ""
    said, kind, more = "", "adamw", dict[str, Any]()
    if settings.on("use_muon"):
        name, kind = "use_muon", "muon"
    elif given in OTHER:
        kind = OTHER[given]
    elif given in EIGHT_BIT:
        kind = "adamw_8bit"
    elif given in PAGED:
        kind, more = "adamw_8bit", {"paged": True}
        said = "" if given.endswith("8bit") else f"{given} in 32 bits is not there: paged, with a state of 8 bits"
    elif name and given not in ADAMW:
        said = f"{given} is not there; adamw is the nearest"
    betas = [settings.get("adam_beta1"), settings.get("adam_beta2")]
    if any(settings.given.get(beta) for beta in ("adam_beta1", "adam_beta2")) and betas != [0.9, 0.999] and kind != "adafactor":
        more["betas"] = [float(default if beta is None else beta) for beta, default in zip(betas, (0.9, 0.999), strict=True)]
        settings.derive("adam_beta1", "adam_beta2", said="train.optimizer.betas")
    epsilon = settings.get("adam_epsilon")
    if epsilon and float(epsilon) != 1e-8 and kind != "adafactor":
        more["eps"] = float(epsilon)
        settings.derive("adam_epsilon", said="train.optimizer.eps")
    for beta in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if not more or beta not in {setting.name for setting in settings.settled}:
            settings.settle(beta, "unset")
    if name in settings.given or more:
        settings.put(name or "optim", {"name": kind, **more} if more else kind, said)
    clip = settings.get("max_grad_norm")
    if clip is not None and "max_grad_norm" in settings.given:
        settings.put("max_grad_norm", float(clip) if clip else None)


def _intervals(settings: Settings) -> None:
    """When the model is evaluated and saved. What counts epochs needs the number of steps, which only the run knows."""
    strategies, unknown = ("steps", None), "it counts by epochs: a quarter of the run, unless given in steps"
    for steps, strategy, per_epoch in (
        ("eval_steps", settings.first("eval_strategy", "evaluation_strategy"), "evals_per_epoch"),
        ("save_steps", "save_strategy", "saves_per_epoch"),
    ):
        how, every = settings.get(strategy) if strategy else None, settings.given.get(steps)
        if how in strategies and every and float(every) >= 1:
            settings.put(steps, int(every))
        elif every and float(every) < 1:
            settings.derive(steps, said="a fraction of the run: a quarter of it, unless given in steps")
        for name in (strategy, per_epoch):
            value = settings.given.get(name) if name else None
            if value in OFF or value == "steps":
                settings.settle(str(name), "unset")
            elif value is not None:
                settings.settle(str(name), "derived", unknown)


def _precision(settings: Settings) -> None:
    name = next(
        (
            name
            for name in ("bf16", "bfloat16", "pure_bf16", "fp16", "float16", "float32")
            if settings.given.get(name) not in NOT_GIVEN
        ),
        None,
    )
    if name is None:
        return
    if settings.get(name) in ("auto", "full"):
        settings.derive(name, said="model.dtype is auto: bfloat16 on an accelerator that computes in it, float32 on a CPU")
    else:
        said = "the base model alone: the adapter's weights are float32" if name == "pure_bf16" else ""
        settings.put(name, "float16" if name in ("fp16", "float16") else "float32" if name == "float32" else "bfloat16", said)


NOT_GIVEN: tuple[Any, ...] = (None, "", *OFF)
