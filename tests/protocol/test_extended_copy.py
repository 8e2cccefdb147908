"""EXTENDED COPY and RECEIVE COPY RESULTS: what is copied, by which way, for whom, and what is said
of it.
"""

import errno
import random
from uuid import UUID

import pytest

from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import limits
from protocol.scsi.errors import STATUS_RESERVATION_CONFLICT
from protocol.scsi.reservations import NexusId
from protocol.volume import CopiesByReference
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import Results
from tests.protocol.memory_volume import MemoryVolume, VolumeError
from tests.protocol.test_scsi_identity import fails, page

SIZE = 4 << 20
SECTORS = SIZE // 512
NOT_REACHABLE = (10, 0x0D, 2)


class SharingVolume(MemoryVolume):
    """Takes blocks over by reference from volumes of its own kind."""

    def __init__(self, uuid: UUID, pool: str = "one") -> None:
        super().__init__(SIZE, uuid=uuid)
        self.pool = pool
        self.shared: list[tuple[int, int, int]] = []

    def copy_from(self, source, source_offset_bytes, offset_bytes, length_bytes, done):
        assert (source_offset_bytes | offset_bytes | length_bytes) % 4096 == 0
        if not isinstance(source, SharingVolume) or source.pool != self.pool:
            done(VolumeError(errno.EOPNOTSUPP))
            return
        self.shared.append((source_offset_bytes, offset_bytes, length_bytes))
        self._change(
            offset_bytes,
            bytes(source.data[source_offset_bytes : source_offset_bytes + length_bytes]),
            done,
        )


def filled(number: int) -> MemoryVolume:
    volume = MemoryVolume(SIZE, uuid=UUID(int=number))
    volume.data[:] = random.Random(number).randbytes(SIZE)
    return volume


def sharing(number: int, pool: str = "one") -> SharingVolume:
    volume = SharingVolume(UUID(int=number), pool)
    volume.data[:] = random.Random(number).randbytes(SIZE)
    return volume


def session(*volumes: MemoryVolume) -> Coupling:
    node = recorded(dict(enumerate(volumes)))
    pair = Coupling(node, settings()).login()
    clear(node, volumes)
    return pair


def clear(node, volumes) -> None:
    for volume in volumes:
        for mapped in node.unit_for(volume).nexuses:
            mapped.take_attention()


def naa(pair: Coupling, lun: int) -> bytes:
    return page(pair, 0x83, lun=lun)[8:24]


def target(
    designator: bytes, kind: int = 3, code_set: int = 1, flags: int = 0, block: int = 512
) -> bytes:
    head = bytes((0xE4, flags, 0, 0, code_set, kind, 0, len(designator)))
    return head + designator.ljust(20, b"\0") + b"\0" + block.to_bytes(3, "big")


def segment(
    source: int, destination: int, sectors: int, source_lba: int, lba: int, length: int = 24
) -> bytes:
    head = (
        bytes((2, 0))
        + length.to_bytes(2, "big")
        + source.to_bytes(2, "big")
        + destination.to_bytes(2, "big")
        + bytes(2)
    )
    return (
        head + sectors.to_bytes(2, "big") + source_lba.to_bytes(8, "big") + lba.to_bytes(8, "big")
    )


def copy_list(
    targets: list[bytes], segments: list[bytes], list_id: int = 7, use: int = 0, inline: int = 0
) -> bytes:
    targets_bytes, segments_bytes = b"".join(targets), b"".join(segments)
    head = bytes((list_id, use << 3)) + len(targets_bytes).to_bytes(2, "big") + bytes(4)
    return (
        head
        + len(segments_bytes).to_bytes(4, "big")
        + inline.to_bytes(4, "big")
        + targets_bytes
        + segments_bytes
    )


def cdb(size: int) -> bytes:
    return bytes((0x83,)) + bytes(9) + size.to_bytes(4, "big") + bytes(2)


def copy(pair: Coupling, parameters: bytes, lun: int = 0) -> None:
    pair.command(cdb(len(parameters)), data=parameters, lun=lun)


def refused(pair: Coupling, parameters: bytes, sense: tuple[int, int, int]) -> CommandFailed:
    return fails(pair, cdb(len(parameters)), sense, data=parameters)


def status(pair: Coupling, list_id: int = 7) -> tuple[int, int, int]:
    data = pair.command(
        bytes((0x84, 0, list_id)) + bytes(7) + (64).to_bytes(4, "big") + bytes(2), read_bytes=64
    )
    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 8 and data[7] == 0
    return data[4], int.from_bytes(data[5:7], "big"), int.from_bytes(data[8:12], "big")


@pytest.mark.parametrize(
    ("sectors", "source_lba", "lba"),
    [(1, 0, 9), (8, 8, 0), (2048, 3, 17), (2048, 8, 4096), (100, SECTORS - 100, 5)],
)
def test_sectors_of_one_disk_reach_another(sectors, source_lba, lba):
    source, destination = filled(1), filled(2)
    pair = session(source, destination)
    expected = bytearray(destination.data)
    expected[lba * 512 : (lba + sectors) * 512] = source.data[
        source_lba * 512 : (source_lba + sectors) * 512
    ]
    before = bytes(source.data)
    copy(
        pair,
        copy_list(
            [target(naa(pair, 0)), target(naa(pair, 1))], [segment(0, 1, sectors, source_lba, lba)]
        ),
    )
    assert destination.data == expected and source.data == before
    assert status(pair) == (1, 1, sectors * 512)


@pytest.mark.parametrize(
    ("sectors", "source_lba", "lba"),
    [(1024, 0, 100), (1024, 100, 0), (4000, 8, 16), (700, 5, 5), (512, 0, 512)],
)
def test_a_range_that_overlaps_its_copy_arrives_whole(sectors, source_lba, lba):
    volume = sharing(3)
    pair = session(volume)
    expected = bytearray(volume.data)
    expected[lba * 512 : (lba + sectors) * 512] = bytes(
        volume.data[source_lba * 512 : (source_lba + sectors) * 512]
    )
    copy(pair, copy_list([target(naa(pair, 0))], [segment(0, 0, sectors, source_lba, lba)]))
    assert volume.data == expected


def test_whole_aligned_blocks_are_shared_and_the_rest_is_copied():
    source, destination = sharing(1), sharing(2)
    assert isinstance(source, CopiesByReference) and not isinstance(
        MemoryVolume(512), CopiesByReference
    )
    pair = session(source, destination)
    copy(
        pair,
        copy_list(
            [target(naa(pair, 0)), target(naa(pair, 1))],
            [segment(0, 1, 100, 3, 11), segment(0, 1, 64, 1, 1000)],
        ),
    )
    assert destination.shared == [(4096, 8192, 11 * 4096)]
    assert destination.data[11 * 512 : 111 * 512] == source.data[3 * 512 : 103 * 512]
    assert destination.data[1000 * 512 : 1064 * 512] == source.data[512 : 65 * 512]


def test_what_cannot_be_shared_is_copied():
    source, destination = sharing(1, "other"), sharing(2)
    pair = session(source, destination)
    copy(
        pair,
        copy_list([target(naa(pair, 0)), target(naa(pair, 1))], [segment(0, 1, 2048, 0, 1024)]),
    )
    assert destination.shared == []
    assert destination.data[1024 * 512 : 3072 * 512] == source.data[: 2048 * 512]
    assert status(pair) == (1, 1, 2048 * 512)


def test_disks_of_other_initiators_do_not_exist():
    seen, hidden = filled(1), filled(2)
    node = recorded({0: seen})
    node.directory.targets["iqn.2026-01.io.cleaved:other"] = {0: hidden}
    pair = Coupling(node, settings()).login()
    other = Coupling(node, settings(target_name="iqn.2026-01.io.cleaved:other", isid=2)).login()
    clear(node, (seen, hidden))
    names = [target(naa(pair, 0)), target(naa(other, 0))]
    for wanted in (segment(1, 0, 8, 0, 0), segment(0, 1, 8, 0, 0)):
        refused(pair, copy_list(names, [wanted]), NOT_REACHABLE)
    refused(pair, copy_list([target(bytes(8))], []), NOT_REACHABLE)
    assert seen.data == filled(1).data and hidden.data == filled(2).data


def test_the_uuid_names_a_disk_too():
    volume = filled(1)
    pair = session(volume)
    copy(
        pair, copy_list([target(b"\x10\0" + volume.uuid.bytes, kind=10)], [segment(0, 0, 8, 0, 64)])
    )
    assert volume.data[64 * 512 : 72 * 512] == volume.data[: 8 * 512]


def test_lists_that_are_refused():
    volume = filled(1)
    pair = session(volume)
    name = target(naa(pair, 0))
    good = segment(0, 0, 8, 0, 64)
    before = bytes(volume.data)
    length_error = (5, 0x1A, 0)
    fails(pair, cdb(8), length_error, data=bytes(8))
    fails(pair, cdb(47), length_error, data=copy_list([name], [good])[:47])
    fails(pair, cdb(75), length_error, data=copy_list([name], [good])[:75])
    fails(pair, cdb(76), length_error, data=copy_list([name], [good])[:60])
    fails(pair, cdb(1 << 20), length_error, data=bytes(16))
    refused(pair, copy_list([name + b"\xe4"], [good]), length_error)
    refused(pair, copy_list([name], [good + b"\x02"]), length_error)
    refused(pair, copy_list([b"\xe0" + name[1:]], [good]), (5, 0x26, 7))
    refused(pair, copy_list([name], [b"\x03" + good[1:]]), (5, 0x26, 9))
    refused(
        pair, copy_list([name] * (limits.COPY_TARGET_DESCRIPTORS_MAX + 1), [good]), (5, 0x26, 6)
    )
    refused(
        pair, copy_list([name], [good] * (limits.COPY_SEGMENT_DESCRIPTORS_MAX + 1)), (5, 0x26, 8)
    )
    refused(pair, copy_list([name], [good], inline=1), (5, 0x26, 0x0B))
    refused(pair, copy_list([name], [good], use=1), (5, 0x26, 0))
    refused(pair, copy_list([name], [good], use=3), (5, 0x26, 0))
    refused(pair, copy_list([target(naa(pair, 0), flags=5)], [good]), (5, 0x26, 0))
    refused(pair, copy_list([target(naa(pair, 0), block=4096)], [good]), (5, 0x26, 0))
    for wrong in (segment(0, 1, 8, 0, 0), segment(1, 0, 8, 0, 0)):
        refused(pair, copy_list([name], [good, wrong]), NOT_REACHABLE)
    beyond = [
        segment(0, 0, 8, SECTORS - 7, 0),
        segment(0, 0, 8, 0, SECTORS - 7),
        segment(0, 0, 8, 1 << 63, 0),
    ]
    for wrong in (*beyond, segment(0, 0, 8, 0, 64, length=20)):
        refused(pair, copy_list([name], [good, wrong]), (10, 0, 0))
    assert volume.data == before


def test_an_empty_list_is_no_error():
    pair = session(filled(1))
    pair.command(cdb(0))
    copy(pair, copy_list([target(naa(pair, 0))], [segment(0, 0, 0, 0, 0)]))
    assert status(pair) == (1, 1, 0)


def test_status_is_told_once_and_only_of_copies_with_an_identifier():
    pair = session(filled(1))
    ask = bytes((0x84, 0, 7)) + bytes(7) + (64).to_bytes(4, "big") + bytes(2)
    fails(pair, ask, (5, 0x24, 0))
    copy(pair, copy_list([target(naa(pair, 0))], [], list_id=0, use=3))
    fails(pair, ask, (5, 0x24, 0))
    copy(pair, copy_list([target(naa(pair, 0))], [segment(0, 0, 8, 0, 8)]))
    assert status(pair) == (1, 1, 4096)
    fails(pair, ask, (5, 0x24, 0))


def test_operating_parameters():
    pair = session(filled(1))
    data = pair.command(
        bytes((0x84, 3)) + bytes(8) + (255).to_bytes(4, "big") + bytes(2), read_bytes=255
    )
    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 42
    assert int.from_bytes(data[8:10], "big") == limits.COPY_TARGET_DESCRIPTORS_MAX
    assert int.from_bytes(data[10:12], "big") == limits.COPY_SEGMENT_DESCRIPTORS_MAX
    assert int.from_bytes(data[12:16], "big") == 16 * 32 + 64 * 28
    assert int.from_bytes(data[16:20], "big") == 0xFFFF * 512 and data[36] == 128 and data[37] == 9
    assert data[43] == 2 and data[44:] == b"\x02\xe4"


def test_a_copy_that_waits_is_in_progress_and_its_identifier_taken():
    volume = filled(1)
    pair = session(volume)
    volume.hold_reads = True
    parameters, results = (
        copy_list([target(naa(pair, 0))], [segment(0, 0, 8, 0, 64), segment(0, 0, 8, 64, 128)]),
        Results(),
    )
    pair.initiator.submit(0, cdb(len(parameters)), results, data=parameters)
    pair.run()
    assert results.got == [] and status(pair) == (0, 0, 0)
    refused(pair, parameters, (5, 0, 0x16))
    volume.release()
    pair.run()
    assert results.got == [] and status(pair) == (0, 1, 4096)
    volume.release()
    pair.run()
    assert results.data == b"" and status(pair) == (1, 2, 8192)
    assert volume.data[128 * 512 : 136 * 512] == volume.data[: 8 * 512]


@pytest.mark.parametrize(
    ("fault", "sense"), [("fail_reads", (3, 0x11, 0)), ("fail_writes", (3, 0x0C, 0))]
)
def test_an_error_ends_the_copy(fault, sense):
    source, destination = filled(1), filled(2)
    pair = session(source, destination)
    names = [target(naa(pair, 0)), target(naa(pair, 1))]
    setattr(source if fault == "fail_reads" else destination, fault, errno.EIO)
    refused(pair, copy_list(names, [segment(0, 1, 8, 0, 0), segment(0, 1, 8, 8, 8)]), sense)
    assert status(pair) == (2, 0, 0)
    source.fail_reads = destination.fail_writes = None
    copy(pair, copy_list(names, [segment(0, 1, 8, 0, 0)]))
    assert destination.data[:4096] == source.data[:4096]


def test_a_full_pool_is_named():
    volume = filled(1)
    pair = session(volume)
    volume.fail_writes = errno.ENOSPC
    refused(pair, copy_list([target(naa(pair, 0))], [segment(0, 0, 8, 0, 8)]), (7, 0x27, 7))


def test_protection_and_reservations_hold_for_copies():
    source, destination = filled(1), filled(2)
    pair = session(source, destination)
    names = [target(naa(pair, 0)), target(naa(pair, 1))]
    parameters = copy_list(names, [segment(0, 1, 8, 0, 0)])
    destination.read_only = True
    refused(pair, parameters, (7, 0x27, 0))
    destination.read_only = False
    unit = pair.node.unit_for(destination)
    somebody = NexusId("somebody", 1)
    unit.reservations.register([somebody], 1, False)
    unit.reservations.reserve(somebody, 1)
    with pytest.raises(CommandFailed) as conflict:
        copy(pair, parameters)
    assert conflict.value.status == STATUS_RESERVATION_CONFLICT
    copy(pair, copy_list(names, [segment(1, 0, 8, 0, 0)]))  # write exclusive: it can be read
    unit.started = False
    refused(pair, copy_list(names, [segment(1, 0, 8, 0, 0)]), NOT_REACHABLE)


def test_compare_and_write_of_the_destination_is_not_cut_in_two():
    """It comes while a piece is under way: it waits, and the copy's next piece waits for it."""
    source, destination = filled(1), filled(2)
    pair = session(source, destination)
    names = [target(naa(pair, 0)), target(naa(pair, 1))]
    destination.hold_writes = True
    parameters, copied, compared = (
        copy_list(names, [segment(0, 1, 8, 0, 0), segment(0, 1, 8, 9, 8)]),
        Results(),
        Results(),
    )
    pair.initiator.submit(0, cdb(len(parameters)), copied, data=parameters)
    pair.run()
    new = bytes(source.data[:512]) + b"\xaa" * 512
    pair.initiator.submit(1, bytes((0x89, 0)) + bytes(11) + bytes((1, 0, 0)), compared, data=new)
    pair.run()
    unit = pair.node.unit_for(destination)
    assert (copied.got, compared.got, unit.gate.closed) == ([], [], True)
    # The first piece; then the comparison holds and is written, and is held in its turn.
    destination.release()
    pair.run()
    assert copied.got == compared.got == [] and destination.data[:512] == b"\xaa" * 512
    assert destination.data[4096:8192] == filled(2).data[4096:8192]
    destination.release()
    pair.run()
    assert compared.data == b"" and copied.got == []
    destination.release()
    pair.run()
    assert (copied.data, unit.gate.closed) == (b"", False)
    assert destination.data[512:8192] == source.data[512:4096] + source.data[4608:8704]


def test_segments_that_continue_each_other_are_one_copy_and_count_as_they_were_given():
    source, destination = sharing(1), sharing(2)
    pair = session(source, destination)
    names = [target(naa(pair, 0)), target(naa(pair, 1))]
    row = [segment(0, 1, 2048, at, at + 16) for at in (0, 2048, 4096)]
    copy(
        pair,
        copy_list(
            names,
            [
                *row,
                segment(0, 1, 0, 6144, 6160),
                segment(0, 1, 8, 0, 6160),
                segment(1, 0, 8, 8, 6168),
            ],
        ),
    )
    assert destination.shared == [
        (0, 8192, 3 * 2048 * 512),
        (0, 6160 * 512, 4096),
    ] and source.shared == [(4096, 6168 * 512, 4096)]
    assert status(pair) == (1, 6, (3 * 2048 + 16) * 512)


def test_within_one_disk_a_segment_reads_what_the_one_before_wrote():
    volume = sharing(1)
    pair, first = session(volume), bytes(volume.data[:4096])
    copy(
        pair,
        copy_list([target(naa(pair, 0))], [segment(0, 0, 8, at, at + 8) for at in range(0, 32, 8)]),
    )
    assert volume.data[: 5 * 4096] == first * 5


def test_many_segments_that_end_at_once_do_not_nest():
    volume = filled(1)
    pair = session(volume)
    copy(
        pair,
        copy_list(
            [target(naa(pair, 0))],
            [segment(0, 0, 4096, 0, 4096)] * limits.COPY_SEGMENT_DESCRIPTORS_MAX,
        ),
    )
    assert status(pair) == (
        1,
        limits.COPY_SEGMENT_DESCRIPTORS_MAX,
        limits.COPY_SEGMENT_DESCRIPTORS_MAX * 4096 * 512,
    )
