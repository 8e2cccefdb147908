"""Serves volumes in memory over iSCSI on loopback, so that real clients can be run against
protocol/iscsi alone.

python -m tests.conformance.serve_memory --port 3260 --size-mib 256 --luns 1 [--file PATH] [--chap
user:secret]
"""

import argparse
import asyncio
import gc
import os
import socket
import sys
from typing import cast
from uuid import UUID

import uvloop

from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.connection import TargetConnection
from protocol.iscsi.node import TargetNode
from protocol.volume import AllocationCompletion, Buffer, Completion
from tests.protocol.directory import MemoryDirectory
from tests.protocol.memory_volume import MemoryVolume


class FileVolume(MemoryVolume):
    """A file instead of memory, for comparison with a target that serves one: page-cache reads, one
    pwrite per write.
    """

    def __init__(self, path: str, uuid: UUID) -> None:
        super().__init__(0, uuid=uuid)
        self._fd = os.open(path, os.O_RDWR)
        self._size = os.fstat(self._fd).st_size

    @property
    def size_bytes(self) -> int:
        return self._size

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        return os.pread(self._fd, length_bytes, offset_bytes)

    def allocation(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: AllocationCompletion
    ) -> None:
        done([(length_bytes, True)], None)

    def _change(self, offset: int, data: Buffer, done: Completion) -> None:
        os.pwrite(self._fd, data, offset)
        done(None)


class Endpoint(asyncio.BufferedProtocol):
    """The socket side of one `TargetConnection`."""

    def __init__(self, node: TargetNode) -> None:
        self._node = node

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(
            "asyncio.Transport", transport
        )  # uvloop has its own classes
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = transport.get_extra_info("sockname")[:2]
        peer = transport.get_extra_info("peername")
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon(self._connection.flush_output)

        self._connection = TargetConnection(
            self._node,
            transport.writelines,
            wake,
            transport.close,
            f"{host}:{port}",
            f"{peer[0]}:{peer[1]}",
        )
        self.get_buffer = self._connection.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = self._connection.buffer_updated  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._connection.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._connection.buffer_updated(nbytes)

    def pause_writing(self) -> None:
        self._transport.pause_reading()
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
        if not self._connection.paused:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection.failure:
            print("connection ended:", self._connection.failure, file=sys.stderr, flush=True)
        self._connection.connection_lost()


async def serve(options: argparse.Namespace) -> None:
    """Listen until the process is ended."""
    uuids = [
        UUID(int=0x1234_5678_9ABC_4DEF_8123_4567_89AB_0000 + lun) for lun in range(options.luns)
    ]
    size = options.size_mib << 20
    volumes = {
        lun: FileVolume(options.file, u) if options.file else MemoryVolume(size, uuid=u)
        for lun, u in enumerate(uuids)
    }
    user, _, secret = options.chap.partition(":")
    chap = ChapSecrets(user, secret.encode()) if user else None
    node = TargetNode(MemoryDirectory(dict(volumes), chap, chap))
    node.turns.call_soon = asyncio.get_running_loop().call_soon
    server = await asyncio.get_running_loop().create_server(
        lambda: Endpoint(node), "127.0.0.1", options.port
    )
    gc.freeze()
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=3260)
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--luns", type=int, default=1)
    parser.add_argument("--file", default="")
    parser.add_argument("--chap", default="")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
