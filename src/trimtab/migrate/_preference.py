"""Preference objectives: what their losses and weights are called."""

from typing import Any

from trimtab.migrate._settings import Settings

DPO_LOSSES = {"sigmoid": "sigmoid", "dpo": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
KEYS = {
    "dpo": ("beta", "loss_type", "label_smoothing", "sft", "reference"),
    "kto": ("beta", "desirable", "undesirable", "reference"),
    "orpo": ("weight",),
    "simpo": ("beta", "gamma"),
    "cpo": ("beta", "sft"),
}
"""Keys that other tools have a setting for."""


def objective(settings: Settings, name: str, kind: str, beta: str | None, said: str = "") -> None:
    """An objective and its numbers. Where answers are compared, TRL and all that build on it switch dropout off.

    Args:
        name: The setting that names it.
        beta: The setting that is its β, or orpo's λ.
    """
    settings.put(name, kind, said, like="rl")
    if settings.on("lora_dropout"):
        settings.put("lora_dropout", 0.0, f"{settings.tool} switches dropout off for {kind}")
    if beta and settings.get(beta) is not None:
        settings.put(beta, float(settings.get(beta)), like="orpo_alpha" if kind == "orpo" else "beta")
    for here, names in {
        "label_smoothing": ("label_smoothing", "dpo_label_smoothing"),
        "desirable": ("desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
        "undesirable": ("undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
        "gamma": ("simpo_gamma",),
        "sft": ("pref_ftx", "rpo_alpha"),
        "reference": ("ref_model",),
    }.items():
        given = settings.first(*names)
        if given and here in KEYS.get(kind, ()):
            value = settings.get(given)
            if value or given in settings.given:
                settings.put(given, value if here == "reference" else float(value))
        elif given and given in settings.given:
            settings.settle(given, "unset", f"{kind} has no such setting")


def dpo_loss(settings: Settings, name: str) -> None:
    """DPO's `loss_type`: one, or several with weights, of which supervised fine-tuning may be one."""
    value: Any = settings.get(name) or "sigmoid"
    losses = value if isinstance(value, list) else [value]
    weights = settings.get("loss_weights", "dpo_loss_weights") or [1.0] * len(losses)
    by_loss = dict(zip(losses, weights, strict=False))
    if "sft" in by_loss and len(by_loss) == 2:
        settings.write(settings.first("loss_weights", "dpo_loss_weights") or name, "objective.sft", float(by_loss.pop("sft")))
    (loss, weight), *others = by_loss.items()
    if loss not in DPO_LOSSES or others or weight != 1.0:
        settings.refuse(name, f"{', '.join(DPO_LOSSES)} are there, one at a time, with sft beside it")
    settings.put(name, DPO_LOSSES[loss], like="loss_type")
