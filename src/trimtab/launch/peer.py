"""A connection of two processes, over which lines of JSON go, and which ends when the other process or its machine does."""

import contextlib
import json
import socket
from typing import Any

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 25_000}
"""By which the system finds within about 30 seconds that a machine is lost; the last one says how long a line may be unconfirmed, in ms."""
MOST_BYTES = 1 << 20


class Peer:
    """The other side of a connection, and what is known of it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rank, self.name, self.over, self._unread = connection, -1, "", False, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def tell(self, what: dict[str, Any]) -> None:
        """Say something, as JSON data."""
        self.send(json.dumps(what).encode() + b"\n")

    def send(self, line: bytes) -> None:
        """Send a line, if the connection is open."""
        with contextlib.suppress(OSError):  # it has gone: the reading side finds out
            self.connection.sendall(line)

    def read(self) -> list[dict[str, Any]] | None:
        """What has come; None once nothing more can."""
        try:
            data = self.connection.recv(1 << 16)
            *lines, self._unread = (self._unread + data).split(b"\n")
            said = [json.loads(line) for line in lines if line]
        except (OSError, ValueError):
            return None
        strange = len(self._unread) > MOST_BYTES or not all(isinstance(one, dict) for one in said)
        return said if data and not strange else None


def listen() -> socket.socket:
    """A socket that takes connections at a free port, of every address of this machine."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
