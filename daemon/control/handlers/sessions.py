"""session, stats and connect."""

import asyncio
from typing import Final

from daemon.control.answering import answers
from daemon.control.context import Context
from daemon.process.logs import get_log
from daemon.targets.reports import access_to
from protocol.control import methods, rows
from protocol.control.errors import FAILED, ControlError
from protocol.iscsi.limits import LOGOUT_SECONDS

# A session that is to end has LOGOUT_SECONDS for that by itself; then it is cut off, at the
# listener's next tick, and what its commands still hold at the device comes back.
SESSION_END_SECONDS: Final = LOGOUT_SECONDS + 10


@answers(methods.SessionList)
async def session_list(context: Context, call: methods.SessionList) -> list[rows.Session]:
    """Those of iSCSI by target and initiator, then those of NBD by number."""
    nbd = [session.row() for session in sorted(context.nbd, key=lambda one: one.number)]
    return context.targets.sessions.rows() + nbd


@answers(methods.SessionEnd)
async def session_end(context: Context, call: methods.SessionEnd) -> rows.EndedSession:
    """Returns when none of its commands can touch a disk any more."""
    client = context.nbd.find(call.id)
    if client is not None:
        target = client.volume.name
        get_log().info("session.ending", id=call.id, initiator="", target=target)
        client.connection.shutdown("an administrator ended the session")
        await _wait_ended(call.id, client.ended)
        return rows.EndedSession(id=call.id, initiator="", target=target, ended=True)
    session = context.targets.sessions.find(call.id)
    initiator, target = session.view.initiator_name, session.view.target_name
    get_log().info("session.ending", id=call.id, initiator=initiator, target=target)
    context.iscsi.end_sessions([session.view])
    await _wait_ended(call.id, session.ended)
    return rows.EndedSession(id=call.id, initiator=initiator, target=target, ended=True)


async def _wait_ended(number: int, ended: asyncio.Event) -> None:
    """Raises ControlError where the session does not end in time."""
    try:
        await asyncio.wait_for(ended.wait(), SESSION_END_SECONDS)
    except TimeoutError:
        raise ControlError(
            FAILED,
            f"session {number} was cut off, and commands of it are still under way: the"
            " pool's device does not answer them",
            "look at the device and the daemon's log; the session ends when they do",
        ) from None


@answers(methods.Stats)
async def stats(context: Context, call: methods.Stats) -> rows.Stats:
    """Of all protocols together; ``sessions`` counts both."""
    counters = context.pool.volume(call.name).counters
    return rows.Stats(
        name=call.name,
        sessions=context.targets.sessions.count_using(call.name)
        + context.nbd.count_using(call.name),
        **{key: getattr(counters, key) for key in rows.COUNTERS},
    )


@answers(methods.Connect)
async def connect(context: Context, call: methods.Connect) -> rows.Portal:
    """The vdisk's own target."""
    volume = context.pool.volume(call.name)
    return rows.Portal(
        name=call.name,
        target=context.targets.names.announced(call.name),
        lun=0,
        portals=context.iscsi.portals(),
        nbd=[
            str(address)
            for listener in context.listeners
            if listener.protocol == "nbd"
            for address in listener.addresses
        ],
        nbd_open=context.targets.open_to_everybody(
            context.pool.volume(call.name.partition("@")[0]).uuid.hex
        ),
        **access_to(context.targets, volume, call.initiator)._asdict(),
    )
