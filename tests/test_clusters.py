"""The commands for clusters in docs/scale.md, on one machine that plays two: every process hears who it is and where the others are."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from worlds import WHOLE, make_model, write_rows

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
SBATCH = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "#SBATCH" in block]
JOB = next(
    document
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    for document in yaml.safe_load_all(block)
    if document.get("kind") == "Job"
)
STUB = """
    import json, os, sys
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = {name: os.environ.get(name) for name in names} | {"words": sys.argv[1:]}
    open(f"said-{said['RANK']}.json", "x").write(json.dumps(said))
    sys.exit(int(os.environ.get("ENDS_WITH", "0")) if said["RANK"] == "1" else 0)
"""
"""In place of Trimtab; process 1 ends with the exit code of the environment."""
SRUN = """
    import os, subprocess, sys
    words = sys.argv[2:] if sys.argv[1].startswith("--") else sys.argv[1:]
    nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    started = [
        subprocess.Popen(words, env=os.environ | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % tasks), "SLURM_NODEID": str(n // tasks)})
        for n in range(nodes * tasks)
    ]
    sys.exit(max(one.wait() for one in started))
"""
"""As srun starts processes on all machines of a job; its exit code is the highest of theirs."""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with stand-ins, in which commands run; returns a function that runs one and what its processes said."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "trimtab").mkdir()
    (tmp_path / "trimtab" / "__init__.py").touch()
    (tmp_path / "trimtab" / "__main__.py").write_text(textwrap.dedent(STUB))
    for name, text in {"srun": SRUN, "scontrol": "print('localhost\\nlocalhost')\n"}.items():
        (programs / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_", "TORCHELASTIC"))}

    def run(*commands, code=0, **variables):
        environment = plain | {"PATH": path, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(command, env=environment | variables | own, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            for command, own in commands
        ]
        errors = [one.communicate(timeout=120)[1] for one in started]
        assert [one.returncode for one in started] == [code] * len(started), errors
        said = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("said-*.json"))]
        for file in tmp_path.glob("said-*.json"):
            file.unlink()
        return said

    return run


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def places(said):
    """Rank and number on the machine of each; all have to know the same meeting place, and the command."""
    assert len({(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in said}) == 1
    assert {tuple(one["words"]) for one in said} == {("train", "train.yaml")}
    assert int(said[0]["WORLD_SIZE"]) == len(said)
    assert said[0]["MASTER_ADDR"]
    assert said[0]["MASTER_PORT"]
    return [(int(one["RANK"]), int(one["LOCAL_RANK"])) for one in said]


def job(script, gpus):
    """A script, and what SLURM would say in its environment, with so many GPUs a machine."""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    tasks = 1 if asked["ntasks-per-node"] == "1" else gpus
    variables = {"SLURM_NNODES": asked["nodes"], "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_JOB_NODELIST": "gpu[1-2]"}
    variables |= {"SLURM_NTASKS": str(2 * tasks), "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": str(gpus)}
    return ["bash", "-c", script.replace("29500", free_port())], variables


def test_slurm_with_torchrun(machine):
    said = machine(job(SBATCH[0], 1))
    assert places(said) == [(0, 0), (1, 0)]
    assert "torchrun" in SBATCH[0]


def test_slurm_alone(machine):
    assert places(machine(job(SBATCH[1], 2))) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert len(machine(job(SBATCH[1], 2), code=3, ENDS_WITH="3")) == 4  # Trimtab's own exit code


@pytest.mark.skipif(not WHOLE, reason="make whole")
@pytest.mark.parametrize("script", SBATCH, ids=["torchrun", "alone"])
def test_slurm_trains(script, machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("trimtab")  # the stand-in
    make_model(Path("tiny"), 0)
    write_rows(Path("rows.jsonl"), [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(40)])
    recipe = {"model": "tiny", "data": {"train": "rows.jsonl", "eval": 8}, "train": {"rows_per_step": 16, "lr": 2e-3}}
    Path("train.yaml").write_text(json.dumps(recipe | {"output": "run"}))
    machine(job(script, 1), PYTHONPATH=str(Path(__file__).parents[1] / "src"), TRIMTAB_CACHE=str(tmp_path / "cache"))
    run = json.loads(Path("run/run.json").read_text())
    assert (run["status"], run["processes"]) == ("done", 2)
    assert json.loads(Path("run/certificate.json").read_text())["passed"]


def test_the_scripts_ask_for_what_they_use():
    assert len(SBATCH) == 2
    for script in SBATCH:
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
        assert asked["signal"].startswith("TERM@")
        assert "B:" not in asked["signal"]  # to the processes, not to the script alone
        assert int(asked["ntasks-per-node"]) in (1, int(asked["gpus-per-node"]))
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_kubernetes(machine):
    spec = JOB["spec"]
    pod, port = spec["template"]["spec"], free_port()
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"  # which names pods JOB-INDEX, and says the index in the environment
    assert f"--nnodes={spec['completions']}" in container["command"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    where = f"--master-addr={JOB['metadata']['name']}-0.{pod['subdomain']}"
    assert where in container["command"]

    def command(index):
        changed = {
            "$(JOB_COMPLETION_INDEX)": str(index),
            "29500": port,
            "per-node=8": "per-node=1",
            where: "--master-addr=127.0.0.1",
        }
        words = list(container["command"])
        for old, new in changed.items():
            assert any(old in word for word in words)
            words = [word.replace(old, new) for word in words]
        return words, {}

    assert places(machine(command(0), command(1))) == [(0, 0), (1, 0)]
    sentence = next(line for line in PAGE.splitlines() if "PyTorchJob" in line)
    words = shlex.split(re.findall("`(torchrun [^`]*)`", sentence)[0])
    assert places(machine((words, {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": port}))) == [(0, 0), (1, 1)]


def test_what_is_wrong_is_noticed(machine):
    script, variables = job(SBATCH[1], 2)
    wrong = script[2].replace("WORLD_SIZE=$SLURM_NTASKS ", "WORLD_SIZE=2 ")
    assert wrong != script[2]
    said = machine(([*script[:2], wrong], variables))
    with pytest.raises(AssertionError):
        places(said)
