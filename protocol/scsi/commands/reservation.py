"""PERSISTENT RESERVE IN and OUT (SPC-4 6.15, 6.16), RESERVE(6) and RELEASE(6), over
`Reservations`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from protocol.scsi import opcodes, reservations, sense
from protocol.scsi.command import NO_DATA, Command, Request, cut
from protocol.scsi.commands.reservation_transport_id import (
    BadTransportId,
    TransportId,
    decode_transport_ids,
    encode_transport_id,
)
from protocol.scsi.errors import CheckCondition, ReservationConflict, ScsiError
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.plan import Operation, Plan
from protocol.scsi.reservations import KINDS, NexusId, Reservations
from protocol.scsi.sense import Sense
from protocol.scsi.task import Abort, TransportTask
from protocol.volume import Buffer, Completion

READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES, READ_FULL_STATUS = range(4)
(
    REGISTER,
    RESERVE,
    RELEASE,
    CLEAR,
    PREEMPT,
    PREEMPT_AND_ABORT,
    REGISTER_AND_IGNORE,
    REGISTER_AND_MOVE,
) = range(8)
_PARAMETERS: Final = Struct(">QQ4xB3x")
_APTPL: Final = 0x01
_ALL_TARGET_PORTS: Final = 0x04
_SPEC_INITIATOR_PORTS: Final = 0x08
_LIST_LENGTH: Final = Struct(">I")
_MOVE: Final = Struct(">QQxBHI")
_UNREGISTERS: Final = 0x02
# As many initiators as a cluster has, with names of the greatest length.
_LIST_BYTES_MAX: Final = 16384
_HEAD: Final = Struct(">II")
_RESERVATION: Final = Struct(">QIxBH")
# CRH clear; SIP_C, ATP_C and PTPL_C set; TMV set; all six types (SPC-4 6.15.4).
_CAPABILITIES: Final = bytes((0, 8, 0x0D, 0x80, 0xEA, 0x01, 0, 0))
_PTPL_ACTIVE: Final = 0x01
_FULL_STATUS: Final = Struct(">Q4xBB4xHI")


def _keys(state: Reservations) -> bytes:
    body = b"".join(key.to_bytes(8, "big") for key in state.registrations.values())
    return _HEAD.pack(state.generation, len(body)) + body


def _reservation(state: Reservations) -> bytes:
    body = _RESERVATION.pack(state.holder_key, 0, state.kind, 0) if state.kind else b""
    return _HEAD.pack(state.generation, len(body)) + body


def _capabilities(state: Reservations) -> bytes:
    return (
        _CAPABILITIES[:3]
        + bytes((_CAPABILITIES[3] | (_PTPL_ACTIVE if state.survives_power_loss else 0),))
        + _CAPABILITIES[4:]
    )


def _full_status(state: Reservations) -> bytes:
    body = b""
    for nexus, key in state.registrations.items():
        holds, transport = state.holds(nexus), encode_transport_id(nexus.initiator_port)
        # ALL_TG_PT is clear: each descriptor is of one nexus, and names its target port.
        body += (
            _FULL_STATUS.pack(
                key, int(holds), state.kind if holds else 0, nexus.target_port, len(transport)
            )
            + transport
        )
    return _HEAD.pack(state.generation, len(body)) + body


_REPORTS: Final = {
    READ_KEYS: _keys,
    READ_RESERVATION: _reservation,
    REPORT_CAPABILITIES: _capabilities,
    READ_FULL_STATUS: _full_status,
}


def reserve_in(request: Request) -> Plan:
    """One of the four reports, by service action."""
    report = _REPORTS[request.cdb[1] & 0x1F]
    return cut(report(request.unit.reservations), int.from_bytes(request.cdb[7:9], "big"))


@dataclass(frozen=True, slots=True)
class _Out:
    """One PERSISTENT RESERVE OUT with its parameter list."""

    request: Request
    nexus: NexusId
    kind: int
    key: int
    action_key: int
    survives_power_loss: bool
    initiators: list[TransportId]
    # Target ports whose nexuses are meant: that of the command, all of them (ALL_TG_PT), or the one
    # that REGISTER AND MOVE names.
    target_ports: tuple[int, ...]
    unregisters: bool = False
    # What PREEMPT AND ABORT aborts: the status waits for the end of it.
    aborted: list[TransportTask] = field(default_factory=list)

    @property
    def unit(self) -> LogicalUnit:
        return self.request.unit

    @property
    def state(self) -> Reservations:
        return self.request.unit.reservations

    def check_registered(self) -> None:
        """Raise ReservationConflict unless this nexus is registered with the key that it gives."""
        if self.state.registrations.get(self.nexus) != self.key:
            raise ReservationConflict

    def check_room(self, nexuses: list[NexusId]) -> None:
        """Raise CheckCondition where ``nexuses`` would be too many registrations."""
        known = self.state.registrations
        if len(known.keys() | nexuses) > reservations.REGISTRATIONS_MAX:
            raise CheckCondition(sense.INSUFFICIENT_REGISTRATION_RESOURCES)

    def through_ports(self, initiator_ports: list[str]) -> list[NexusId]:
        """The nexuses of these initiator ports with ``target_ports``."""
        return [
            NexusId(port, target_port)
            for port in initiator_ports
            for target_port in self.target_ports
        ]

    def nexuses_named(self) -> list[NexusId]:
        """The nexuses that the TransportIDs name. Raises CheckCondition if one names a device
        without a known port.
        """
        known = {mapped.nexus.id.initiator_port for mapped in self.unit.nexuses}
        known |= {nexus.initiator_port for nexus in self.state.registrations}
        found: dict[str, None] = {}
        for initiator in self.initiators:
            ports = initiator.ports(known)
            if not ports:
                raise CheckCondition(
                    sense.invalid_field_in_parameter_list(_PARAMETERS.size + _LIST_LENGTH.size)
                )
            found |= dict.fromkeys(ports)
        return self.through_ports(list(found))

    def tell(self, cause: Sense, nexuses: list[NexusId] | None = None) -> None:
        """Unit attention for other nexuses: ``nexuses``, or all that are registered."""
        for mapped in self.unit.nexuses:
            nexus = mapped.nexus.id
            if nexus != self.nexus and nexus in (
                self.state.registrations if nexuses is None else nexuses
            ):
                mapped.attention(cause)


def _register(out: _Out) -> None:
    """REGISTER: the present key, if any, must be given (0 for a nexus that is not registered).

    With ALL_TG_PT it counts as sent through each target port (SPC-4 6.16.3): a nexus with another
    target port is registered too, and a conflict if it is registered with another key.
    """
    known = out.state.registrations
    if known.get(out.nexus, 0) != out.key:
        raise ReservationConflict
    if any(
        known.get(nexus, out.key) != out.key
        for nexus in out.through_ports([out.nexus.initiator_port])
    ):
        raise ReservationConflict
    if out.initiators and out.nexus in known:
        # SPC-4 5.12.7, table of register behaviours: SPEC_I_PT from a registered nexus.
        raise CheckCondition(sense.INVALID_FIELD_IN_CDB)
    _register_any(out)


def _register_any(out: _Out) -> None:
    own = out.through_ports([out.nexus.initiator_port])
    others = out.nexuses_named() if out.action_key else []
    if out.action_key:
        out.check_room([*own, *others])
    if out.state.register(own, out.action_key, out.survives_power_loss, others):
        out.tell(sense.RESERVATIONS_RELEASED)


def _register_and_move(out: _Out) -> None:
    """REGISTER AND MOVE: hand the reservation over to another initiator port (SPC-4 5.12.8)."""
    out.check_registered()
    state = out.state
    if state.kind == 0:
        raise CheckCondition(sense.INVALID_FIELD_IN_CDB)
    if not state.held_by(out.nexus) or state.kind in reservations.ALL_REGISTRANTS_KINDS:
        raise ReservationConflict
    named = out.nexuses_named()
    if len(named) != 1 or named[0] == out.nexus:
        raise CheckCondition(sense.invalid_field_in_parameter_list(_MOVE.size))
    out.check_room(named)
    state.move(out.nexus, named[0], out.action_key, out.unregisters, out.survives_power_loss)


def _reserve(out: _Out) -> None:
    out.check_registered()
    if not out.state.reserve(out.nexus, out.kind):
        raise ReservationConflict


def _release(out: _Out) -> None:
    out.check_registered()
    if not out.state.holds(out.nexus):
        return  # no error: SPC-4 5.13.11.2.2
    if out.state.kind != out.kind:
        raise CheckCondition(sense.INVALID_RELEASE)
    if out.state.release():
        out.tell(sense.RESERVATIONS_RELEASED)


def _clear(out: _Out) -> None:
    out.check_registered()
    out.tell(sense.RESERVATIONS_PREEMPTED, out.state.clear())


def _preempt(out: _Out) -> None:
    out.check_registered()
    state = out.state
    whole = state.kind in reservations.ALL_REGISTRANTS_KINDS
    if out.action_key == 0 and not whole:
        raise CheckCondition(sense.invalid_field_in_parameter_list(8))
    if out.action_key and out.action_key not in state.registrations.values():
        raise ReservationConflict
    removed, changed = state.preempt(out.nexus, out.action_key, out.kind)
    out.tell(sense.REGISTRATIONS_PREEMPTED, removed)
    if changed:
        out.tell(sense.RESERVATIONS_RELEASED)
    if out.request.cdb[1] & 0x1F == PREEMPT_AND_ABORT:
        for mapped in out.unit.nexuses:
            if mapped.nexus.id in removed:
                out.aborted.extend(mapped.tasks())


_ACTIONS: Final[dict[int, Callable[[_Out], None]]] = {
    REGISTER: _register,
    RESERVE: _reserve,
    RELEASE: _release,
    CLEAR: _clear,
    PREEMPT: _preempt,
    PREEMPT_AND_ABORT: _preempt,
    REGISTER_AND_IGNORE: _register_any,
    REGISTER_AND_MOVE: _register_and_move,
}
_WITH_KIND: Final = frozenset((RESERVE, RELEASE, PREEMPT, PREEMPT_AND_ABORT))


def _initiators(data: bytes, at: int, length: int) -> list[TransportId]:
    """The TransportIDs from ``at`` on, whose length the list gives. Raises CheckCondition."""
    if length != len(data) - at or length == 0:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    try:
        return decode_transport_ids(data[at:])
    except BadTransportId as error:
        raise CheckCondition(sense.invalid_field_in_parameter_list(at + error.at)) from None


def _parse(request: Request, data: bytes) -> _Out:
    """The parameter list of all service actions but REGISTER AND MOVE."""
    cdb, nexus = request.cdb, request.nexus.id
    action, kind = cdb[1] & 0x1F, cdb[2] & 0x0F
    if action in _WITH_KIND and (kind not in KINDS or cdb[2] >> 4):
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    if len(data) < _PARAMETERS.size:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    key, action_key, flags = _PARAMETERS.unpack_from(data)
    initiators: list[TransportId] = []
    if flags & _SPEC_INITIATOR_PORTS:
        if action != REGISTER:
            raise CheckCondition(sense.invalid_field_in_parameter_list(20, 3))
        if len(data) < _PARAMETERS.size + _LIST_LENGTH.size:
            raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
        (length,) = _LIST_LENGTH.unpack_from(data, _PARAMETERS.size)
        initiators = _initiators(data, _PARAMETERS.size + _LIST_LENGTH.size, length)
    elif len(data) != _PARAMETERS.size:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    registers = action in (REGISTER, REGISTER_AND_IGNORE)
    target_ports = (
        tuple(request.unit.target_ports())
        if registers and flags & _ALL_TARGET_PORTS
        else (nexus.target_port,)
    )
    return _Out(
        request, nexus, kind, key, action_key, bool(flags & _APTPL), initiators, target_ports
    )


def _parse_move(request: Request, data: bytes) -> _Out:
    """The parameter list of REGISTER AND MOVE (SPC-4 6.16.4)."""
    if len(data) < _MOVE.size:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    key, action_key, flags, relative_port, length = _MOVE.unpack_from(data)
    initiators = _initiators(data, _MOVE.size, length)
    if action_key == 0:
        raise CheckCondition(sense.invalid_field_in_parameter_list(8))
    if relative_port not in request.unit.target_ports():
        raise CheckCondition(sense.invalid_field_in_parameter_list(18))
    aptpl, unregisters = bool(flags & _APTPL), bool(flags & _UNREGISTERS)
    return _Out(
        request,
        request.nexus.id,
        0,
        key,
        action_key,
        aptpl,
        initiators,
        (relative_port,),
        unregisters,
    )


def reserve_out(request: Request) -> Plan:
    """One of the service actions, by the table."""
    service_action = request.cdb[1] & 0x1F
    action, parse = (
        _ACTIONS[service_action],
        _parse_move if service_action == REGISTER_AND_MOVE else _parse,
    )
    length = int.from_bytes(request.cdb[5:9], "big")
    if not _PARAMETERS.size <= length <= _LIST_BYTES_MAX:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)

    def start(data: Buffer, done: Completion) -> None:
        try:
            out = parse(request, bytes(data))
            action(out)
        except ScsiError as error:
            done(error)
            return
        # SPC-4 5.12.11.2.6: with GOOD the preempting initiator may take over the disk, so no write
        # of a preempted one may follow.
        Abort(lambda: request.unit.keep(done)).start(out.aborted)

    return Operation(length, start, writing=False)


def reserve_6(request: Request) -> Plan:
    """RESERVE(6) of the whole unit for this nexus."""
    if not request.unit.reservations.reserve_spc2(request.nexus.id):
        raise ReservationConflict
    return NO_DATA


def release_6(request: Request) -> Plan:
    """RELEASE(6); GOOD also if this nexus does not hold the reservation (SPC-2 7.20)."""
    request.unit.reservations.release_spc2(request.nexus.id)
    return NO_DATA


_IN_NAMES: Final = {
    READ_KEYS: "READ KEYS",
    READ_RESERVATION: "READ RESERVATION",
    REPORT_CAPABILITIES: "REPORT CAPABILITIES",
    READ_FULL_STATUS: "READ FULL STATUS",
}
_OUT_NAMES: Final = {
    REGISTER: "REGISTER",
    RESERVE: "RESERVE",
    RELEASE: "RELEASE",
    CLEAR: "CLEAR",
    PREEMPT: "PREEMPT",
    PREEMPT_AND_ABORT: "PREEMPT AND ABORT",
    REGISTER_AND_IGNORE: "REGISTER AND IGNORE EXISTING KEY",
    REGISTER_AND_MOVE: "REGISTER AND MOVE",
}
COMMANDS: Final = (
    Command(opcodes.RESERVE_6, "RESERVE(6)", "0000000000", reserve_6),
    Command(opcodes.RELEASE_6, "RELEASE(6)", "0000000000", release_6, despite_exclusion=True),
    *(
        Command(
            opcodes.PERSISTENT_RESERVE_IN,
            f"PERSISTENT RESERVE IN, {name}",
            "1f0000000000ffff00",
            reserve_in,
            service_action=action,
        )
        for action, name in _IN_NAMES.items()
    ),
    *(
        Command(
            opcodes.PERSISTENT_RESERVE_OUT,
            f"PERSISTENT RESERVE OUT, {name}",
            "1fff0000ffffffff00",
            reserve_out,
            service_action=action,
        )
        for action, name in _OUT_NAMES.items()
    ),
)
