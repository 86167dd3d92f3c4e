"""The processes that train together: how they divide their work, and what an error or an interrupt of one is to all."""

import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trimtab.core.errors import ProcessLost
from trimtab.core.interrupts import REPEAT_WINDOW, noting_interrupts
from trimtab.core.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch import Tensor


class Processes(ProcessGroup):
    """A group of processes that work together."""

    # Work

    def share(self, costs: Sequence[float]) -> list[list[int]]:
        """The tasks of these costs by process: the dearest first, to whoever has least (Graham 1969, "Bounds on Multiprocessing Timing
        Anomalies"). Every process finds the same."""
        shares: list[list[int]] = [[] for _ in range(self.started)]
        loads = [(0.0, rank) for rank in range(self.started)]
        for task in sorted(range(len(costs)), key=lambda task: (-costs[task], task)):
            load, rank = loads[0]
            shares[rank].append(task)
            heapq.heapreplace(loads, (load + costs[task], rank))
        return [sorted(share) for share in shares]

    def turns(self, costs: Sequence[float]) -> list[tuple[int, bool]]:
        """This process's tasks, and whether each is its own: where all must make as many passes, it repeats one whose result nobody needs."""
        if self.size == 1:
            return [(task, True) for task in range(len(costs))]
        shares = self.share(costs)
        own = [(task, True) for task in shares[self.rank]]
        most = max(map(len, shares)) if self.equal_passes else 0
        return own + [(shares[self.rank][0] if own else 0, False)] * (most - len(own))

    def each(self, costs: Sequence[float], compute: Callable[[int], "Tensor"]) -> list["Tensor"]:
        """The results of all tasks, on the host and in their order, each computed by one process. All read at once: no task waits."""
        from trimtab.core.transfer import read

        turns = self.turns(costs)
        results = read([compute(task) for task, _ in turns])
        own = {str(task): result for (task, is_own), result in zip(turns, results, strict=True) if is_own}
        gathered = self.gather(own)
        return [gathered[str(task)] for task in range(len(costs))]

    @contextmanager
    def first_here_first(self) -> Iterator[None]:
        """The first process of each machine runs the block before the others there, which find in the cache what it has made."""
        if self.size == 1:
            yield
            return
        if not self.first_here:
            self.wait()
        yield
        if self.first_here:
            self.wait()
        self.wait()

    # Errors and interruptions

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error of one process in the block is raised in all, by their next exchange, so that a script that catches it goes on with all.

        Where the processes are watched, it ends them at once instead.
        """
        try:
            yield
        except Exception as error:
            if self._must_tell(error):
                said = json.dumps([type(error).__name__, str(error)]).encode()
                with suppress(ProcessLost):  # else they have ended meanwhile
                    self._exchanged(said, failed=True)
            raise

    @contextmanager
    def in_step(self, *common: type[Exception]) -> Iterator[None]:
        """Within the block, processes wait for each other where no error can be told: one of another kind than `common`, which all have
        alike, disconnects this process, so that the others raise ProcessLost rather than wait."""
        try:
            yield
        except common:
            raise
        except Exception as error:
            if self._must_tell(error):
                self.parted = True
                self.close()
            raise

    def _must_tell(self, error: Exception) -> bool:
        """Whether the others would wait for this process, which an error has stopped."""
        return self.size > 1 and not (self.watched or self.parted or getattr(error, "is_told", False))

    @contextmanager
    def interrupted_together(self) -> Iterator[None]:
        """Within the block, an interrupt of one process is heard by all in the next exchange (`told_to_stop`); a later one ends this process.

        Alone, an interrupt raises KeyboardInterrupt as ever.
        """
        if self.size == 1:
            yield
            return
        self.told_to_stop = False
        self._interrupts.clear()
        with noting_interrupts(self._note):
            yield

    def _note(self) -> None:
        now = time.monotonic()
        self._interrupts.append(now)
        if now - self._interrupts[0] > REPEAT_WINDOW:
            raise KeyboardInterrupt


processes = Processes.of_environment()
"""Those of this run."""
