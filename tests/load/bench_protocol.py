"""The cost of one READ(10) or WRITE(10) of 4 KiB in the protocol layer: bursts of 32 PDUs against a
volume that does nothing.

python -m tests.load.bench_protocol [--commands 200000]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from struct import Struct

from protocol.iscsi.connection import TargetConnection
from protocol.iscsi.pdu import HEADER, SCSI_COMMAND
from protocol.scsi import opcodes
from protocol.volume import Buffer, Completion
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import recorded
from tests.protocol.memory_volume import MemoryVolume

DEPTH = 32
BLOCK_BYTES = 4096
_CDB_10 = Struct(">BBIBHB6x")
_READ_FLAGS = 0xC1
_WRITE_FLAGS = 0xA1


class NoVolume(MemoryVolume):
    """Reads return one constant block; writes complete at settle. So only the time of the protocol
    layer is measured.
    """

    block = bytes(BLOCK_BYTES)

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        return self.block

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self._dones.append(done)

    _dones: list[Completion] = []

    def settle(self) -> None:
        dones = self._dones
        for done in dones:
            done(None)
        dones.clear()


def burst(first_cmd_sn: int, opcode: int, flags: int, data: bytes) -> bytes:
    """Build DEPTH commands, with immediate data if any."""
    pdus = bytearray()
    for index in range(DEPTH):
        head = HEADER.pack(
            SCSI_COMMAND,
            flags,
            0,
            0,
            len(data),
            0,
            1 + index,
            BLOCK_BYTES,
            first_cmd_sn + index,
            1,
            0,
            0,
            0,
            0,
        )
        pdus += head[:32] + _CDB_10.pack(opcode, 0, index * 8, 0, BLOCK_BYTES // 512, 0) + data
    return bytes(pdus)


def measure(
    target: TargetConnection, make: Callable[[int], bytes], first_cmd_sn: int, commands: int
) -> float:
    """Return the seconds for ``commands`` commands, without building and copying the PDUs."""
    spent = 0.0
    for _ in range(commands // DEPTH):
        data = make(first_cmd_sn)
        first_cmd_sn += DEPTH
        target.get_buffer()[: len(data)] = data
        begun = time.perf_counter()
        target.buffer_updated(len(data))
        spent += time.perf_counter() - begun
    return spent


def main() -> None:
    """Measure reads and writes, and print microseconds per command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=200_000)
    commands = parser.parse_args().commands
    volume = NoVolume(1 << 20)
    pair = Coupling(recorded({0: volume}), settings()).login()
    for mapped in pair.node.unit_for(volume).nexuses:
        mapped.take_attention()
    target = pair.target
    target._send = lambda buffers: None
    cmd_sn = 1
    for name, opcode, flags, data in (
        ("read", opcodes.READ_10, _READ_FLAGS, b""),
        ("write", opcodes.WRITE_10, _WRITE_FLAGS, bytes(BLOCK_BYTES)),
    ):
        seconds = measure(
            target, partial(burst, opcode=opcode, flags=flags, data=data), cmd_sn, commands
        )
        cmd_sn += commands // DEPTH * DEPTH
        print(f"{name}: {seconds / (commands // DEPTH * DEPTH) * 1e6:.2f} us per command")


if __name__ == "__main__":
    main()
