"""The free memory, by every limit on this process, and its peak memory.

All functions read Linux's files below `root`; on other systems there are none, and the memory is unknown.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.core.processes import processes

ROOT = Path("/")


class Version(NamedTuple):
    """The files of a version of control groups."""

    limits: tuple[str, ...]
    used: str
    reclaimed: tuple[str, ...]
    """Keys of `memory.stat` that count as used and are reclaimed under pressure, such as the page cache."""
    mapped: str
    """The part of those in use: mapped files, such as weights."""


GROUPS = {
    "cgroup2": Version(
        ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"), "file_mapped"
    ),
    "cgroup": Version(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), "total_mapped_file"
    ),
}
"""By file system."""


def free_memory(device: torch.device, root: Path = ROOT) -> float:
    """Bytes that this process may still take on the device, or of the host's memory, its part of it; inf if unknown."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and all(hasattr(module, name) for name in ("mem_get_info", "memory_reserved", "memory_allocated")):
        held = module.memory_reserved(device) - module.memory_allocated(device)  # by the allocator, for tensors to come
        return float(module.mem_get_info(device)[0] + held)
    return max(0.0, min([math.inf, *_limits(root)])) / processes.local_size


def _limits(root: Path) -> Iterator[float]:
    """The free memory by the machine, by each control group around this process, and by its own limits (ulimit)."""
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable" in meminfo:
        yield 1024 * meminfo["MemAvailable"]
    for group, version in control_groups(root):
        stat = _numbers(group / "memory.stat")
        limits = [stat.get("hierarchical_memory_limit", math.inf), *(_number(group / name) for name in version.limits)]
        files = max(0.0, sum(stat.get(name, 0) for name in version.reclaimed) - stat.get(version.mapped, 0))
        yield min(limits) - _number(group / version.used, 0.0) + files
    process, limits_of = _numbers(root / "proc/self/status"), _text(root / "proc/self/limits")
    for name, taken in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        if (limit := re.search(rf"^{name} +(\d+)", limits_of, re.MULTILINE)) and taken in process:
            yield float(limit[1]) - 1024 * process[taken]


def control_groups(root: Path = ROOT) -> Iterator[tuple[Path, Version]]:
    """The control groups that limit this process's memory, from the inside: its own, a job's, a user's, a container's."""
    paths = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), after.split(" ")  # options in between may be missing
        if kind == "cgroup" and "memory" not in options.split(","):
            continue
        matches = {"cgroup2": lambda names: names == "", "cgroup": lambda names: "memory" in names.split(",")}.get(kind)
        path = next((path for _, names, path in paths if matches is not None and matches(names)), None)
        if path is None:
            continue
        top = root / fields[4].lstrip("/")
        inner = Path(path)
        with suppress(ValueError):  # a container may see its own group as the top, with its path outside
            inner = inner.relative_to(fields[3])
        place = top / str(inner).lstrip("/")
        for group in (place, *place.parents) if ".." not in inner.parts and place.exists() else (top,):
            yield group, GROUPS[kind]
            if group == top:
                break


class PeakMemory:
    """The most memory that this process holds from now on, on the device or the host."""

    def __init__(self, device: torch.device, already: float = 0.0, root: Path = ROOT) -> None:
        """
        Args:
            already: Bytes that are held now and count as taken later.
        """
        self.device, self.root = device, root
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # without permission, the peak so far counts, too
                switch = os.open(root / "proc/self/clear_refs", os.O_WRONLY)
                os.write(switch, b"5")
                os.close(switch)
        now = self._now("VmRSS", "allocated_bytes.all.current")
        self.start = None if now is None else now - already

    @property
    def highest(self) -> float | None:
        """Bytes; None if unknown."""
        return self._now("VmHWM", "allocated_bytes.all.peak")

    def _now(self, host: str, device: str) -> float | None:
        if self.device.type == "cuda":
            stats: dict[str, Any] = torch.cuda.memory_stats(self.device)
            return float(stats[device])
        kibibytes = _numbers(self.root / "proc/self/status").get(host)
        return None if kibibytes is None else 1024 * kibibytes


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _numbers(path: Path) -> dict[str, float]:
    """A file of lines with a name and a number; units are dropped."""
    return {name: float(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _number(path: Path, otherwise: float = math.inf) -> float:
    """The number in a file; `otherwise` for 'max' and where there is no file."""
    text = _text(path).strip()
    return float(text) if text.isdigit() else otherwise
