"""`devices: N`: the processes of a run, started by torch's launcher; and what other launchers have started."""

import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.core.errors import ProcessLost, RecipeError
from trimtab.core.interrupts import INTERRUPTED
from trimtab.core.process import module_command
from trimtab.core.processes import processes
from trimtab.core.streams import write_stderr

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SAVING = 600
"""Seconds that interrupted processes have to save what they have trained, before they are killed; torch's own are 30."""
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Signals that torch's launcher gives to the processes."""
LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": ("torchrun", "--nproc-per-node"),
    "ACCELERATE_MIXED_PRECISION": ("accelerate launch", "--multi_gpu --num_processes"),
    "CROSS_RANK": ("deepspeed", "--num_gpus"),
}
"""Launchers by a variable that each sets, and their option for the number of processes."""


def launcher() -> tuple[str, str] | None:
    """The launcher that has started this process and its option for the number of processes, if one has."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # which starts torch's launcher for several processes
        return LAUNCHERS["ACCELERATE_MIXED_PRECISION"]
    return next((found for variable, found in LAUNCHERS.items() if variable in os.environ), None)


def starts_processes(devices: int) -> bool:
    """Whether this process starts those that carry out the command, rather than being one of them."""
    return devices > 1 and processes.started == 1 and launcher() is None


def refuse_other_devices(devices: int, device: str) -> None:
    """Raise RecipeError if the recipe asks for another number of processes than there is, or for devices that they don't have.

    Args:
        device: As in the recipe.
    """
    if processes.started > 1 and processes.local_size > 1:
        share_processor(processes.local_size, device)
    if devices in (1, processes.started):
        return
    found = launcher()
    if found is None and processes.started == 1:
        raise RecipeError(f"devices: {devices}: this is one process. `trimtab train` starts as many, and so does torchrun.")
    name, option = found or ("the launcher", "its number of processes")
    raise RecipeError(
        f"devices: {devices}, and {name} has started {processes.started}. Leave devices out, or start as many with {option} {devices}."
    )


def one_process_notice() -> str | None:
    """What to say if a launcher has started this process alone."""
    found = launcher()
    if processes.started > 1 or found is None:
        return None
    name, option = found
    return f"{name} has started one process. {option} N starts N."


def start_processes(count: int, device: str, words: Sequence[str]) -> int:
    """Start processes that carry out the same command; returns the exit code of the first that fails, or 0.

    Args:
        device: As in the recipe. On a CPU each process gets its part of the cores, unless OMP_NUM_THREADS is set.
        words: The command line without the program's name.

    Raises:
        RecipeError: This machine has fewer such devices.
    """
    if share_processor(count, device):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    return start(count, [*module_command("trimtab"), *words])


def start(count: int, command: Sequence[str]) -> int:
    """Start processes of one command; returns the exit code of the first that fails, or 0."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the processes say what is wrong, and torch's tables would bury it
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="trimtab",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        if hasattr(config, "shutdown_timeout"):  # since torch 2.10
            config.shutdown_timeout = SAVING
        if hasattr(config, "signals_to_handle"):  # not those that are ignored, as under nohup
            config.signals_to_handle = ",".join(one.name for one in signal.Signals if _is_heard(one))
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return _exit_code(error, count)
        except SignalException:
            return INTERRUPTED
    return 0


def share_processor(count: int, device: str) -> bool:
    """Whether so many processes of this machine are on the CPU. Raises RecipeError if they are on devices of which it has fewer."""
    import torch

    kind, _, number = device.partition(":")
    if number:
        raise RecipeError(
            f"model.device: {device} is one device, for {count} processes on this machine. Say {kind}; CUDA_VISIBLE_DEVICES chooses among them."
        )
    if kind == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = found.type if found is not None else "cpu"
    if kind == "cpu":
        return True
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count > there:
        raise RecipeError(
            f"{count} processes on this machine, which has {there} of {kind}: start at most {max(there, 1)}, or set model.device to cpu."
        )
    return False


def _is_heard(number: signal.Signals) -> bool:
    return number.name in FORWARDED and signal.getsignal(number) is not signal.SIG_IGN


def _exit_code(error: "ChildFailedError", count: int) -> int:
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    rank, first = error.get_first_failure()
    if first.exitcode > 0:
        return first.exitcode
    if all(code < 0 for code in codes.values()) and len(codes) == count:  # nobody was left to say it
        write_stderr(
            f"process {rank} of {count} was killed by signal {-first.exitcode}. The same command resumes the run from its last checkpoint."
        )
    return ProcessLost.exit_code


def cores() -> int:
    """Of the processor, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
