"""The fuzzed surfaces. Each takes a random source and makes one execution; an escaping exception is
a finding.

Only these are declared: `ScsiError` from `dispatch.prepare`, `IscsiError` inside the login's own
parsers, and errors given to a completion that can be expressed as sense data. A connection raises
nothing, whether its input arrives whole or in pieces.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from protocol.iscsi import chap, login, pdu, text
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.pdu import pack
from protocol.scsi import dispatch, transport_id
from protocol.scsi.command import Command
from protocol.scsi.errors import ScsiError, sense_of
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.scsi.plan import Operation, Query, ReadExtent
from protocol.volume import Buffer, Completion
from tests.protocol.coupling import Peer, feed
from tests.protocol.directory import INITIATOR, TARGET, recorded
from tests.protocol.memory_volume import MemoryVolume

Surface = Callable[[Random], None]

DISK_BYTES: Final = 64 * 1024
INTERESTING: Final = (
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
)
# A command whose transfer takes many PDUs shows nothing that a short one does not.
PARAMETER_BYTES_MAX: Final = 600
SECRETS: Final = ChapSecrets("user", b"secret-of-12+", "target", b"another-secret")


def mutated(chance: Random, data: bytes) -> bytes:
    """Return ``data`` with some bytes or numbers changed, cut, duplicated or extended."""
    found = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(len(found) + 1)
        size = chance.choice((1, 2, 4, 8))
        match chance.randrange(6):
            case 0:
                found[at : at + 1] = chance.randbytes(1)
            case 1:
                found[at : at + size] = (chance.choice(INTERESTING) % (1 << 8 * size)).to_bytes(
                    size, "big"
                )
            case 2:
                del found[at : at + chance.choice((1, 2, 8, 64))]
            case 3:
                found[at:at] = found[max(0, at - 32) : at]
            case 4:
                found += chance.randbytes(chance.choice((1, 3, 16)))
            case _ if found:
                found[at % len(found)] ^= 1 << chance.randrange(8)
    return bytes(found)


# --- CDBs and parameter data ----------------------------------------------------------------------


class _PromptVolume(MemoryVolume):
    """Completes writes at once, even without a settle."""

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        super().write(offset_bytes, data, fua, done)
        super().settle()


def _nexus() -> tuple[Nexus, _PromptVolume]:
    volume = _PromptVolume(DISK_BYTES)
    nexus = Nexus(f"{INITIATOR},i,0x1", TARGET)
    nexus.map(0, LogicalUnit(volume)).take_attention()
    return nexus, volume


def _cdb(chance: Random, command: Command) -> bytes:
    """Build a CDB that mostly sets what its command evaluates, with numbers near limits."""
    field = bytearray(command.cdb_bytes)
    field[0] = command.opcode
    for at in range(1, command.cdb_bytes):
        field[at] = (
            chance.choice((0, 0, 0, 1, 8, 24, 64, chance.randrange(256))) & command.usage[at]
        )
    if command.service_action is not None:
        field[1] = field[1] & 0xE0 | command.service_action
    if chance.random() < 0.1:
        field[chance.randrange(len(field))] ^= 1 << chance.randrange(8)
    return bytes(field).ljust(16, b"\0")


def _carry_out(chance: Random, nexus: Nexus, cdb: bytes, data: bytes) -> None:
    """Prepare and start one command. Each operation must complete exactly once, and its error must
    have sense data.
    """
    try:
        plan = dispatch.prepare(nexus, 0, cdb)
    except ScsiError:
        return
    ended: list[Exception | None] = []
    if isinstance(plan, Operation):
        if plan.exact:
            data = (data * (plan.data_bytes // max(1, len(data)) + 1))[: plan.data_bytes] or bytes(
                plan.data_bytes
            )
        plan.start(bytearray(data[: plan.data_bytes]), ended.append)
    elif isinstance(plan, Query):
        plan.start(lambda _, error: ended.append(error))
    else:
        assert (
            not isinstance(plan, ReadExtent) or plan.offset_bytes + plan.length_bytes <= DISK_BYTES
        )
        return
    assert len(ended) == 1, f"{len(ended)} completions"
    if ended[0] is not None and not isinstance(ended[0], ScsiError):
        raise AssertionError(f"an error without sense data: {sense_of(ended[0], True)}") from ended[
            0
        ]


def cdbs(chance: Random) -> None:
    """Run a few commands with arbitrary CDBs on one disk."""
    nexus, volume = _nexus()
    for _ in range(4):
        command = chance.choice(dispatch.COMMANDS)
        cdb = _cdb(chance, command) if chance.random() < 0.9 else chance.randbytes(16)
        _carry_out(chance, nexus, cdb, chance.randbytes(chance.choice((0, 1, 24, 512, 1024))))
    assert len(volume.data) == DISK_BYTES


def _shapes(naa: bytes) -> dict[int, tuple[bytes, ...]]:
    """Return valid parameter lists by opcode: mutations of them reach deeper than noise."""
    mode_pages = bytes((0x08, 0x12, 4)) + bytes(17) + bytes((0x0A, 0x0A, 4, 0x10, 8)) + bytes(7)
    target = bytes((0xE4, 0, 0, 0, 1, 3, 0, 8)) + naa + bytes(13) + (512).to_bytes(3, "big")
    segment = bytes((2, 0, 0, 24)) + bytes(6) + bytes((0, 8)) + bytes(8) + bytes(7) + b"\x10"
    copy = (
        bytes((1, 0, 0, 32)) + bytes(4) + (56).to_bytes(4, "big") + bytes(4) + target + segment * 2
    )
    unmap = (
        bytes((0, 38, 0, 32)) + bytes(4) + (bytes(7) + b"\x08" + bytes(3) + b"\x08" + bytes(4)) * 2
    )
    reserve = bytes(8) + bytes(7) + b"\x01" + bytes(4) + b"\x01" + bytes(3)
    ids = transport_id.encode(f"{INITIATOR},i,0x000000000002") + transport_id.encode(
        f"{INITIATOR},i,0x000000000001"
    )
    with_ports = reserve[:20] + b"\x09" + reserve[21:] + len(ids).to_bytes(4, "big") + ids
    move = (
        reserve[8:16]
        + reserve[8:16]
        + bytes((0, 1, 0, 1))
        + (len(ids) // 2).to_bytes(4, "big")
        + ids[: len(ids) // 2]
    )
    return {
        0x15: (bytes(4) + mode_pages, bytes((0, 0, 0, 8)) + bytes(8) + mode_pages),
        0x55: (bytes(8) + mode_pages,),
        0x42: (unmap,),
        0x48: (b"\x01\0\0\x04abcd",),
        0x5F: (reserve, reserve[8:16] + reserve[:8] + reserve[16:], with_ports, move),
        0x83: (copy,),
    }


_LENGTH_AT: Final = {
    0x15: (4, 5),
    0x55: (7, 9),
    0x42: (7, 9),
    0x48: (7, 9),
    0x5F: (5, 9),
    0x83: (10, 14),
}
_WITH_PARAMETERS: Final = tuple(
    command for command in dispatch.COMMANDS if command.opcode in _LENGTH_AT
)


def parameters(chance: Random) -> None:
    """Run commands with nearly valid parameter lists."""
    nexus, volume = _nexus()
    raw = volume.uuid.bytes
    shapes = _shapes(bytes((0x30 | raw[0] & 0x0F,)) + raw[1:6] + raw[14:16])
    for _ in range(3):
        command = chance.choice(_WITH_PARAMETERS)
        data = mutated(chance, chance.choice(shapes[command.opcode]))[:PARAMETER_BYTES_MAX]
        cdb = bytearray(_cdb(chance, command))
        first, end = _LENGTH_AT[command.opcode]
        length = chance.choice((len(data), len(data), len(data), chance.randrange(700)))
        cdb[first:end] = (length % (1 << 8 * (end - first))).to_bytes(end - first, "big")
        if command.opcode in (0x15, 0x55):
            cdb[1] |= 0x10
        _carry_out(chance, nexus, bytes(cdb), data)


# --- Login ----------------------------------------------------------------------------------------

_NAMES: Final = (
    "InitiatorName",
    "TargetName",
    "SessionType",
    "AuthMethod",
    "CHAP_A",
    "CHAP_N",
    "CHAP_R",
    "CHAP_I",
    "CHAP_C",
    "HeaderDigest",
    "DataDigest",
    "MaxBurstLength",
    "FirstBurstLength",
    "InitialR2T",
    "MaxConnections",
    "X-any",
    "SendTargets",
    "",
)
_VALUES: Final = (
    INITIATOR,
    TARGET,
    "Normal",
    "Discovery",
    "None",
    "CHAP",
    "CHAP,None",
    "5",
    "7,5",
    "0x12",
    "0x",
    "0bAA==",
    "0b",
    "Yes",
    "No",
    "",
    "65536",
    "99999999999999999999",
    "-1",
    "CRC32C,None",
    "user",
    "\u0100",
    "0x" + "ff" * 1030,
    "Reject",
    "NotUnderstood",
)


def _text(chance: Random) -> bytes:
    pairs = [(chance.choice(_NAMES), chance.choice(_VALUES)) for _ in range(chance.randrange(6))]
    if chance.random() < 0.7:
        pairs = [
            ("InitiatorName", INITIATOR),
            ("TargetName", TARGET),
            ("SessionType", "Normal"),
            *pairs,
        ]
    body = "".join(f"{name}={value}\0" for name, value in pairs).encode()
    return mutated(chance, body) if chance.random() < 0.4 else body


def _login_request(chance: Random, body: bytes) -> bytes:
    return _login_pdu(
        body, chance.choice((0x81, 0x87, 0x87, 0x83, 0x04, 0x40, 0x00, chance.randrange(256)))
    )


def _connected(stream: bytes, piece: int) -> tuple[bytes, bool]:
    """Feed a new connection in pieces of some size, and close it."""
    peer = Peer(recorded({0: MemoryVolume(DISK_BYTES)}))
    feed(peer.connection, stream, piece)
    peer.connection.connection_lost()
    return bytes(peer.sent), peer.closed


def login_text(chance: Random) -> None:
    """Send login requests with arbitrary text: the answer must not depend on the pieces."""
    stream = b"".join(_login_request(chance, _text(chance)) for _ in range(chance.randrange(1, 4)))
    assert _connected(stream, 1 << 30) == _connected(stream, chance.choice((48, 7, 3, 1))), (
        "the pieces made a difference"
    )


_NAMED: Final = f"InitiatorName={INITIATOR}\0TargetName={TARGET}\0AuthMethod=CHAP\0".encode()


def _login_pdu(body: bytes, flags: int) -> bytes:
    words = (0, 1, 0, 0, 0, 0, 0)
    head = pack(
        pdu.LOGIN_REQUEST | pdu.IMMEDIATE, flags, 7, length=len(body), lun=1 << 16, words=words
    )
    return head + body + bytes(-len(body) % 4)


def login_chap(chance: Random) -> None:
    """Run CHAP exchanges with arbitrary values; no login succeeds without the secret. The parsers
    of the values also run alone.
    """
    answer = "".join(
        f"{name}={chance.choice(_VALUES)}\0" for name in ("CHAP_R", "CHAP_I", "CHAP_C")
    )
    third = f"CHAP_N=user\0{answer}".encode() if chance.random() < 0.5 else _text(chance)
    bodies = (_NAMED, f"CHAP_A={chance.choice(_VALUES)}\0".encode(), third, _text(chance))
    stream = b"".join(
        _login_pdu(body, flags)
        for body, flags in zip(bodies, (0x00, 0x00, 0x81, 0x87), strict=True)
    )
    peer = Peer(recorded({0: MemoryVolume(DISK_BYTES)}, SECRETS, SECRETS))
    feed(peer.connection, stream, chance.choice((1 << 30, 3)))
    assert not peer.connection.logged_in, "logged in without the secret"
    for parser in (
        chap.decode_binary,
        chap.parse_identifier,
        lambda value: text.parse(value.encode()),
    ):
        try:
            parser(mutated(chance, chance.choice(_VALUES).encode()).decode("latin-1"))
        except IscsiError:
            continue


# --- PDUs -----------------------------------------------------------------------------------------

_LOGIN_BODY: Final = text.encode(
    [
        ("InitiatorName", INITIATOR),
        ("TargetName", TARGET),
        ("SessionType", "Normal"),
        ("InitialR2T", "No"),
    ]
)
_LOGIN: Final = _login_pdu(_LOGIN_BODY, pdu.TRANSIT | login.OPERATIONAL << 2 | login.FULL_FEATURE)
_OPCODES: Final = (0, 1, 1, 1, 1, 2, 4, 5, 5, 6, 0x10)


def _request(chance: Random, cmd_sn: int) -> bytes:
    """Build one PDU with a plausible frame and arbitrary content."""
    opcode = chance.choice(_OPCODES) if chance.random() < 0.95 else chance.randrange(64)
    body = chance.randbytes(chance.choice((0, 0, 0, 4, 24, 512)))
    ahs = bytes(chance.choice((0, 0, 0, 0, 4, 8)))

    def word() -> int:
        return chance.choice(INTERESTING) & 0xFFFFFFFF

    head = pack(
        opcode | chance.choice((0, 0, pdu.IMMEDIATE)),
        chance.choice((0x80, 0x81, 0xA1, 0xC1, 0x01, chance.randrange(256))),
        chance.choice((1, 2, 3, pdu.RESERVED_TAG)),
        length=len(ahs) // 4 << 24 | len(body),
        lun=chance.choice((0, 0, 0, 1 << 48, (1 << 64) - 1)),
        words=(
            chance.choice((0, 1, 512, 4096, pdu.RESERVED_TAG)),
            chance.choice((cmd_sn, cmd_sn, cmd_sn, 0)),
            0,
            word(),
            word(),
            word(),
            word(),
        ),
    )
    if opcode == pdu.SCSI_COMMAND:
        head = head[:32] + _cdb(chance, chance.choice(dispatch.COMMANDS))
    return head + ahs + body + bytes(-len(body) % 4)


def framing(chance: Random) -> None:
    """Send arbitrary PDUs in a session: whole and in pieces, the answers and the disk must be the
    same.
    """
    stream = b"".join(_request(chance, 1 + number) for number in range(chance.randrange(1, 6)))
    if chance.random() < 0.3:
        stream = mutated(chance, stream)
    outcomes = []
    for piece in (1 << 30, chance.choice((100, 49, 48, 47, 5, 1))):
        volume = _PromptVolume(DISK_BYTES)
        peer = Peer(recorded({0: volume}))
        feed(peer.connection, _LOGIN, 1 << 30)
        feed(peer.connection, stream, piece)
        peer.connection.connection_lost()
        outcomes.append((bytes(peer.sent), bytes(volume.data), peer.closed))
    assert outcomes[0] == outcomes[1], "the pieces made a difference"


SURFACES: Final[dict[str, Surface]] = {
    "cdbs": cdbs,
    "parameters": parameters,
    "login_text": login_text,
    "login_chap": login_chap,
    "framing": framing,
}
