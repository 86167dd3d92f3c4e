"""What memory is left, by files as kernels write them: limits of every group around a process, page caches, ulimit; and its peak."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch

from trimtab.base.available_memory import PeakMemory, control_groups, free_memory

CPU = torch.device("cpu")
MB = 1024 * 1024


def machine(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 64000 kB\nMemAvailable:   60000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def version_2(place, limit="max", used=0, inside="/sys/fs/cgroup", **stat):
    """A control group of version 2."""
    lines = "".join(f"{name} {value}\n" for name, value in stat.items())
    return {
        f"{inside[1:]}/{place}memory.max": f"{limit}\n",
        f"{inside[1:]}/{place}memory.current": f"{used}\n",
        f"{inside[1:]}/{place}memory.stat": lines,
    }


def version_1(place, limit=9223372036854771712, used=0, **stat):
    lines = "".join(f"{name} {value}\n" for name, value in stat.items())
    where = f"sys/fs/cgroup/memory/{place}"
    return {
        f"{where}memory.limit_in_bytes": f"{limit}\n",
        f"{where}memory.usage_in_bytes": f"{used}\n",
        f"{where}memory.stat": lines,
    }


def mounted_2(path="/", root="/", at="/sys/fs/cgroup"):
    return {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": f"25 1 0:22 / /proc rw - proc proc rw\n30 23 0:26 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    }


def mounted_1(path="/", root="/"):
    return {
        "proc/self/cgroup": f"9:name=systemd:/x\n4:cpu,memory:{path}\n0::/\n",
        "proc/self/mountinfo": (
            f"31 30 0:26 {root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            f"32 30 0:27 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        ),
    }


def test_a_machine_that_says_nothing_has_no_limit(tmp_path):
    assert free_memory(CPU, tmp_path) == math.inf


def test_what_the_machine_has(tmp_path):
    assert free_memory(CPU, machine(tmp_path, {})) == 60_000 * 1024


def test_a_containers_limit(tmp_path):
    root = machine(tmp_path, {**mounted_2(), **version_2("", 40 * MB, 30 * MB)})
    assert free_memory(CPU, root) == 10 * MB


def test_files_that_the_system_has_read_are_not_in_use_but_for_those_in_sight(tmp_path):
    """A container that has copied a model of its size has filled its page cache, and was refused any training."""
    said = dict(inactive_file=20 * MB, active_file=5 * MB, slab_reclaimable=1 * MB, file_mapped=4 * MB, anon=4 * MB)
    root = machine(tmp_path, {**mounted_2(), **version_2("", 40 * MB, 39 * MB, **said)})
    assert free_memory(CPU, root) == (1 + 20 + 5 + 1 - 4) * MB


@pytest.mark.parametrize("strict", ["", "system.slice/", "system.slice/job.scope/"])
def test_the_strictest_of_the_groups_around_a_process_counts(tmp_path, strict):
    """SLURM's and systemd's limits are of groups within the machine's, whose own has none."""
    files = mounted_2("/system.slice/job.scope")
    for place in ("", "system.slice/", "system.slice/job.scope/", "system.slice/other.scope/"):
        files |= version_2(place, 9 * MB if place == strict else 1 * MB if "other" in place else "max", 2 * MB)
    assert free_memory(CPU, machine(tmp_path, files)) == 7 * MB


def test_a_mount_without_a_source_is_one(tmp_path):
    files = {**mounted_2(), **version_2("", 8 * MB, 1 * MB)}
    files["proc/self/mountinfo"] = (
        "24 1 0:21 / /tmp rw - tmpfs tmpfs rw\n26 1 0:9 / /x rw - tmpfs  rw\n" + files["proc/self/mountinfo"]
    )
    assert free_memory(CPU, machine(tmp_path, files)) == 7 * MB


def test_what_throttles_is_a_limit(tmp_path):
    files = {
        **mounted_2("/a"),
        **version_2("", 40 * MB),
        **version_2("a/", 30 * MB, 1 * MB),
        "sys/fs/cgroup/a/memory.high": f"{5 * MB}\n",
    }
    assert free_memory(CPU, machine(tmp_path, files)) == 4 * MB


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),
        ("/docker/abc", "/docker/abc"),
        ("/docker/abc", "/"),
        ("/../../elsewhere", "/"),
        ("/docker/abc", "/docker/other"),
    ],
)
def test_inside_a_container_its_group_is_the_top(tmp_path, path, root):
    """Whatever it is told of where that is outside."""
    files = {**mounted_2(path, root), **version_2("", 8 * MB, 1 * MB)}
    assert free_memory(CPU, machine(tmp_path, files)) == 7 * MB


def test_groups_may_be_mounted_anywhere(tmp_path):
    files = {**mounted_2("/a", "/", "/groups"), **version_2("", inside="/groups"), **version_2("a/", 8 * MB, 1 * MB, "/groups")}
    assert free_memory(CPU, machine(tmp_path, files)) == 7 * MB


@pytest.mark.parametrize("strict", ["", "slurm/", "slurm/job_7/", "slurm/job_7/step_0/"])
def test_version_1_has_groups_within_groups_too(tmp_path, strict):
    files = mounted_1("/slurm/job_7/step_0")
    said = dict(inactive_file=7 * MB, total_inactive_file=3 * MB, total_active_file=2 * MB, total_mapped_file=1 * MB)
    for place in ("", "slurm/", "slurm/job_7/", "slurm/job_7/step_0/"):
        files |= version_1(place, **(dict(limit=9 * MB) if place == strict else {}), used=6 * MB, **said)
    assert free_memory(CPU, machine(tmp_path, files)) == (9 - 6 + 3 + 2 - 1) * MB


def test_version_1_says_the_limit_of_groups_that_a_container_does_not_see(tmp_path):
    files = {**mounted_1("/a", "/a"), **version_1("", used=2 * MB, hierarchical_memory_limit=9 * MB)}
    assert free_memory(CPU, machine(tmp_path, files)) == 7 * MB


def test_both_versions_at_once(tmp_path):
    """A hybrid machine: version 1 has the memory, version 2 has none."""
    files = {**mounted_1("/a"), **version_1(""), **version_1("a/", 9 * MB, 1 * MB)}
    files["proc/self/mountinfo"] += "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    (tmp_path / "sys/fs/cgroup/unified").mkdir(parents=True)
    root = machine(tmp_path, files)
    assert free_memory(CPU, root) == 8 * MB
    assert [str(place.relative_to(root)) for place, _ in control_groups(root)] == [
        "sys/fs/cgroup/memory/a", "sys/fs/cgroup/memory", "sys/fs/cgroup/unified",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "taken"), [("Max address space", "VmSize"), ("Max data size", "VmData")])
def test_ulimit(tmp_path, name, taken):
    files = {
        "proc/self/status": f"Name:\tpython\n{taken}:\t    3000 kB\nVmRSS:\t 1000 kB\n",
        "proc/self/limits": "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max cpu time              unlimited            unlimited            seconds   \n"
        f"{name:25} 8192000              unlimited            bytes     \n",
    }
    assert free_memory(CPU, machine(tmp_path, files)) == 8_192_000 - 3000 * 1024


def test_less_than_nothing_is_nothing(tmp_path):
    assert free_memory(CPU, machine(tmp_path, {**mounted_2(), **version_2("", 5 * MB, 9 * MB)})) == 0.0


def test_ulimit_is_seen_where_it_is_set():
    """The real thing, in a process of its own."""
    code = """
        import resource, torch
        from trimtab.base.available_memory import free_memory
        before = free_memory(torch.device("cpu"))
        taken = int(open("/proc/self/status").read().partition("VmSize:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (taken + 500_000_000, -1))
        print(before > 600_000_000, 400_000_000 < free_memory(torch.device("cpu")) <= 500_000_000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


# The peak


def test_the_peak_is_what_is_held_from_now_on():
    before = torch.ones(60_000_000)
    del before
    peak = PeakMemory(CPU)
    assert peak.highest - peak.start < 50e6
    held = torch.ones(40_000_000)
    assert peak.highest - peak.start == pytest.approx(160e6, rel=0.2)
    del held
    torch.ones(1_000_000)
    assert peak.highest - peak.start == pytest.approx(160e6, rel=0.2)


def test_what_is_held_already_may_count_as_taken():
    """As the moments that a checkpoint has brought, which the plan counts, too."""
    assert PeakMemory(CPU).start - PeakMemory(CPU, 50e6).start == pytest.approx(50e6, abs=5e6)


def test_where_nobody_says_it_is_not_known(tmp_path):
    peak = PeakMemory(CPU, root=tmp_path)
    assert (peak.start, peak.highest) == (None, None)


@pytest.mark.parametrize("policy", ["never_keep_freed_memory()", ""])
def test_freed_blocks_are_given_back(policy):
    """What is in use is what is held. The control: malloc by itself keeps blocks of up to 32 MB once it has freed one of that size."""
    code = f"""
        import torch
        from trimtab.core.process import never_keep_freed_memory
        {policy}
        def held():
            return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0]) / 1000
        large = torch.ones(8_000_000)
        del large
        start, blocks = held(), [torch.ones(2_000_000) for _ in range(40)]
        del blocks[:-1]
        print(held() - start)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (float(done.stdout) < 20) == bool(policy), (done.stdout, done.stderr)
