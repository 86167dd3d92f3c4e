"""The parts by their names: functions of the machine and the part's name that return what is said of it."""

from on_gpu.right import attention, deterministic, layers, passes, trap
from on_gpu.speed import ceilings, decoding, micro, probe
from on_gpu.training import ours, peers, profile

NAMES = {
    "1.5B ours": "ours", "1.5B peers": "peers", "7B ours": "ours", "7B peers": "peers",
    **{name: name for name in ("probe", "ceilings", "attention", "passes", "layers", "trap", "deterministic", "micro", "profile", "decoding")},
}  # fmt: skip
__all__ = [
    "NAMES", "attention", "ceilings", "decoding", "deterministic", "layers", "micro", "ours", "passes", "peers", "probe", "profile", "trap",
]  # fmt: skip
