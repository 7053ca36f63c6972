"""Relay TCP connections to the login nodes, and disturb them on request; each goes to a node picked at random.

The relay is a program of its own (standard library only). It reads requests from a Unix socket, one JSON object per
line: settings to change, or `{"drop": true}`. It answers each with its settings and its number of connections. The
kernel's own means (netem) do not exist on every machine, and act on packets instead of connections.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_UnderWay = asyncio.Queue[tuple[float, bytes]]
"""Data between the two sockets of a connection: (time when it is due, data); empty data is the end."""

_CHUNK = 64 * 1024
_CHUNKS_UNDER_WAY = 64
_ABORT_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close() sends RST


@dataclass
class Settings:
    """What the relay does to traffic. The defaults disturb nothing.

    Attributes:
        refuse: new connections are refused (nothing listens); those that are open stay.
        frozen: no data passes and no connection is closed, as when a laptop sleeps or a cable is pulled.
        delay: seconds of delay in each direction.
        bandwidth: bytes per second in each direction, of all connections together; 0 for no limit.
        drop_after: drop every connection once, after that many more bytes from the login nodes; 0 for never.
    """

    refuse: bool = False
    frozen: bool = False
    delay: float = 0.0
    bandwidth: float = 0.0
    drop_after: int = 0


class Relay:
    """Listens on one address and passes each connection on to one of several."""

    def __init__(self, listen: tuple[str, int], backends: list[tuple[str, int]]) -> None:
        self._listen = listen
        self._backends = backends
        self._settings = Settings()
        self._connections: set[asyncio.StreamWriter] = set()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._server: asyncio.Server | None = None
        self._next_free = {"in": 0.0, "out": 0.0}

    async def run(self, control: Path) -> None:
        """Serve for ever; `control` is the path of the Unix socket."""
        await self._apply({})
        control.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._answer_control, control)
        async with server:
            await server.serve_forever()

    async def _answer_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            if request.pop("drop", False):
                self._drop()
            await self._apply(request)
            writer.write(
                json.dumps({**asdict(self._settings), "connections": len(self._connections) // 2}).encode() + b"\n"
            )
            await writer.drain()
        writer.close()

    async def _apply(self, changes: dict[str, Any]) -> None:
        self._settings = Settings(**{**asdict(self._settings), **changes})
        if self._settings.frozen:
            self._thawed.clear()
        else:
            self._thawed.set()
        if self._settings.refuse and self._server is not None:
            self._server.close()
            self._server = None
        elif not self._settings.refuse and self._server is None:
            self._server = await asyncio.start_server(self._accept, *self._listen)

    def _drop(self) -> None:
        """Reset every connection at both ends at once."""
        for writer in tuple(self._connections):
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT_AT_CLOSE)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self._connections.add(writer)
        try:
            await self._thawed.wait()
            far_reader, far_writer = await asyncio.open_connection(*random.choice(self._backends))
            ends.append(far_writer)
            self._connections.add(far_writer)
            async with asyncio.TaskGroup() as tasks:
                for source, target, direction in ((reader, far_writer, "in"), (far_reader, writer, "out")):
                    under_way: _UnderWay = asyncio.Queue(_CHUNKS_UNDER_WAY)
                    tasks.create_task(self._receive(source, under_way))
                    tasks.create_task(self._deliver(under_way, target, direction))
        except* OSError:
            pass  # one of the two ends has gone: the other is closed below
        finally:
            for end in ends:
                self._connections.discard(end)
                end.transport.abort()

    async def _receive(self, reader: asyncio.StreamReader, under_way: _UnderWay) -> None:
        while True:
            data = await reader.read(_CHUNK)
            await under_way.put((asyncio.get_running_loop().time() + self._settings.delay, data))
            if not data:
                return

    async def _deliver(self, under_way: _UnderWay, writer: asyncio.StreamWriter, direction: str) -> None:
        while True:
            due, data = await under_way.get()
            await _sleep_until(due)
            await self._take_bandwidth(direction, len(data))
            await self._thawed.wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            if direction == "out":
                self._count(len(data))

    async def _take_bandwidth(self, direction: str, size: int) -> None:
        if self._settings.bandwidth:
            start = max(self._next_free[direction], asyncio.get_running_loop().time())
            self._next_free[direction] = start + size / self._settings.bandwidth
            await _sleep_until(self._next_free[direction])

    def _count(self, size: int) -> None:
        if self._settings.drop_after:
            self._settings.drop_after = max(0, self._settings.drop_after - size)
            if not self._settings.drop_after:
                self._drop()


async def _sleep_until(due: float) -> None:
    wait = due - asyncio.get_running_loop().time()
    if wait > 0:
        await asyncio.sleep(wait)


class RelayControl:
    """Controls a running relay."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path

    def send(self, **request: object) -> dict[str, Any]:
        """Send one request and return the relay's settings and its number of `connections`."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self._path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answer:
                settings: dict[str, Any] = json.loads(answer.readline())
        return settings

    def repair(self) -> None:
        """Reset all settings; open connections stay."""
        self.send(**asdict(Settings()))


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Run the relay as a program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--listen", type=_endpoint, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("backends", type=_endpoint, nargs="+")
    options = parser.parse_args()

    async def serve() -> None:
        await Relay(options.listen, options.backends).run(options.control)

    asyncio.run(serve())


if __name__ == "__main__":
    main()
