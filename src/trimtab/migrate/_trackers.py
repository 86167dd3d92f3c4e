"""Which trackers a run is shown in, and what they are told."""

from typing import Any

from trimtab.migrate._settings import NOTHING, Settings

SWITCHES = {
    "use_wandb": "wandb",
    "use_swanlab": "swanlab",
    "swanlab": "swanlab",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_trackio": "trackio",
}
NAMING = {
    "wandb_project": "wandb",
    "mlflow_tracking_uri": "mlflow",
    "mlflow_experiment_name": "mlflow",
    "trackio_project_name": "trackio",
}
"""Settings of Axolotl that switch a tracker on by being there."""
KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "wandb": {
        "project": ("wandb_project",),
        "entity": ("wandb_entity",),
        "run": ("wandb_name", "wandb_run_name"),
        "mode": ("wandb_mode",),
    },
    "swanlab": {
        "project": ("swanlab_project",),
        "workspace": ("swanlab_workspace",),
        "run": ("swanlab_run_name", "swanlab_experiment_name", "swanlab_exp_name"),
        "mode": ("swanlab_mode",),
    },
    "mlflow": {"project": ("mlflow_experiment_name",), "uri": ("mlflow_tracking_uri",), "run": ("mlflow_run_name",)},
    "trackio": {"project": ("trackio_project_name", "project"), "run": ("trackio_run_name",)},
    "tensorboard": {},
}
"""Each tracker's keys, and other tools' settings for them."""
MODES = {"offline": "offline", "dryrun": "offline", "local": "offline", "online": "online"}
OFF = "disabled"


def trackers(settings: Settings) -> None:
    """Trackers by name, or as mappings where more was said of them."""
    chosen = _chosen(settings)
    written: list[Any] = []
    for name in chosen:
        told: dict[str, Any] = {
            key: settings.given[one] for key, names in KEYS[name].items() if (one := _given(settings, *names))
        }
        if settings.given.get("run_name"):
            told.setdefault("run", settings.given["run_name"])
        if "mode" in told and (mode := MODES.get(told.pop("mode"))):
            told["mode"] = mode
        written.append({"name": name, **told} if told else name)
    for name, setting in chosen.items():
        settings.write(setting, "track", written, "" if name in written else "with what else was said of it")
    done = set(chosen.values())
    for setting in [
        *SWITCHES,
        *NAMING,
        "run_name",
        *(one for keys in KEYS.values() for names in keys.values() for one in names),
    ]:
        if setting in done or settings.given.get(setting) in NOTHING:
            continue
        done.add(setting)
        owner = next((name for name, keys in KEYS.items() if any(setting in names for names in keys.values())), None)
        used = bool(chosen) if setting == "run_name" else owner in chosen
        settings.settle(setting, "derived" if used else "unset", "part of track" if used else "")


def _chosen(settings: Settings) -> dict[str, str]:
    """The trackers that are switched on, each with the setting that does so; of others is said that they are not there."""
    chosen: dict[str, str] = {}
    given = settings.given.get("report_to")
    named = [given] if isinstance(given, str) else given or []
    here = [name for name in named if name in KEYS]
    chosen |= dict.fromkeys(here, "report_to")
    if others := [name for name in named if name not in (*KEYS, "none")]:
        said = f"{', '.join(map(str, others))}: there are {', '.join(KEYS)}, by name"
        settings.settle("report_to", "missing", said)
    elif given is not None and not here:
        settings.settle("report_to", "unset")
    for setting, name in (SWITCHES | NAMING).items():
        if settings.given.get(setting) not in (*NOTHING, False):
            chosen.setdefault(name, setting)
    modes = {name: _given(settings, *KEYS[name].get("mode", ())) for name in chosen}
    off = [name for name, mode in modes.items() if mode and settings.given[mode] == OFF]
    if "use_wandb" in settings.given and not settings.given["use_wandb"]:
        off.append("wandb")
    return {name: setting for name, setting in chosen.items() if name not in off}


def _given(settings: Settings, *names: str) -> str | None:
    return next((name for name in names if settings.given.get(name) not in NOTHING), None)
