"""ZeRO-1 of DeepSpeed: the optimizer's state is divided among the processes."""

from typing import ClassVar

from trimtab.distributed._deepspeed import PartitioningEngine


class ZeRO1(PartitioningEngine):
    """DeepSpeed divides what AdamW holds among the processes; the base model is whole on each. It pays for methods that train much, such as
    `full`: an adapter's state is small."""

    stage: ClassVar[int] = 1
    divides: ClassVar[str] = "the optimizer's state is"
