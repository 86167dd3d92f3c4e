"""ZeRO-2 of DeepSpeed: the optimizer's state, and the gradients that it takes, are divided among the processes."""

from typing import ClassVar

from trimtab.distributed._deepspeed import PartitioningEngine


class ZeRO2(PartitioningEngine):
    """DeepSpeed divides what AdamW holds, and the sums of gradients that it takes, among the processes; the base model is whole on each."""

    stage: ClassVar[int] = 2
    divides: ClassVar[str] = "the optimizer's state and gradients are"
