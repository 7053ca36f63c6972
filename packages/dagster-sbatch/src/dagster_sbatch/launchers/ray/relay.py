"""Many TCP connections over one pair of pipes: the way to a port that a node opens to itself alone.

usage: relay.py PORT   the far end, which connects to 127.0.0.1:PORT of its machine; srun starts it there

Both ends send frames: the number of a connection, how many bytes follow, and those; none mean that it is closed.
One file of the standard library: it goes along with each Ray job.
"""

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

HEADER = struct.Struct(">II")
PIECE = 1 << 16
MOST_WAITING = 1024
"""Pieces that wait for one connection. One that takes nothing any more, a browser that stalls, is closed then."""
HELLO = b"\0relay\n"
"""What the far end begins with; a login shell may have printed something before."""


class Relay:
    """One end."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        write: Callable[[bytes], object],
        connect: Callable[[], socket.socket] | None = None,
    ) -> None:
        """Nothing happens yet.

        Args:
            read: some bytes from the other end, as many as asked for at most; none at the end.
            write: all of some bytes to the other end.
            connect: makes a connection for each one that the other end tells of; only the far end has it.
        """
        self._read, self._write, self._connect = read, write, connect
        self._writing = threading.Lock()
        self._waiting: dict[int, SimpleQueue[bytes]] = {}  # for each connection; b"" ends it
        self._last = 0

    def add(self, connection: socket.socket) -> None:
        """Take a connection that was made here, the near end, to the other one."""
        self._last += 1
        self._begin(self._last, connection)

    def run(self) -> None:
        """Pass on what the other end sends, until it ends; then all connections end."""
        try:
            while header := self._read_exactly(HEADER.size):
                number, size = HEADER.unpack(header)
                self._take(number, self._read_exactly(size))
        finally:
            for waiting in list(self._waiting.values()):
                waiting.put(b"")

    def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._read(size - len(data))
            if not piece:
                return b""
            data += piece
        return data

    def _begin(self, number: int, connection: socket.socket) -> None:
        waiting = self._waiting[number] = SimpleQueue()
        for target, *rest in ((self._pump, number), (self._drain, waiting)):
            threading.Thread(target=target, args=(connection, *rest), daemon=True).start()

    def _pump(self, connection: socket.socket, number: int) -> None:
        """From a connection to the other end."""
        data = b"begun"
        while data:
            try:
                data = connection.recv(PIECE)
            except OSError:
                data = b""
            self._send(number, data)

    def _drain(self, connection: socket.socket, waiting: "SimpleQueue[bytes]") -> None:
        """From the other end to a connection. On its own: one that nobody reads from must not hold up the others."""
        with suppress(OSError):
            while data := waiting.get():
                connection.sendall(data)
        _shut(connection)

    def _take(self, number: int, data: bytes) -> None:
        if number not in self._waiting and self._connect and data:
            try:
                self._begin(number, self._connect())
            except OSError:
                self._send(number, b"")
        if number in self._waiting:
            stalled = self._waiting[number].qsize() >= MOST_WAITING
            self._waiting[number].put(b"" if stalled else data)
            if stalled or not data:
                del self._waiting[number]
            if stalled:
                self._send(number, b"")

    def _send(self, number: int, data: bytes) -> None:
        with self._writing, suppress(OSError, EOFError):  # the other end is gone: `run` sees that, too
            self._write(HEADER.pack(number, len(data)) + data)


def await_far_end(read: Callable[[int], bytes]) -> bool:
    """Read up to the far end's first word; whether it came before the end."""
    seen = b""
    while not seen.endswith(HELLO):
        byte = read(1)
        if not byte:
            return False
        seen = seen[-len(HELLO) :] + byte
    return True


def _shut(connection: socket.socket) -> None:
    """Close it, and wake whoever reads from it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def main() -> None:
    """Be the far end."""
    from ports import is_ours  # beside this file in the run directory

    port = int(sys.argv[1])

    def connect() -> socket.socket:
        if not is_ours(port):  # what is sent there holds the token
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", port))

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    write(HELLO)
    Relay(lambda size: os.read(0, size), write, connect).run()


if __name__ == "__main__":
    main()
