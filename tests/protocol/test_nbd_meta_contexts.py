"""Metadata contexts: listing and selecting them, and NBD_CMD_BLOCK_STATUS."""

import errno
import struct

import pytest

from protocol.nbd import limits
from protocol.nbd.export import Extents, ExtentsCompletion
from tests.protocol.memory_volume import MemoryVolume, VolumeError
from tests.protocol.nbd_client import (
    ACK,
    BLOCK_STATUS,
    EINVAL,
    EIO,
    ERROR,
    EXTENDED,
    FUA,
    GO,
    INVALID,
    LIST_META,
    PAYLOAD_LEN,
    REP_META,
    REQ_ONE,
    SET_META,
    SIZE,
    STATUS,
    STATUS_EXT,
    STRUCTURED,
    STYLES,
    Answer,
    ChangedContext,
    Client,
    DepthVolume,
    MemoryDirectory,
    MemoryExport,
    context_data,
    extents,
    info_data,
    other_uuid,
)

BASE, DEPTH, CHANGED = "base:allocation", "qemu:allocation-depth", "cleaved:changed/monday"
chunked = pytest.mark.parametrize("style", ["extended", "structured"])


def client(style: str = "structured", volume: MemoryVolume | None = None) -> Client:
    export = MemoryExport(volume or DepthVolume(SIZE))
    export.contexts[CHANGED] = ChangedContext()
    peer = Client(MemoryDirectory(export, MemoryExport(MemoryVolume(SIZE), "plain")))
    peer.negotiate(*STYLES[style])
    return peer


def changed_of(peer: Client) -> ChangedContext:
    assert peer.connection.session is not None
    context = peer.connection.session.export.context(CHANGED)
    assert isinstance(context, ChangedContext)
    return context


def listed(peer: Client, *queries: str, export: str = "disk") -> list[str]:
    found = peer.option(LIST_META, context_data(export, *queries))
    assert found.pop().kind == ACK
    assert {reply.kind for reply in found} <= {REP_META}
    assert {reply.data[:4] for reply in found} <= {bytes(4)}
    return [reply.data[4:].decode() for reply in found]


def status(peer: Client, *args: int, **more: object) -> dict[int, list[tuple[int, int]]]:
    """Descriptors by context, of a successful request."""
    answers = peer.request(BLOCK_STATUS, *args, **more)  # type: ignore[arg-type]
    assert [answer.done for answer in answers] == [False] * (len(answers) - 1) + [True]
    kind = STATUS_EXT if peer.extended else STATUS
    assert {answer.kind for answer in answers} == {kind}
    return dict(map(extents, answers))


# --- Negotiation ----------------------------------------------------------------------------------


@chunked
@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ((), [BASE, DEPTH, CHANGED]),
        (("base:",), [BASE]),
        (("qemu:", "base:"), [DEPTH, BASE]),
        (("cleaved:",), [CHANGED]),
        ((CHANGED, BASE, BASE), [CHANGED, BASE]),
        (("base:unknown", "other:", "x-y:z", "cleaved:changed/tuesday"), []),
        (("BASE:allocation", "base:allocation2", "base"[:0] + "basex:"), []),
    ],
)
def test_listing(style: str, queries: tuple[str, ...], names: list[str]) -> None:
    assert listed(client(style), *queries) == names


def test_a_volume_that_knows_no_depth_has_no_context_of_it() -> None:
    peer = client()
    assert listed(peer, export="plain") == [BASE]
    assert peer.contexts(DEPTH, BASE, export="plain") == [1]


@chunked
@pytest.mark.parametrize(
    ("queries", "count"),
    [
        ((), 0),
        ((BASE,), 1),
        ((BASE, BASE), 1),
        ((BASE, DEPTH, CHANGED), 3),
        (("base:", "qemu:", "cleaved:"), 0),
        (("base:unknown", CHANGED), 1),
    ],
)
def test_selecting(style: str, queries: tuple[str, ...], count: int) -> None:
    assert client(style).contexts(*queries) == list(range(1, count + 1))


@pytest.mark.parametrize(
    "later",
    [
        context_data("disk"),
        context_data("disk", "nocolon"),
        context_data("nothing", BASE),
        b"",
        bytes(40000),
    ],
)
def test_a_later_selection_replaces_the_earlier_even_when_it_fails(later: bytes) -> None:
    peer = client()
    peer.contexts(BASE)
    peer.option(SET_META, later)
    peer.go()
    assert peer.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_contexts_count_for_the_export_that_they_were_selected_for() -> None:
    peer = client()
    peer.contexts(BASE)
    peer.go("plain")
    assert peer.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_contexts_do_not_count_for_another_disk_of_the_same_name() -> None:
    export = MemoryExport(MemoryVolume(SIZE))
    directory = MemoryDirectory(export)
    peer = Client(directory)
    peer.negotiate(STRUCTURED)
    peer.contexts(BASE)
    directory.exports["disk"] = MemoryExport(MemoryVolume(SIZE, uuid=other_uuid(2)))
    peer.go()
    assert peer.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_invalid_queries_leave_no_reply_but_the_error() -> None:
    peer = client()
    assert peer.kinds(LIST_META, context_data("disk", BASE, "nocolon")) == [INVALID]
    assert peer.kinds(SET_META, context_data("disk", BASE, "nocolon")) == [INVALID]


# --- Block status ---------------------------------------------------------------------------------


@chunked
@pytest.mark.parametrize("fua", [0, FUA])
def test_allocation(style: str, fua: int) -> None:
    peer = client(style)
    peer.contexts(BASE)
    peer.go()
    peer.request(1, 8192, data=b"x" * 4096)
    assert status(peer, 0, SIZE, flags=fua) == {1: [(8192, 3), (4096, 0), (SIZE - 12288, 3)]}
    assert status(peer, 512, 8192) == {1: [(7680, 3), (512, 0)]}
    assert status(peer, 0, SIZE, flags=REQ_ONE) == {1: [(8192, 3)]}
    assert status(peer, 0, 4096, flags=REQ_ONE) == {1: [(4096, 3)]}


def test_a_volume_that_reports_nothing_is_allocated() -> None:
    class Silent(MemoryVolume):
        allocation = None  # type: ignore[assignment]

    volume = Silent(SIZE)
    export = MemoryExport(volume)
    peer = Client(MemoryDirectory(export))
    peer.negotiate(STRUCTURED)
    peer.contexts(BASE)

    class Plain:
        """Only what every volume has."""

        uuid, size_bytes, name, read_only = volume.uuid, SIZE, "disk", False

        def settle(self) -> None:
            volume.settle()

    export.volume = Plain()  # type: ignore[assignment]
    peer.contexts(BASE)
    peer.go()
    assert status(peer, 0, 8192) == {1: [(8192, 0)]}


@chunked
def test_every_selected_context_answers(style: str) -> None:
    peer = client(style)
    assert peer.contexts(CHANGED, DEPTH, BASE) == [1, 2, 3]
    peer.go()
    found = status(peer, 512 << 10, 8192)
    assert found == {1: [(4096, 1), (4096, 0)], 2: [(8192, 2)], 3: [(8192, 3)]}
    assert status(peer, 0, SIZE)[2] == [(SIZE // 2, 1), (SIZE // 2, 2)]
    assert changed_of(peer).asked[0] == (512 << 10, 8192, limits.EXTENTS_MAX)


@chunked
def test_answers_are_cut_to_the_request_and_joined(style: str) -> None:
    peer = client(style)
    peer.contexts(CHANGED)
    peer.go()
    context = changed_of(peer)
    context.answer = [(512, 1), (0, 7), (512, 1), (512, 0), (1 << 40, 1)]
    assert status(peer, 0, 8192) == {1: [(1024, 1), (512, 0), (6656, 1)]}
    assert status(peer, 0, 8192, flags=REQ_ONE) == {1: [(1024, 1)]}
    assert context.asked[-1][2] == 1
    context.answer = [(512, number) for number in range(limits.EXTENTS_MAX + 50)]
    peer.connection.session.size_bytes = 1 << 40  # type: ignore[union-attr]
    assert peer.connection.session is not None
    export = peer.connection.session.export
    export.volume.data = bytearray(4 << 20)  # type: ignore[attr-defined]
    peer.connection.session.size_bytes = 4 << 20
    (found,) = status(peer, 0, 4 << 20).values()
    assert len(found) == limits.EXTENTS_MAX


@chunked
@pytest.mark.parametrize(
    ("answer", "error", "value"),
    [
        ([], None, EIO),
        ([(0, 1)], None, EIO),
        ([(512, 1)], VolumeError(errno.EIO), EIO),
        ([(512, 1)], VolumeError(errno.ENOENT), EINVAL),
    ],
)
def test_one_context_that_fails_fails_the_request(
    style: str, answer: Extents, error: Exception | None, value: int
) -> None:
    peer = client(style)
    peer.contexts(BASE, CHANGED)
    peer.go()
    changed_of(peer).answer, changed_of(peer).error = answer, error
    (found,) = peer.request(BLOCK_STATUS, 0, 4096)
    assert (found.kind, found.error) == (ERROR, value)


@chunked
@pytest.mark.parametrize(("offset", "length"), [(0, 0), (1, 512), (SIZE, 512), (0, SIZE + 512)])
def test_ranges_that_cannot_be(style: str, offset: int, length: int) -> None:
    peer = client(style)
    peer.contexts(BASE)
    peer.go()
    assert peer.error(BLOCK_STATUS, offset, length) == EINVAL


@pytest.mark.parametrize("style", sorted(STYLES))
def test_no_context_was_selected(style: str) -> None:
    peer = client(style)
    peer.go()
    assert peer.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_answers_that_come_later() -> None:
    class Late(MemoryVolume):
        def allocation_depth(
            self, offset_bytes: int, length_bytes: int, runs_max: int, done: ExtentsCompletion
        ) -> None:
            self.held.append(lambda: done([(length_bytes, 1)], None))

    volume = Late(SIZE)
    peer = client("structured", volume)
    peer.contexts(BASE, DEPTH)
    peer.go()
    assert peer.request(BLOCK_STATUS, 0, 4096) == []
    volume.release()
    peer.transport.run()
    assert len(peer.answers({})) == 2
    peer.send(peer.encode(BLOCK_STATUS, 0, 4096))
    peer.connection.connection_lost()
    assert peer.connection.session is not None and peer.connection.session.in_flight == 1
    volume.release()
    assert peer.connection.session.in_flight == 0


# --- The payload of extended headers --------------------------------------------------------------


def filtered(peer: Client, offset: int, length: int, *numbers: int) -> list[Answer]:
    payload = struct.pack(f">Q{len(numbers)}I", length, *numbers)
    return peer.request(BLOCK_STATUS, offset, data=payload)


def selecting() -> Client:
    peer = client("extended")
    assert peer.contexts(BASE, DEPTH, CHANGED) == [1, 2, 3]
    return peer.go()


@pytest.mark.parametrize("numbers", [(1,), (3,), (2, 1), (1, 2, 3)])
@pytest.mark.parametrize("chunk", [1 << 30, 5])
def test_a_payload_names_contexts(numbers: tuple[int, ...], chunk: int) -> None:
    peer = selecting()
    peer.chunk = chunk
    assert tuple(dict(map(extents, filtered(peer, 0, 4096, *numbers)))) == numbers


@pytest.mark.parametrize("numbers", [(), (0,), (4,), (1, 1), (1, 2, 3, 3), (1, 0xFFFFFFFF)])
def test_a_payload_names_contexts_that_there_are_not(numbers: tuple[int, ...]) -> None:
    peer = selecting()
    assert [answer.error for answer in filtered(peer, 0, 4096, *numbers)] == [EINVAL]
    assert peer.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    "payload", [b"x", bytes(8), bytes(11), bytes(13), bytes(8 + 17 * 4), bytes(600_000)]
)
def test_a_payload_of_another_form(payload: bytes) -> None:
    peer = selecting()
    assert peer.error(BLOCK_STATUS, 0, data=payload) == EINVAL
    assert peer.read(0, 512) == bytes(512)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 511), (SIZE, 512), (0, 1 << 63)])
def test_a_payload_with_a_range_that_cannot_be(offset: int, length: int) -> None:
    peer = selecting()
    assert [answer.error for answer in filtered(peer, offset, length, 1)] == [EINVAL]


def test_a_payload_without_contexts_is_received() -> None:
    peer = client("extended").go()
    assert [answer.error for answer in filtered(peer, 0, 4096, 1)] == [EINVAL]
    assert peer.read(0, 512) == bytes(512)


def test_the_flag_without_a_payload() -> None:
    peer = selecting()
    assert peer.error(BLOCK_STATUS, 0, 0, PAYLOAD_LEN) == EINVAL


def test_go_asks_for_no_contexts_by_itself() -> None:
    peer = client("extended")
    assert peer.kinds(EXTENDED) == [ACK]
    assert peer.kinds(GO, info_data("disk"))[-1] == ACK
    assert peer.connection.session is not None and not peer.connection.session.contexts
