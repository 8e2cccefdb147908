"""A hostile peer in a process of its own: repeats one action as fast as the daemon allows until
SIGTERM, and counts.

    python -m tests.load.flooder KIND HOST:PORT TARGET [--workers 64] [--addresses 1]

``--addresses`` is the number of source addresses (127.0.1.1 and following). The last line of output
has the number of attempts, the number admitted (the daemon opened a session), and the connections
held at the end.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import uvloop

from protocol.iscsi import login, pdu, text
from protocol.iscsi.pdu import pack

# An initiator that must use CHAP, and one that need not.
CHAP_INITIATOR, OPEN_INITIATOR = "iqn.2026-01.io.example:proving", "iqn.2026-01.io.example:flooder"
CHAP_USER = "proving"
REPLY_BYTES_MAX = 1 << 16
REPLY_SECONDS_MAX = 20.0
SLOW_SECONDS = 0.01
UNKNOWN_KEYS = 2048
_TO_FULL_FEATURE = pdu.TRANSIT | login.OPERATIONAL << 2 | login.FULL_FEATURE
_SECURITY = login.SECURITY << 2
_CHALLENGE = re.compile(rb"CHAP_C=(0x[0-9a-f]+)")
_isids = itertools.count(1)


def request(body: bytes, flags: int, isid: int) -> bytes:
    """Build one login request."""
    head = pack(
        pdu.LOGIN_REQUEST | pdu.IMMEDIATE,
        flags,
        1,
        length=len(body),
        lun=isid << 16,
        words=(0, 1, 0, 0, 0, 0, 0),
    )
    return head + body + bytes(-len(body) % 4)


def names(initiator: str, target: str) -> list[tuple[str, str]]:
    """Return the keys that every login begins with."""
    return [("InitiatorName", initiator), ("TargetName", target), ("SessionType", "Normal")]


@dataclass
class Peer:
    """The destination, the source addresses, and the results so far."""

    host: str
    port: int
    target: str
    addresses: int
    attempts: int = 0
    let_in: int = 0
    held: int = 0
    _sources: "itertools.count[int]" = field(default_factory=itertools.count)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect from the next of the source addresses."""
        number = next(self._sources) % self.addresses
        source = (f"127.0.1.{number + 1}", 0) if self.addresses > 1 else None
        return await asyncio.open_connection(self.host, self.port, local_addr=source)

    async def exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
    ) -> bytes:
        """Send, and return the reply; empty if the connection is closed."""
        writer.write(message)
        return await asyncio.wait_for(reader.read(REPLY_BYTES_MAX), REPLY_SECONDS_MAX)

    def admitted(self, reply: bytes) -> bool:
        """Return whether a login response opens the full feature phase, and count it."""
        opened = (
            len(reply) >= 48
            and reply[0] == pdu.LOGIN_RESPONSE
            and reply[1] & 0x83 == 0x83
            and reply[36] == 0
        )
        self.let_in += opened
        return opened


async def resets(peer: Peer) -> None:
    """Connect, and reset the connection."""
    _, writer = await peer.connect()
    writer.transport.abort()


async def logins(peer: Peer) -> None:
    """Log in correctly, and reset the connection."""
    reader, writer = await peer.connect()
    message = request(
        text.encode(names(OPEN_INITIATOR, peer.target)), _TO_FULL_FEATURE, next(_isids)
    )
    peer.admitted(await peer.exchange(reader, writer, message))
    writer.transport.abort()


async def wrong_secrets(peer: Peer) -> None:
    """Answer CHAP with a guess."""
    reader, writer = await peer.connect()
    isid = next(_isids)
    await peer.exchange(
        reader,
        writer,
        request(
            text.encode([*names(CHAP_INITIATOR, peer.target), ("AuthMethod", "CHAP")]),
            _SECURITY,
            isid,
        ),
    )
    await peer.exchange(reader, writer, request(text.encode([("CHAP_A", "7,5")]), _SECURITY, isid))
    guess = [("CHAP_N", CHAP_USER), ("CHAP_R", "0x" + "5a" * 32)]
    peer.admitted(
        await peer.exchange(
            reader, writer, request(text.encode(guess), 0x80 | login.FULL_FEATURE, isid)
        )
    )
    writer.transport.abort()


async def reflections(peer: Peer) -> None:
    """Reflect CHAP: send the daemon's challenge from one connection back to it on another, and use
    the daemon's answer there as the answer on the first.
    """
    (first, to_first), (second, to_second) = await peer.connect(), await peer.connect()
    challenges = []
    for reader, writer in ((first, to_first), (second, to_second)):
        hello = [*names(CHAP_INITIATOR, peer.target), ("AuthMethod", "CHAP")]
        await peer.exchange(reader, writer, request(text.encode(hello), _SECURITY, 7))
        reply = await peer.exchange(
            reader, writer, request(text.encode([("CHAP_A", "7,5")]), _SECURITY, 7)
        )
        found = _CHALLENGE.search(reply)
        challenges.append(found[1].decode() if found is not None else "0x00")
    mirror = [
        ("CHAP_N", CHAP_USER),
        ("CHAP_R", "0x" + "00" * 32),
        ("CHAP_I", "1"),
        ("CHAP_C", challenges[0]),
    ]
    reply = await peer.exchange(
        second, to_second, request(text.encode(mirror), 0x80 | login.FULL_FEATURE, 7)
    )
    answer = re.search(rb"CHAP_R=(0x[0-9a-f]+)", reply)
    replay = [
        ("CHAP_N", CHAP_USER),
        ("CHAP_R", answer[1].decode() if answer is not None else challenges[1]),
    ]
    peer.admitted(
        await peer.exchange(
            first, to_first, request(text.encode(replay), 0x80 | login.FULL_FEATURE, 7)
        )
    )
    to_first.transport.abort()
    to_second.transport.abort()


async def unknown_keys(peer: Peer) -> None:
    """Log in with 2,048 unknown keys, over as many requests as they need."""
    reader, writer = await peer.connect()
    body = text.encode(
        [
            *names(OPEN_INITIATOR, peer.target),
            *((f"X-key-{number}", "1") for number in range(UNKNOWN_KEYS)),
        ]
    )
    pieces = [body[at : at + 8192] for at in range(0, len(body), 8192)]
    message = b"".join(
        request(piece, pdu.CONTINUE | login.OPERATIONAL << 2, 9) for piece in pieces[:-1]
    )
    message += request(pieces[-1], _TO_FULL_FEATURE, 9)
    reply = b"?"
    while reply and not peer.admitted(reply):
        reply, message = await peer.exchange(reader, writer, message), b""
    writer.transport.abort()


async def oversized(peer: Peer) -> None:
    """Before any login, send a header that announces 16 MiB and the start of that data."""
    reader, writer = await peer.connect()
    header = pack(pdu.LOGIN_REQUEST | pdu.IMMEDIATE, 0x87, 1, length=0xFFFFFF, lun=1 << 16)
    await peer.exchange(reader, writer, header + bytes(65536))
    writer.transport.abort()


async def strange_opcodes(peer: Peer) -> None:
    """Send PDUs that are not part of a login."""
    reader, writer = await peer.connect()
    await peer.exchange(
        reader, writer, pack(peer.attempts % 64, 0x80, 1, words=(0, 1, 0, 0, 0, 0, 0))
    )
    writer.transport.abort()


async def half_open(peer: Peer) -> None:
    """Send half a header, then nothing until the daemon closes."""
    reader, writer = await peer.connect()
    peer.held += 1
    writer.write(bytes(20))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), REPLY_SECONDS_MAX)
    peer.held -= 1
    writer.transport.abort()


async def slow(peer: Peer) -> None:
    """Log in correctly, one byte at a time."""
    reader, writer = await peer.connect()
    peer.held += 1
    for byte in request(
        text.encode(names(OPEN_INITIATOR, peer.target)), _TO_FULL_FEATURE, next(_isids)
    ):
        writer.write(bytes((byte,)))
        await asyncio.sleep(SLOW_SECONDS)
    peer.held -= 1
    peer.admitted(await peer.exchange(reader, writer, b""))
    writer.transport.abort()


KINDS: dict[str, Callable[[Peer], Awaitable[None]]] = {
    "reset connections": resets,
    "correct logins": logins,
    "CHAP with guessed answers": wrong_secrets,
    "CHAP reflected and replayed": reflections,
    "2,048 unknown keys": unknown_keys,
    "16 MiB announced": oversized,
    "non-login opcodes": strange_opcodes,
    "half-open connections": half_open,
    "one byte every 10 ms": slow,
}


async def _work(peer: Peer, act: Callable[[Peer], Awaitable[None]]) -> None:
    while True:
        peer.attempts += 1
        try:
            await act(peer)
        except (OSError, TimeoutError):  # refused or dropped, as intended
            await asyncio.sleep(0.001)


async def flood(peer: Peer, kind: str, workers: int) -> None:
    """Run workers until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    tasks = [asyncio.create_task(_work(peer, KINDS[kind])) for _ in range(workers)]
    await stopping.wait()
    print(
        json.dumps(
            {
                "attempts": peer.attempts,
                "let_in": peer.let_in,
                "held": peer.held,
                "workers": len(tasks),
            }
        ),
        flush=True,
    )
    # No cleanup is needed, and Python 3.11's wait_for may lose a cancellation.
    os._exit(0)


def main() -> None:
    """Parse the command line and flood."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("portal")
    parser.add_argument("target")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--addresses", type=int, default=1)
    options = parser.parse_args()
    host, _, port = options.portal.rpartition(":")
    uvloop.run(
        flood(
            Peer(host, int(port), options.target, options.addresses), options.kind, options.workers
        )
    )


if __name__ == "__main__":
    main()
