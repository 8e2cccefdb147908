"""The control protocol: framing, limits, validation, states, and the two sides against each other
in memory.
"""

import contextlib
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.control import calls, errors, limits, methods, rows
from protocol.control.client_connection import ClientConnection, event_in, hello, result_in
from protocol.control.definition import AnyMethod, result_type, row_type
from protocol.control.errors import ControlError, FramingError
from protocol.control.frames import (
    FrameReader,
    Notification,
    Request,
    Response,
    encode_notification,
    encode_request,
    encode_response,
)
from protocol.control.server_connection import Call, ServerConnection, State

ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def reader() -> FrameReader:
    return FrameReader(limits.REQUEST_BYTES_MAX, limits.REQUEST_ITEMS_MAX)


def ready_server() -> ServerConnection:
    server = ServerConnection()
    (call,) = server.receive(
        encode_request(0, "hello", {"client": "test", "protocol": limits.PROTOCOL_VERSION})
    )
    b"".join(server.answer(call.request_id, {}))
    assert server.state is State.READY
    return server


def refusal(server: ServerConnection, request: bytes) -> dict[str, str]:
    assert list(server.receive(request)) == []
    (response,) = reader().feed(server.take_output())
    assert isinstance(response, Response)
    assert response.result is None
    found: dict[str, str] = response.error
    return found


@given(
    st.lists(
        st.tuples(st.integers(0, limits.REQUEST_ID_MAX), st.text(max_size=30), ITEMS), max_size=5
    ),
    st.integers(1, 50),
)
def test_frames_survive_any_cutting(requests: list[tuple[int, str, Any]], piece: int) -> None:
    stream = b"".join(encode_request(*request) for request in requests)
    frames = reader()
    found = [
        message
        for at in range(0, len(stream), piece)
        for message in frames.feed(stream[at : at + piece])
    ]
    assert found == [Request(*request) for request in requests]


@given(st.integers(0, 3 * limits.ITEMS_PER_PART), ITEMS)
def test_a_response_in_parts_is_the_response(count: int, item: Any) -> None:
    parts = list(encode_response(7, None, [item] * count))
    assert len(parts) == (
        1 if count <= limits.ITEMS_PER_PART else 1 + -(-count // limits.ITEMS_PER_PART)
    )
    assert b"".join(parts) == msgpack.packb([1, 7, None, [item] * count])


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_framing_error(data: bytes) -> None:
    with contextlib.suppress(FramingError):
        for message in reader().feed(data):
            assert isinstance(message, Request | Response | Notification)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(calls.METHODS)),
            ITEMS | st.dictionaries(st.sampled_from(["name", "snapshot", "size_bytes"]), ITEMS),
        )
    )
)
def test_any_params_are_a_call_or_an_error_with_code_and_message(
    requests: list[tuple[str, Any]],
) -> None:
    server = ready_server()
    for number, (method, params) in enumerate(requests):
        calls = list(server.receive(encode_request(number, method, params)))
        answers = list(reader().feed(server.take_output()))
        assert len(calls) + len(answers) == 1
        for answer in answers:
            assert isinstance(answer, Response)
            assert answer.request_id == number
            assert answer.error is None or (
                answer.error["code"] in errors.EXIT_CODES and answer.error["message"]
            )
        for call in calls:
            b"".join(server.answer(call.request_id, None))


@pytest.mark.parametrize(
    "frame",
    [
        1,
        [],
        [0, 1, "hello"],
        [0, -1, "hello", {}],
        [0, limits.REQUEST_ID_MAX + 1, "hello", {}],
        [0, True, "hello", {}],
        [0, 1, 2, {}],
        [3, 1, "hello", {}],
        [2, 5, {}],
        {"a": 1},
    ],
)
def test_what_is_no_message_closes_the_connection_with_the_reason(frame: Any) -> None:
    server = ready_server()
    found = refusal(server, msgpack.packb(frame))
    assert found["code"] == errors.INVALID_REQUEST
    assert "[0, id, method, params]" in found["message"]
    assert server.state is State.CLOSED


def test_a_client_that_sends_a_response_is_cut_off() -> None:
    server = ready_server()
    assert "requests only" in refusal(server, msgpack.packb([1, 1, None, None]))["message"]
    assert server.state is State.CLOSED


def test_a_frame_above_the_limit_closes_the_connection() -> None:
    server = ready_server()
    head = msgpack.packb([0, 1, "vdisk.show", {}])[:-1] + b"\xc6\xff\xff\xff\xff"
    assert refusal(server, head + bytes(limits.REQUEST_BYTES_MAX))["code"] == errors.INVALID_REQUEST
    assert server.state is State.CLOSED


@pytest.mark.parametrize(
    "head",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdc\xff\xff" * 500,
        b"\x91" * 5000,
        b"\xc7\xff\x01" + bytes(255),
        b"\xc1",
    ],
)
def test_claims_of_size_and_depth_cost_no_memory(head: bytes) -> None:
    with pytest.raises(FramingError):
        list(reader().feed(head))


def test_hello_comes_first() -> None:
    server = ServerConnection()
    assert refusal(server, encode_request(1, "vdisk.ls", {}))["code"] == errors.HELLO_FIRST
    assert refusal(server, encode_request(2, "rpc.list", {}))["code"] == errors.HELLO_FIRST
    assert server.state is State.NEW


def test_hello_of_another_protocol_is_refused_with_both_versions() -> None:
    server = ServerConnection()
    found = refusal(server, encode_request(1, "hello", {"client": "x", "protocol": 999}))
    assert "999" in found["message"]
    assert "version" in found["next_step"]
    assert server.state is State.NEW


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("vdisk.create", {"name": "a"}, "size_bytes"),
        ("vdisk.create", {"name": "a", "size_bytes": 0}, ">= 1"),
        ("vdisk.create", {"name": "a", "size_bytes": "1GiB"}, "Expected `int`"),
        (
            "vdisk.create",
            {"name": "a b", "size_bytes": 1},
            "Expected a name of letters, digits, '.', '_', '-' and ':'",
        ),
        ("snapshot.create", {"snapshots": ["a b@c"]}, "Expected VDISK@SNAPSHOT"),
        ("acl.add", {"target": "a", "initiators": ["host"]}, "Expected an iSCSI name, as in iqn."),
        ("vdisk.create", {"name": "", "size_bytes": 1}, "length >= 1"),
        ("vdisk.create", {"name": "a" * 201, "size_bytes": 1}, "length <= 200"),
        ("vdisk.create", {"name": "a", "size_bytes": 4096, "thin": True}, "thin"),
        ("vdisk.show", [], "name"),
        ("vdisk.show", ["a", "b"], "Expected `object`"),
        ("snapshot.create", {"snapshots": []}, "length >= 1"),
        ("snapshot.create", {"snapshots": ["noat"]}, "snapshots[0]"),
        ("snapshot.rm", {"snapshot": "a@b@c"}, "snapshot"),
        ("split.start", {"name": "a", "mode": "move"}, "mode"),
        ("rpc.subscribe", {"events": ["nothing"]}, "events[0]"),
    ],
)
def test_bad_params_are_named(method: str, params: Any, words: str) -> None:
    server = ready_server()
    found = refusal(server, encode_request(1, method, params))
    assert found["code"] == errors.INVALID_PARAMS
    assert words in found["message"]
    assert found["message"].startswith(method)
    assert found["next_step"].startswith(f"{method} takes ")


def test_params_may_be_a_map_or_an_array_of_one_map() -> None:
    for params in ({"name": "a"}, [{"name": "a"}]):
        assert calls.validate("vdisk.show", params) == methods.VdiskShow(name="a")
    nothings: list[Any] = [None, [], {}, [{}]]
    for nothing in nothings:
        assert calls.validate("vdisk.ls", nothing) == methods.VdiskList()


def test_an_unknown_method_is_answered() -> None:
    found = refusal(ready_server(), encode_request(1, "vdisk.explode", {}))
    assert found["code"] == errors.UNKNOWN_METHOD
    assert "rpc.list" in found["next_step"]


def test_requests_above_the_pending_limit_are_refused_and_the_others_answered() -> None:
    server = ready_server()
    stream = b"".join(
        encode_request(number, "vdisk.ls", {}) for number in range(limits.REQUESTS_PENDING_MAX + 1)
    )
    calls = list(server.receive(stream))
    (response,) = reader().feed(server.take_output())
    assert [call.request_id for call in calls] == list(range(limits.REQUESTS_PENDING_MAX))
    assert isinstance(response, Response)
    assert response.error["code"] == errors.TOO_MANY_REQUESTS
    b"".join(server.answer(0, None))
    assert len(list(server.receive(encode_request(500, "vdisk.ls", {})))) == 1


def test_a_request_id_in_use_is_refused() -> None:
    server = ready_server()
    assert list(server.receive(encode_request(5, "vdisk.ls", {}))) == [Call(5, methods.VdiskList())]
    assert "5" in refusal(server, encode_request(5, "vdisk.ls", {}))["message"]


def test_notifications_go_to_subscribers_only() -> None:
    server = ready_server()
    assert server.notification(methods.SPLIT_PROGRESS, {}) is None
    assert (
        list(
            server.receive(encode_request(1, "rpc.subscribe", {"events": [methods.SPLIT_PROGRESS]}))
        )
        == []
    )
    assert list(reader().feed(server.take_output())) == [
        Response(1, None, [methods.SPLIT_PROGRESS])
    ]
    sent = server.notification(methods.SPLIT_PROGRESS, {"name": "a"})
    assert sent is not None
    assert list(reader().feed(sent)) == [Notification(methods.SPLIT_PROGRESS, {"name": "a"})]
    list(server.receive(encode_request(2, "rpc.subscribe", {"events": []})))
    assert server.notification(methods.SPLIT_PROGRESS, {}) is None


def test_rpc_list_describes_every_method() -> None:
    server = ready_server()
    list(server.receive(encode_request(1, "rpc.list", {})))
    (response,) = reader().feed(server.take_output())
    assert isinstance(response, Response)
    described = {entry["method"]: entry for entry in response.result}
    assert set(described) == set(calls.METHODS)
    assert all(entry["summary"] for entry in described.values())
    params = {param["name"]: param for param in described["split.start"]["params"]}
    assert params["name"]["required"]
    assert not params["mode"]["required"]
    assert params["mode"]["schema"]["default"] == "copy"


def test_both_sides_in_memory() -> None:
    client, server = ClientConnection(), ServerConnection()
    greeting_id, greeting = client.request(hello("test"))
    (call,) = server.receive(greeting)
    assert server.client == "test"
    assert list(client.receive(b"".join(server.answer(call.request_id, {"server": "x"})))) == [
        Response(greeting_id, None, {"server": "x"})
    ]
    request_id, request = client.request(methods.VdiskShow(name="none"))
    (call,) = server.receive(request)
    refused = b"".join(
        server.refuse(
            call.request_id, ControlError(errors.NOT_FOUND, "there is no vdisk none", "vdisk ls")
        )
    )
    (response,) = client.receive(refused)
    assert isinstance(response, Response)
    assert response.request_id == request_id
    error = ControlError.from_object(response.error)
    assert (error.code, error.exit_code, error.next_step) == (
        errors.NOT_FOUND,
        errors.EXIT_NOT_FOUND,
        "vdisk ls",
    )
    list(client.receive(encode_notification("split.progress", {})))
    with pytest.raises(FramingError):
        list(client.receive(encode_request(1, "hello", {})))


@pytest.mark.parametrize("odd", [None, "text", 5, {}, {"code": 1, "message": "m"}, {"code": "c"}])
def test_an_odd_error_object_is_still_an_error(odd: Any) -> None:
    error = ControlError.from_object(odd)
    assert error.exit_code == errors.EXIT_FAILED


def test_a_code_of_a_newer_daemon_counts_as_failed() -> None:
    assert (
        ControlError.from_object({"code": "haunted", "message": "boo"}).exit_code
        == errors.EXIT_FAILED
    )


@pytest.mark.parametrize("method", calls.METHODS.values(), ids=calls.METHODS)
def test_a_definition_is_whole(method: type[AnyMethod]) -> None:
    assert method.__doc__, "rpc.list would have nothing to say"
    if method is methods.Subscribe:
        return  # answers names, no rows
    kind = row_type(method)
    assert set(kind.COLUMNS) <= set(kind.__struct_fields__)
    assert kind.COLUMNS or result_type(method) is kind or method is methods.ListMethods


def test_rows_take_exactly_their_keys() -> None:
    found: dict[str, Any] = {"path": "/p", "uuid": "u", "size_bytes": 1}
    assert rows.row_of(rows.NewPool, found) == rows.NewPool(path="/p", uuid="u", size_bytes=1)
    with pytest.raises(AssertionError, match="exactly"):
        rows.row_of(rows.NewPool, {**found, "more": 1})
    for wrong in ({"path": "/p", "uuid": "u"}, {**found, "size_bytes": "1"}):
        with pytest.raises(msgspec.ValidationError):
            rows.row_of(rows.NewPool, wrong)


def test_a_client_passes_over_what_a_newer_daemon_says_in_addition() -> None:
    answer = {"name": "a", "deleted": True, "moon": "full"}
    found = result_in(Response(1, None, answer), methods.VdiskDelete)
    assert found == rows.Deleted(name="a", deleted=True)
    assert event_in(Notification("moon.rise", {})) is None


def test_a_client_says_so_where_it_does_not_understand_the_answer() -> None:
    with pytest.raises(ControlError, match=r"vdisk\.rm cannot be understood") as caught:
        result_in(Response(1, None, {"name": "a"}), methods.VdiskDelete)
    assert caught.value.next_step is not None
    assert "daemon's version" in caught.value.next_step
    assert event_in(Notification(methods.SPLIT_PROGRESS, {"name": "a"})) is None


def test_what_is_left_out_of_a_call_is_not_sent() -> None:
    """A daemon that does not know a newer parameter takes the call all the same."""
    client = ClientConnection()
    _, request = client.request(methods.SnapshotDelete(snapshot="a@s"))
    assert list(reader().feed(request)) == [Request(1, "snapshot.rm", {"snapshot": "a@s"})]
