"""What processes agree on before they train: the same files on every machine, and a plan that all have memory for."""

import math
from pathlib import Path

from trimtab.base import Base
from trimtab.core.processes import processes
from trimtab.data import LoadedData
from trimtab.engine import MemoryPlan


def agree_on_files(base: Base, data: LoadedData) -> None:
    """Raise ProcessesDiffer if another machine has another model or other data; which files of the data differ is said."""
    advice = "Have the same files on every machine."
    processes.agree(f"the base model {base.source}: {advice}", base.fingerprint)
    files = processes.tell([[Path(path).name, digest] for path, digest in data.plain()["files"].items()])
    names = dict.fromkeys(
        name for of_one in files for name, digest in of_one if any([name, digest] not in other for other in files)
    )
    listed = f" ({', '.join(names)})" if names else ""
    processes.agree(f"the data{listed}: {advice}", data.digest)


def least_memory(own: MemoryPlan) -> MemoryPlan:
    """The plan of the process that has least memory, which all follow: they have the same packs."""
    plans = [plan for plan in map(MemoryPlan.from_plain, processes.tell(own.plain())) if plan is not None]
    return min(plans, key=lambda plan: (plan.pack_tokens, math.inf if plan.pack_limit is None else plan.pack_limit))
