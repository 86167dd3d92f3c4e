"""The memory that this process may still take, by every limit on it, and the most that it has taken.

Every function reads Linux's files below `root`; on other systems there are none, and nothing is known.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path("/")


class Version(NamedTuple):
    """The files in which a version of control groups keeps its numbers."""

    limits: tuple[str, ...]
    used: str
    reclaimed: tuple[str, ...]
    """Of `memory.stat`, what counts as used and is given back when it is needed: the page cache, …"""
    mapped: str
    """… and the part of that in use: files that are mapped, such as weights."""


GROUPS = {
    "cgroup2": Version(
        ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"), "file_mapped"
    ),
    "cgroup": Version(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), "total_mapped_file"
    ),
}
"""By the kind of file system."""


def free_memory(device: torch.device, root: Path = ROOT) -> float:
    """Bytes that this process may still take on the device, or of the host's memory; inf if the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    return max(0.0, min([math.inf, *_left(root)]))


def _left(root: Path) -> Iterator[float]:
    """What the machine, each control group around this process, and its own limits (ulimit) leave."""
    known = _numbers(root / "proc/meminfo")
    if "MemAvailable" in known:
        yield 1024 * known["MemAvailable"]
    for group, version in control_groups(root):
        said = _numbers(group / "memory.stat")
        limits = [said.get("hierarchical_memory_limit", math.inf), *(_number(group / name) for name in version.limits)]
        files = max(0.0, sum(said.get(name, 0) for name in version.reclaimed) - said.get(version.mapped, 0))
        yield min(limits) - _number(group / version.used, 0.0) + files
    process, limits_of = _numbers(root / "proc/self/status"), _text(root / "proc/self/limits")
    for name, taken in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        if (found := re.search(rf"^{name} +(\d+)", limits_of, re.MULTILINE)) and taken in process:
            yield float(found[1]) - 1024 * process[taken]


def control_groups(root: Path = ROOT) -> Iterator[tuple[Path, Version]]:
    """The control groups that limit this process's memory, its own first, then those around it: a job's, a user's, a container's."""
    paths = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *_, options) = before.split(), after.split(" ")  # what is between may be empty
        if kind == "cgroup" and "memory" not in options.split(","):
            continue
        wanted = {"cgroup2": lambda names: names == "", "cgroup": lambda names: "memory" in names.split(",")}.get(kind)
        path = next((path for _, names, path in paths if wanted is not None and wanted(names)), None)
        if path is None:
            continue
        top = root / fields[4].lstrip("/")
        inner = Path(path)
        with suppress(ValueError):  # a container may see its own group as the top, and be told its path outside
            inner = inner.relative_to(fields[3])
        place = top / str(inner).lstrip("/")
        for group in (place, *place.parents) if ".." not in inner.parts and place.exists() else (top,):
            yield group, GROUPS[kind]
            if group == top:
                break


class Peak:
    """The most memory that this process holds from now on, on the device, or of the host's."""

    def __init__(self, device: torch.device, already: float = 0.0, root: Path = ROOT) -> None:
        """
        Args:
            already: Bytes held by now that count as taken from now on.
        """
        self.device, self.root = device, root
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # where it may not, the most so far counts, too
                switch = os.open(root / "proc/self/clear_refs", os.O_WRONLY)
                os.write(switch, b"5")
                os.close(switch)
        now = self._now("VmRSS", "allocated_bytes.all.current")
        self.start = None if now is None else now - already

    @property
    def most(self) -> float | None:
        """Bytes; None if the system does not say."""
        return self._now("VmHWM", "allocated_bytes.all.peak")

    def _now(self, host: str, device: str) -> float | None:
        if self.device.type == "cuda":
            said: dict[str, Any] = torch.cuda.memory_stats(self.device)
            return float(said[device])
        found = _numbers(self.root / "proc/self/status").get(host)
        return None if found is None else 1024 * found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _numbers(path: Path) -> dict[str, float]:
    """A file of names and numbers, a pair a line; without units."""
    return {name: float(number) for name, number in re.findall(r"^(\w+):?\s+(\d+)", _text(path), re.MULTILINE)}


def _number(path: Path, otherwise: float = math.inf) -> float:
    """The number in a file; `max` is none."""
    text = _text(path).strip()
    return float(text) if text.isdigit() else otherwise
