"""What the processes of a run hear of each other's ends, whatever they are busy with.

An exchange fails when a process in it has ended; but one that computes, tokenizes or waits for its device exchanges nothing. So each keeps
a connection to process 0 open. One that ends on its own says so; of one that is killed, or whose machine is lost, the system closes the
connection. Then process 0 tells the others, and says it to the user: it alone speaks, as long as it is there.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.core.errors import ProcessLost
from trimtab.core.interrupts import INTERRUPTED
from trimtab.core.process_group import START
from trimtab.core.processes import Processes
from trimtab.launch.peer import Peer, listen

PLACE = "trimtab/watch"
"""Where the store holds process 0's port, and the word by which the others are known."""
TICK = 0.5
"""Seconds from one look to the next at whether the parent is there."""
BEAT = 5.0
"""Seconds from one empty line to the next, which the other side's system confirms, whatever its process is busy with."""
SAME = 1.0
"""Seconds within which process 0 may come upon the same error as another, and say it as its own."""
NEWS = 1.0
"""Seconds within which a process whose exchange has failed hears why."""
GRACE = 5.0
"""Seconds that process 0 has, once it is interrupted because another has ended, to say in run.json what happened, for example."""
ORPHAN = 60.0
"""Seconds that a process has to end when its parent has: to save what it has trained."""


class End(NamedTuple):
    """How a process ends the run."""

    code: int
    text: str = ""
    """What is said to the user; nothing if the command has said it."""


class Watch(ABC):
    """A process's place in the watch. A thread of its own waits for news of others; the public methods are the main thread's."""

    def __init__(self, processes: Processes, say: Callable[[str], None], leave: Callable[[int], None]) -> None:
        """
        Args:
            say: Says something to the user.
            leave: Ends this process at once.
        """
        self.processes, self.say, self.leave = processes, say, leave
        self.news: End | None = None
        self._heard, self._over, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._parents, self._orphaned = _parents(), False
        self._beat = time.monotonic() + BEAT
        self._interrupted = self._forced = float("inf")
        """When this process is interrupted, and when it is ended, if it has not by then."""

    @abstractmethod
    def start(self) -> None:
        """Connect, and wait until all have. Raises ProcessLost."""

    @abstractmethod
    def leave_with(self, end: End, doubtful: bool) -> None:
        """End the run, and this process: with what this one says, or another has said before.

        Args:
            doubtful: Whether what happened here may be what another's end has led to.
        """

    @abstractmethod
    def over(self) -> None:
        """All have done their work: who leaves from here on does not end the run."""

    def _run_thread(self, watch: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=watch, name="trimtab-watch", daemon=True)
        self.thread.start()

    def _look(self) -> None:
        """What is due: the end of this process, and a look at its parent."""
        now = time.monotonic()
        if not self._orphaned and _parents() != self._parents:
            self._orphaned = True
            self._end_by(now, now + ORPHAN)
        if now > self._interrupted:
            self._interrupted = float("inf")
            os.kill(os.getpid(), signal.SIGTERM)  # in training, all stop after the same step
        if now > self._forced:
            self._leave_now()

        if now > self._beat:
            self._beat = now + BEAT
            for peer in self._others():
                peer.send(b"\n")

    @abstractmethod
    def _others(self) -> list[Peer]:
        """Whom this process is connected with."""

    def _end_by(self, interrupted: float, forced: float) -> None:
        self._interrupted, self._forced = min(self._interrupted, interrupted), min(self._forced, forced)

    def _leave_now(self) -> None:
        self.leave(self.news.code if self.news else INTERRUPTED)


class First(Watch):
    """Process 0, which listens and speaks."""

    def __init__(self, processes: Processes, say: Callable[[str], None], leave: Callable[[int], None]) -> None:
        super().__init__(processes, say, leave)
        self.listener, self.word = listen(), secrets.token_hex(16)
        self.peers: dict[int, Peer] = {}
        self._all_here = threading.Event()

    def start(self) -> None:
        self.processes.store.set(PLACE, json.dumps([self.listener.getsockname()[1], self.word]))
        self._run_thread(self._watch)
        deadline = time.monotonic() + START.total_seconds()
        while not self._all_here.wait(TICK / 5):
            if self.news or time.monotonic() > deadline:
                missing = next(rank for rank in range(1, self.processes.started) if rank not in self.peers)
                raise ProcessLost(f"Process {missing} of {self.processes.started} has not come within {START}.")

    def leave_with(self, end: End, doubtful: bool) -> None:
        if doubtful and self._heard.wait(NEWS) and self.news:
            end = self.news
        with self._lock:
            self._interrupted = self._forced = float("inf")
            if end.text:
                self.say(end.text)
            self._tell_all({"code": end.code})
            self.leave(end.code)

    def over(self) -> None:
        self._tell_all({"over": True})
        self._over.set()

    def _others(self) -> list[Peer]:
        return list(self.peers.values())

    def _tell_all(self, what: dict[str, Any]) -> None:
        for peer in self._others():
            peer.tell(what)

    def _watch(self) -> None:
        with contextlib.ExitStack() as opened:
            waiting = opened.enter_context(selectors.DefaultSelector())
            waiting.register(opened.enter_context(self.listener), selectors.EVENT_READ, None)
            while not self._over.is_set():
                for key, _ in waiting.select(TICK):
                    if key.data is None:
                        connection = opened.enter_context(self.listener.accept()[0])
                        waiting.register(connection, selectors.EVENT_READ, Peer(connection))
                    elif not self._hear(key.data):
                        waiting.unregister(key.fileobj)
                        key.data.connection.close()
                self._look()

    def _hear(self, peer: Peer) -> bool:
        """Read what one says. False: nothing will come any more."""
        size = self.processes.started
        for said in (lines := peer.read()) or ():
            if peer.rank < 0:
                if said.get("word") != self.word:
                    return False
                peer.rank, peer.name = said["rank"], f"process {said['rank']} of {size} ({said['host']})"
                self.peers[peer.rank] = peer
                if len(self.peers) == size - 1:
                    self._all_here.set()
            elif "code" in said:
                peer.over = True
                told = said["text"] if said["code"] == INTERRUPTED else f"{peer.name}: {said['text']}"
                self._end(End(said["code"], told), peer)
            elif "over" in said:
                peer.over = True
        if lines is None and peer.rank > 0 and not peer.over and not self._over.is_set():
            self._end(End(ProcessLost.exit_code, lost(peer.name)), peer)
        return lines is not None

    def _end(self, end: End, source: Peer) -> None:
        if self.news is None:
            self.news, now = end, time.monotonic()
            self._end_by(now + SAME, now + SAME + GRACE)
            self._heard.set()
            for peer in self._others():
                if peer is not source:
                    peer.tell({"code": end.code})

    def _leave_now(self) -> None:
        with self._lock:
            if self.news and self.news.text:
                self.say(self.news.text)
            super()._leave_now()


class Other(Watch):
    """A process that tells process 0 of its end, and speaks only if that one is lost."""

    first: Peer | None = None
    _code: int | None = None
    """What this process has said that it ends with."""

    def start(self) -> None:
        host = os.environ["MASTER_ADDR"]
        try:
            port, word = json.loads(self._place())
            connection = socket.create_connection((host, port), timeout=START.total_seconds())
        except (OSError, RuntimeError) as error:
            raise ProcessLost(f"Process 0 of {self.processes.started} can't be reached at {host} ({error}).") from error
        connection.settimeout(None)
        self.first = Peer(connection)
        self.first.tell({"rank": self.processes.rank, "host": socket.gethostname(), "word": word})
        self._run_thread(self._watch)

    def _place(self) -> bytes:
        """What the store holds. Asked again and again: a signal is not heard while it is waited for."""
        until = time.monotonic() + START.total_seconds()
        while not self.processes.store.check([PLACE]):
            if time.monotonic() > until:
                raise TimeoutError(f"it has not come within {START}")
            time.sleep(0.05)
        place: bytes = self.processes.store.get(PLACE)
        return place

    def leave_with(self, end: End, doubtful: bool) -> None:
        if self.first is None:
            if self.processes.first_here:
                self.say(end.text)
            self.leave(end.code)
            return
        if doubtful:
            time.sleep(NEWS)  # within which the thread ends this process, if another has ended the run
        if self.processes.told_to_stop and end.code == INTERRUPTED:  # as in all; process 0 saves what it has trained
            self._code = INTERRUPTED
            self.first.tell({"over": True})
            self._over.wait()
        else:
            self._code = end.code
            self.first.tell({"code": end.code, "text": end.text})
            self._over.wait(SAME)
        self.leave(end.code)

    def over(self) -> None:
        assert self.first is not None
        self.first.tell({"over": True})
        self._over.wait(START.total_seconds())

    def _watch(self) -> None:
        assert self.first is not None
        with self.first.connection, selectors.DefaultSelector() as waiting:
            waiting.register(self.first.connection, selectors.EVENT_READ)
            while not self._over.is_set():
                lines: list[dict[str, Any]] | None = self.first.read() if waiting.select(TICK) else []
                for said in lines or ():
                    if "over" in said:
                        self._over.set()
                    elif "code" in said:
                        self.leave(said["code"])
                if lines is None and not self._over.is_set():
                    self._first_is_lost()
                self._look()

    def _others(self) -> list[Peer]:
        return [self.first] if self.first is not None else []

    def _first_is_lost(self) -> None:
        if self._code is not None:  # which has been told
            self.leave(self._code)
        here = self.processes.rank == self.processes.local_rank  # on the machine of process 0
        if self.processes.local_rank == int(here):  # one of each machine says it
            self.say(lost(f"process 0 of {self.processes.started}"))
        self.leave(ProcessLost.exit_code)


def _parents() -> tuple[int, ...]:
    """The processes that have started this one: its parent, and with DeepSpeed, which starts one that starts it, that one's, where the system
    says so."""
    parent = os.getppid()
    if "CROSS_RANK" in os.environ:
        with contextlib.suppress(OSError, ValueError):
            return parent, int(Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    return (parent,)


def lost(name: str) -> str:
    return (
        f"{name} has ended without an error of its own: it was killed (for want of memory, for example), or its machine can't be reached. "
        "The same command resumes the run from its last checkpoint."
    )
