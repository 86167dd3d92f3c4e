"""How long a sum of so many float32 numbers over all processes takes: torchrun … -m at_scale.exchange NUMBERS. The first one prints seconds."""

import sys
import time
from statistics import median

import torch

from trimtab.core.processes import processes


def seconds(numbers: int, times: int = 9) -> float:
    """The median of several sums, after one that warms up; all begin together."""
    tensor, took = torch.zeros(numbers), []
    for _ in range(times + 1):
        processes.wait()
        started = time.perf_counter()
        processes.sum_(tensor)
        took.append(time.perf_counter() - started)
    return median(took[1:])


if __name__ == "__main__":
    processes.open()
    found = seconds(int(sys.argv[1]))
    if processes.first:
        print(found)
    processes.close()
