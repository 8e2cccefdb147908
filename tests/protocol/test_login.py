"""The login state machine of the target, PDU by PDU, and the negotiation of every key."""

import itertools

import pytest

from protocol.iscsi import keys, limits, login, text
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.errors import IscsiError, LoginRefused
from protocol.iscsi.pdu import (
    CONTINUE,
    FULL_FEATURE,
    IMMEDIATE,
    LOGIN_REQUEST,
    LOGIN_RESPONSE,
    OPERATIONAL_STAGE,
    SECURITY_STAGE,
    TRANSIT,
    Pdu,
    pack,
)
from tests.protocol.coupling import Coupling, Peer, coupled, feed, settings
from tests.protocol.directory import INITIATOR, TARGET, RecordedNode, recorded
from tests.protocol.memory_volume import MemoryVolume

SECRETS = ChapSecrets("user", b"secret-of-12+", "target", b"another-secret")
NAMES = [("InitiatorName", INITIATOR), ("TargetName", TARGET), ("SessionType", "Normal")]


def node(chap: ChapSecrets | None = None, discovery: ChapSecrets | None = None) -> RecordedNode:
    return recorded({0: MemoryVolume(1 << 20)}, chap, discovery)


def request(
    pairs: list[tuple[str, str]] | bytes,
    stage: int = OPERATIONAL_STAGE,
    following: int | None = FULL_FEATURE,
    *,
    lun: int = 1 << 16,
    version_min: int = 0,
    cid: int = 0,
    flags: int = 0,
) -> bytes:
    """A login request."""
    body = pairs if isinstance(pairs, bytes) else text.encode(pairs)
    flags |= stage << 2 | (TRANSIT | following if following is not None else 0)
    head = pack(
        LOGIN_REQUEST | IMMEDIATE,
        flags,
        7,
        byte3=version_min,
        length=len(body),
        lun=lun,
        words=(cid << 16, 5, 0, 0, 0, 0, 0),
    )
    return head + body + bytes(-len(body) % 4)


def responses(data: bytes) -> list[tuple[Pdu, dict[str, str]]]:
    """Login responses with their text."""
    got = []
    while data:
        length = int.from_bytes(data[5:8], "big")
        body = data[48 : 48 + length]
        got.append((Pdu(data[:48], b"", memoryview(body)), text.parse(body)))
        data = data[48 + length + -length % 4 :]
    return got


def exchange(peer: Peer, data: bytes) -> tuple[Pdu, dict[str, str]]:
    """One request, one response."""
    feed(peer.connection, data)
    got = responses(peer.take())
    assert len(got) == 1
    return got[0]


def test_one_exchange_is_enough_without_authentication():
    peer = Peer(node())
    pdu, answers = exchange(peer, request(NAMES))
    assert pdu.opcode == LOGIN_RESPONSE and pdu.word36 == 0
    assert pdu.flags == TRANSIT | OPERATIONAL_STAGE << 2 | FULL_FEATURE
    assert pdu.lun & 0xFFFF == peer.connection.tsih != 0
    assert pdu.lun >> 16 == 1
    assert (pdu.exp_cmd_sn, pdu.max_cmd_sn) == (5, 5 + limits.COMMAND_WINDOW - 1)
    assert answers == {
        "TargetPortalGroupTag": "1",
        "MaxRecvDataSegmentLength": str(limits.RECEIVE_DATA_SEGMENT_BYTES),
    }
    assert peer.connection.describe()["state"] == "active"


def test_security_then_operational():
    peer = Peer(node())
    first, answers = exchange(
        peer,
        request([*NAMES, ("AuthMethod", "CHAP,None")], SECURITY_STAGE, OPERATIONAL_STAGE),
    )
    assert answers == {"TargetPortalGroupTag": "1", "AuthMethod": "None"}
    assert first.flags == TRANSIT | OPERATIONAL_STAGE and first.lun & 0xFFFF == 0
    second, _ = exchange(peer, request([("HeaderDigest", "None")]))
    assert second.stat_sn == first.stat_sn + 1
    assert peer.connection.describe()["state"] == "active"


def test_a_stage_is_not_left_before_the_initiator_asks_for_it():
    peer = Peer(node())
    pdu, answers = exchange(peer, request(NAMES, OPERATIONAL_STAGE, None))
    assert pdu.flags == OPERATIONAL_STAGE << 2 and "MaxRecvDataSegmentLength" in answers
    _, answers = exchange(peer, request([]))
    assert answers == {} and peer.connection.describe()["state"] == "active"


STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize(("stage", "following"), list(itertools.product(STAGES, (None, *STAGES))))
def test_every_first_transition(stage, following):
    legal = stage in login.FIRST_STAGES and (
        following is None or following in login.TRANSITIONS[stage]
    )
    peer = Peer(node())
    pdu, _ = exchange(peer, request(NAMES, stage, following))
    assert pdu.word36 >> 16 == (0 if legal else 0x020B)
    assert peer.closed is not legal


REFUSALS = {
    "no initiator name": (request([("TargetName", TARGET)]), 0x0207),
    "an empty initiator name": (request([("InitiatorName", ""), ("TargetName", TARGET)]), 0x0207),
    "a name above 223 bytes": (
        request([("InitiatorName", "i" * 224), ("TargetName", TARGET)]),
        0x0207,
    ),
    "no target name": (request([("InitiatorName", INITIATOR)]), 0x0207),
    "no such target": (
        request([("InitiatorName", INITIATOR), ("TargetName", TARGET + "x")]),
        0x0203,
    ),
    "another session type": (
        request([("InitiatorName", INITIATOR), ("SessionType", "Other")]),
        0x0209,
    ),
    "a later version": (request(NAMES, version_min=1), 0x0205),
    "a session that is not there": (request(NAMES, lun=1 << 16 | 9), 0x020A),
    "no pair": (request(b"InitiatorName\0"), 0x0200),
    "a key twice": (request(b"InitiatorName=a\0InitiatorName=b\0"), 0x0200),
    "not UTF-8": (request(b"InitiatorName=\xff\xfe\0"), 0x0200),
    "a key that is too long": (request(b"k" * 64 + b"=1\0"), 0x0200),
    "too many keys": (
        request([*NAMES, *((f"X-{n}", "1") for n in range(limits.KEYS_MAX))]),
        0x0200,
    ),
    "an answer to nothing": (request([*NAMES, ("HeaderDigest", "NotUnderstood")]), 0x0200),
    "CHAP keys without CHAP": (
        request([*NAMES, ("CHAP_A", "5")], SECURITY_STAGE, None),
        0x0201,
    ),
    "AuthMethod in the operational stage": (request([*NAMES, ("AuthMethod", "None")]), 0x020B),
    "only another method": (
        request([*NAMES, ("AuthMethod", "KRB5")], SECURITY_STAGE),
        0x0201,
    ),
    "transit and continue": (request(NAMES, flags=CONTINUE), 0x020B),
}


@pytest.mark.parametrize(("data", "status"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_carry_their_status_and_close(data, status):
    peer = Peer(node())
    pdu, _ = exchange(peer, data)
    assert pdu.word36 >> 16 == status
    assert peer.closed and peer.connection.failure
    assert peer.connection.tsih == 0


@pytest.mark.parametrize(
    "data",
    [
        request(NAMES, OPERATIONAL_STAGE),
        request(NAMES, SECURITY_STAGE, OPERATIONAL_STAGE),
    ],
)
def test_a_target_with_chap_lets_nobody_past_the_security_stage_without(data):
    peer = Peer(node(SECRETS))
    pdu, _ = exchange(peer, data)
    assert pdu.word36 >> 16 == 0x0201 and peer.closed


def test_operational_keys_do_not_open_a_chap_target():
    peer = Peer(node(SECRETS))
    pdu, answers = exchange(
        peer, request([*NAMES, ("AuthMethod", "CHAP")], SECURITY_STAGE, FULL_FEATURE)
    )
    assert answers["AuthMethod"] == "CHAP" and not pdu.flags & TRANSIT
    pdu, _ = exchange(peer, request([], SECURITY_STAGE, FULL_FEATURE))
    assert not pdu.flags & TRANSIT
    assert not peer.closed and peer.connection.tsih == 0


@pytest.mark.parametrize("changed", [{"lun": 2 << 16}, {"cid": 9}, {"stage": SECURITY_STAGE}])
def test_identity_and_stage_do_not_change_during_login(changed):
    peer = Peer(node())
    exchange(peer, request(NAMES, OPERATIONAL_STAGE, None))
    pdu, _ = exchange(peer, request([], **changed))
    assert pdu.word36 >> 16 == 0x020B and peer.closed


def test_text_continued_over_several_pdus():
    peer = Peer(node())
    body = text.encode([*NAMES, ("HeaderDigest", "CRC32C,None")])
    for piece in (body[:11], body[11:60]):
        pdu, answers = exchange(peer, request(piece, OPERATIONAL_STAGE, None, flags=CONTINUE))
        assert pdu.flags == OPERATIONAL_STAGE << 2 and answers == {}
    pdu, answers = exchange(peer, request(body[60:]))
    assert pdu.flags & TRANSIT and answers["HeaderDigest"] == "CRC32C"


def test_login_text_is_bounded():
    peer = Peer(node())
    for _ in range(limits.LOGIN_TEXT_BYTES_MAX // 8000):
        exchange(peer, request(b"X" * 8000, OPERATIONAL_STAGE, None, flags=CONTINUE))
    pdu, _ = exchange(peer, request(b"X" * 8000, OPERATIONAL_STAGE, None, flags=CONTINUE))
    assert pdu.word36 >> 16 == 0x0200 and peer.closed


def test_exchanges_are_bounded():
    peer = Peer(node())
    exchange(peer, request(NAMES, OPERATIONAL_STAGE, None))
    for _ in range(limits.LOGIN_EXCHANGES_MAX - 1):
        exchange(peer, request([], OPERATIONAL_STAGE, None))
    pdu, _ = exchange(peer, request([], OPERATIONAL_STAGE, None))
    assert pdu.word36 >> 16 == 0x0200 and peer.closed


def test_login_takes_at_most_its_time():
    peer = Peer(node())
    peer.connection.tick(100.0)
    peer.connection.tick(100.0 + limits.LOGIN_SECONDS_MAX)
    assert not peer.closed
    peer.connection.tick(100.1 + limits.LOGIN_SECONDS_MAX)
    assert peer.closed


def test_a_data_segment_above_8192_bytes_ends_a_login_unread():
    peer = Peer(node())
    feed(peer.connection, pack(LOGIN_REQUEST | IMMEDIATE, 0, 0, length=8193))
    assert peer.closed and not peer.sent


@pytest.mark.parametrize("opcode", [op for op in range(0x40) if op != LOGIN_REQUEST])
def test_nothing_but_a_login_request_is_taken_before_the_login(opcode):
    peer = Peer(node())
    feed(peer.connection, pack(opcode | IMMEDIATE, 0x80, 1))
    assert peer.closed and not peer.sent


# Offer, answer (None: nothing is answered), the parameter it sets and its value.
NEGOTIATION = [
    ("HeaderDigest", "CRC32C,None", "CRC32C", "header_digest", True),
    ("HeaderDigest", "None,CRC32C", "None", "header_digest", False),
    ("HeaderDigest", "MD9", "Reject", "header_digest", False),
    ("DataDigest", "CRC32C", "CRC32C", "data_digest", True),
    ("MaxConnections", "8", "1", None, None),
    ("InitialR2T", "Yes", "Yes", "initial_r2t", True),
    ("InitialR2T", "No", "No", "initial_r2t", False),
    ("InitialR2T", "Maybe", "Reject", "initial_r2t", True),
    ("ImmediateData", "Yes", "Yes", "immediate_data", True),
    ("ImmediateData", "No", "No", "immediate_data", False),
    ("MaxRecvDataSegmentLength", "65536", None, "peer_data_segment_bytes", 65536),
    ("MaxRecvDataSegmentLength", "0x1000", None, "peer_data_segment_bytes", 4096),
    ("MaxRecvDataSegmentLength", "511", "Reject", "peer_data_segment_bytes", 8192),
    (
        "MaxBurstLength",
        "16777215",
        str(limits.MAX_BURST_BYTES),
        "max_burst_bytes",
        limits.MAX_BURST_BYTES,
    ),
    ("MaxBurstLength", "4096", "4096", "max_burst_bytes", 4096),
    ("MaxBurstLength", "16777216", "Reject", "max_burst_bytes", 262144),
    (
        "FirstBurstLength",
        "262144",
        str(limits.FIRST_BURST_BYTES),
        "first_burst_bytes",
        limits.FIRST_BURST_BYTES,
    ),
    ("FirstBurstLength", "512", "512", "first_burst_bytes", 512),
    ("DefaultTime2Wait", "0", "2", None, None),
    ("DefaultTime2Wait", "30", "30", None, None),
    ("DefaultTime2Retain", "20", "0", None, None),
    ("MaxOutstandingR2T", "16", "1", "max_outstanding_r2t", 1),
    ("MaxOutstandingR2T", "0", "Reject", "max_outstanding_r2t", 1),
    ("DataPDUInOrder", "No", "Yes", None, None),
    ("DataSequenceInOrder", "No", "Yes", None, None),
    ("ErrorRecoveryLevel", "2", "0", "error_recovery_level", 0),
    ("IFMarker", "Yes", "No", None, None),
    ("OFMarker", "No", "No", None, None),
    ("OFMarkInt", "2048~8192", "Irrelevant", None, None),
    ("InitiatorAlias", "host", None, None, None),
    ("TaskReporting", "FastAbort,RFC3720", "RFC3720", None, None),
    ("TaskReporting", "FastAbort", "Reject", None, None),
    ("iSCSIProtocolLevel", "2", "1", None, None),
    ("X-com.example.thing", "1", "NotUnderstood", None, None),
    ("MaxBurstLength", "-1", "Reject", "max_burst_bytes", 262144),
    ("MaxBurstLength", "1e5", "Reject", "max_burst_bytes", 262144),
    ("MaxBurstLength", "0x", "Reject", "max_burst_bytes", 262144),
    ("MaxBurstLength", "99999999999999999999", "Reject", "max_burst_bytes", 262144),
]


@pytest.mark.parametrize(("name", "offer", "answer", "field", "value"), NEGOTIATION)
def test_every_key(name, offer, answer, field, value):
    parameters = keys.Parameters()
    assert keys.answer(name, offer, parameters, discovery=False) == answer
    assert field is None or getattr(parameters, field) == value


@pytest.mark.parametrize(
    "name",
    [
        "InitialR2T",
        "ImmediateData",
        "MaxBurstLength",
        "FirstBurstLength",
        "MaxConnections",
        "DataPDUInOrder",
    ],
)
def test_what_means_nothing_in_a_discovery_session_is_irrelevant(name):
    offer = "512" if name.startswith(("Max", "First")) else "Yes"
    assert keys.answer(name, offer, keys.Parameters(), discovery=True) == "Irrelevant"


def test_first_burst_never_exceeds_max_burst():
    parameters = keys.Parameters(max_burst_bytes=4096, first_burst_bytes=65536)
    assert parameters.unsolicited_bytes == 4096


def test_a_key_is_negotiated_once():
    peer = Peer(node())
    exchange(peer, request([*NAMES, ("MaxBurstLength", "4096")], OPERATIONAL_STAGE, None))
    pdu, _ = exchange(peer, request([("MaxBurstLength", "8192")]))
    assert pdu.word36 >> 16 == 0x0200 and peer.closed


MATRIX = list(
    itertools.product([False, True], [False, True], [None, "one-way", "mutual"], [1 << 30, 7])
)


@pytest.mark.parametrize(("header_digest", "data_digest", "chap", "chunk"), MATRIX)
def test_our_initiator_logs_in(header_digest, data_digest, chap, chunk):
    wanted = {None: None, "one-way": ChapSecrets("user", b"secret-of-12+"), "mutual": SECRETS}[chap]
    made = node(wanted)
    pair = Coupling(
        made, settings(chap=wanted, header_digest=header_digest, data_digest=data_digest), chunk
    ).login()
    described = pair.target.describe()
    assert (described["header_digest"], described["data_digest"]) == (header_digest, data_digest)
    assert (described["initiator"], described["target"], described["state"]) == (
        INITIATOR,
        TARGET,
        "active",
    )
    assert made.directory.opened == [pair.target]


ONE_WAY = ChapSecrets("user", b"secret-of-12+")


@pytest.mark.parametrize(
    ("target", "initiator"),
    [
        (SECRETS, None),
        (None, SECRETS),
        (SECRETS, ChapSecrets("user", b"wrong")),
        (ONE_WAY, SECRETS),
    ],
)
def test_our_initiator_reports_why_it_may_not(target, initiator):
    made = node(target)
    pair = Coupling(made, settings(chap=initiator))
    pair.initiator.start()
    pair.run()
    (error,) = pair.login_result
    assert isinstance(error, IscsiError)
    assert not isinstance(error, LoginRefused) or error.status == 0x0201
    assert not made.directory.opened and pair.initiator_closed


def test_discovery_asks_for_its_own_authentication():
    made = node(None, SECRETS)
    refused = Coupling(made, settings(target_name=""))
    refused.initiator.start()
    refused.run()
    assert isinstance(refused.login_result[0], LoginRefused)
    pair = Coupling(made, settings(target_name="", chap=SECRETS)).login()
    found: list[list[tuple[str, str]]] = []
    pair.initiator.send_targets(found.append)
    pair.run()
    assert found == [[("TargetName", TARGET), ("TargetAddress", "127.0.0.1:3260,1")]]


def test_target_names_are_compared_without_regard_to_case():
    pair = Coupling(node(), settings(target_name=TARGET.upper())).login()
    assert pair.target.target_name == TARGET


def test_negotiated_lengths_reach_the_initiator():
    pair = coupled(
        MemoryVolume(1 << 20), max_burst_bytes=8192, first_burst_bytes=4096, immediate_data=False
    )
    parameters = pair.initiator.parameters
    assert (
        parameters.max_burst_bytes,
        parameters.first_burst_bytes,
        parameters.immediate_data,
    ) == (8192, 4096, False)
    assert parameters.peer_data_segment_bytes == limits.RECEIVE_DATA_SEGMENT_BYTES
