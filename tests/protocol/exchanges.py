"""Requests that tests send, by our initiator or as raw PDUs, and what comes of them."""

from protocol.iscsi import pdu
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.task import CommandFailed
from protocol.iscsi.pdu import RESERVED_TAG, Pdu, pack
from protocol.volume import Buffer
from tests.protocol.coupling import Coupling, feed


class Results:
    """Collects what callbacks bring."""

    def __init__(self) -> None:
        self.got: list[tuple[Buffer | None, IscsiError | None]] = []

    def __call__(self, data: Buffer | None, error: IscsiError | None) -> None:
        self.got.append((data, error))

    @property
    def data(self) -> bytes:
        (result,) = self.got
        assert result[1] is None, result
        return bytes(result[0] or b"")

    @property
    def failure(self) -> CommandFailed:
        (result,) = self.got
        assert isinstance(result[1], CommandFailed), result
        return result[1]


def write(pair: Coupling, offset: int, data: bytes) -> None:
    results = Results()
    pair.initiator.submit_write(0, offset, data, results)
    pair.run()
    assert results.data == b""


def read(pair: Coupling, offset: int, size: int) -> bytes:
    results = Results()
    pair.initiator.submit_read(0, offset, size, results)
    pair.run()
    return results.data


def manage(pair: Coupling, function: int, lun: int = 0, task: object = None) -> list[int]:
    answers: list[int] = []
    pair.initiator.task_management(function, lun, answers.append, task)  # type: ignore[arg-type]
    pair.run()
    return answers


FIRST = (RESERVED_TAG, 1, 0, 0, 0, 0, 0)


def command_pdu(
    flags: int, itt: int, opcode: int, *, expected: int = 512, length: int = 0, cmd_sn: int = 1
) -> bytes:
    """READ(10) or WRITE(10) at LBA 0 of as many whole sectors as are expected."""
    head = pack(
        pdu.SCSI_COMMAND, flags, itt, length=length, words=(expected, cmd_sn, 0, 0, 0, 0, 0)
    )
    return head[:32] + bytes((opcode, 0, 0, 0, 0, 0, 0, 0, expected // 512)).ljust(16, b"\0")


def answer_to(pair: Coupling, data: bytes) -> Pdu:
    """The one PDU that ``data`` brings."""
    feed(pair.target, data)
    sent = pair.peer.take()
    length = int.from_bytes(sent[5:8], "big")
    assert len(sent) == 48 + length + -length % 4
    return Pdu(sent[:48], b"", memoryview(sent)[48 : 48 + length])


def solicited(pair: Coupling, size: int = 8192) -> tuple[Results, int, int]:
    """A write whose R2T has come: results, task tag, transfer tag."""
    results = Results()
    command = pair.initiator.submit_write(0, 0, bytes(size), results)
    pair.initiator.flush_output()
    feed(pair.target, pair.to_target.popleft())
    r2t = Pdu(pair.peer.take()[:48], b"", memoryview(b""))
    assert (r2t.opcode, r2t.buffer_offset, r2t.residual) == (pdu.R2T, 0, size)
    return results, command.itt, r2t.ttt


def data_out(
    itt: int, ttt: int, *, sn: int = 0, offset: int = 0, size: int = 512, flags: int = 0
) -> bytes:
    return pack(pdu.DATA_OUT, flags, itt, length=size, words=(ttt, 0, 0, 0, sn, offset, 0)) + bytes(
        size
    )
