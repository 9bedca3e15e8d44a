"""
A line between two processes: a socket pair that carries small Python objects.

No lock or buffer is shared between processes, so one that is killed in the middle leaves the others
nothing worse than the end of the line, and that at once: the end of the line is how a death is noticed.
"""

import pickle
import socket
import struct
from threading import Lock
from typing import Any

_LENGTH = struct.Struct("!I")


class Closed(Exception):
    """The process at the other end is gone, or has no more to say."""


class Channel:
    """One end of a line. Any number of threads may send and receive."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = Lock()
        self._receiving = Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Closed from error

    def receive(self) -> Any:
        """Wait for the next message and return it; raise ``Closed`` when there will be none."""
        with self._receiving:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            return pickle.loads(self._read(length))  # noqa: S301 (from our own process)

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                part = self._socket.recv(length - len(data))
            except OSError as error:
                raise Closed from error
            if not part:
                raise Closed
            data += part
        return data

    def finish(self) -> None:
        """Say that nothing more will be sent; what was sent is still received."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The other end is gone already.

    def close(self) -> None:
        self._socket.close()


def pair() -> tuple[Channel, Channel]:
    """Return the two ends of a new line."""
    here, there = socket.socketpair()
    return Channel(here), Channel(there)


def hand_over(line: socket.socket, channel: Channel) -> None:
    """Give the other process of ``line`` an end of another line, and close ours."""
    socket.send_fds(line, [b"\0"], [channel.fileno()])
    channel.close()
