"""A volume in memory for tests and benches: it satisfies `protocol.volume.BlockVolume`, completes
at once or on demand, and fails on request.
"""

import errno
from collections.abc import Callable
from uuid import UUID

from protocol.volume import AllocationCompletion, Buffer, Completion, ReadCompletion

DISK_UUID = UUID(int=0x1234_5678_9ABC_4DEF_8123_4567_89AB_CDEF)


class VolumeError(Exception):
    """What a volume reports, with an ``errno``."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number


class MemoryVolume:
    """``hold_reads`` and ``hold_writes`` keep operations in ``held`` until `release`, as I/O
    threads would.
    """

    def __init__(self, size_bytes: int, name: str = "memory", uuid: UUID = DISK_UUID) -> None:
        self.data = bytearray(size_bytes)
        self.name = name
        self.uuid = uuid
        self.read_only = False
        self.hold_reads = False
        self.hold_writes = False
        self.fail_reads: int | None = None
        self.fail_writes: int | None = None
        self.held: list[Callable[[], None]] = []
        self.flushes = 0
        self.unmapped: list[tuple[int, int]] = []
        self._batch: list[tuple[int, Buffer, Completion]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer | None:
        if self.fail_reads is not None:
            raise VolumeError(self.fail_reads)
        if offset_bytes + length_bytes > len(self.data):
            raise VolumeError(errno.EINVAL)
        if self.hold_reads:
            return None
        return bytes(memoryview(self.data)[offset_bytes : offset_bytes + length_bytes])

    def read(self, offset_bytes: int, length_bytes: int, done: ReadCompletion) -> None:
        def finish() -> None:
            if self.fail_reads is not None:
                done(None, VolumeError(self.fail_reads))
            else:
                done(bytes(self.data[offset_bytes : offset_bytes + length_bytes]), None)

        self._finish(finish, self.hold_reads)

    def _finish(self, finish: Callable[[], None], hold: bool) -> None:
        if hold:
            self.held.append(finish)
        else:
            finish()

    def release(self) -> None:
        """Let everything that is held go on."""
        held, self.held = self.held, []
        for finish in held:
            finish()

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self._batch.append((offset_bytes, data, done))

    def settle(self) -> None:
        batch, self._batch = self._batch, []
        for offset, data, done in batch:
            self._change(offset, data, done)

    def _change(self, offset: int, data: Buffer, done: Completion) -> None:
        if self.fail_writes is not None:
            number = self.fail_writes
            self._finish(lambda: done(VolumeError(number)), self.hold_writes)
            return
        if offset + len(data) > len(self.data):
            done(VolumeError(errno.EINVAL))
            return
        self.data[offset : offset + len(data)] = data
        if self.hold_writes:
            self.held.append(lambda: done(None))
        else:
            done(None)

    def unmap(self, offset_bytes: int, length_bytes: int, done: Completion) -> None:
        self.unmapped.append((offset_bytes, length_bytes))
        self._change(offset_bytes, bytes(length_bytes), done)

    def write_zeros(
        self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion
    ) -> None:
        self._change(offset_bytes, bytes(length_bytes), done)

    def allocation(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: AllocationCompletion
    ) -> None:
        """What is not zeros counts as allocated, in blocks of 4 KiB; no more than 4 MiB are looked
        at.
        """
        length_bytes = min(length_bytes, 4 << 20)
        runs: list[tuple[int, bool]] = []
        first = offset_bytes & -4096
        for block in range(first, offset_bytes + length_bytes, 4096):
            at = max(block, offset_bytes)
            size = min(block + 4096, offset_bytes + length_bytes) - at
            state = self.data.count(0, at, at + size) != size
            if runs and runs[-1][1] == state:
                runs[-1] = (runs[-1][0] + size, state)
            else:
                runs.append((size, state))
        done(runs, None)

    def flush(self, done: Completion) -> None:
        self.flushes += 1
        self._finish(lambda: done(None), self.hold_writes)
