"""Access against a plain model: whatever was done, over restarts, nobody sees or opens more or less
than the rules say.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.strategies import booleans, sampled_from

from daemon.targets.administration import TargetAdministration
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from storage.errors import StorageError
from tests.daemon.fakes import AttachableMemory, MemoryPool
from tests.daemon.test_targets import Session

VDISKS = sampled_from(["a", "b", "c"])
CREATED = sampled_from(["t", "u"])
INITIATORS = sampled_from(["iqn.2026-01.test:x", "iqn.2026-01.test:y"])
Result = TypeVar("Result")


class Access(RuleBasedStateMachine):
    """The model: who may, by vdisk and by created target (None: no list), and what is
    mapped where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.lists: dict[str, set[str] | None] = {}
        self.mapped: dict[str, set[str]] = {}
        self.sessions: list[tuple[Session, str]] = []

    @initialize(open_access=booleans())
    def start(self, open_access: bool) -> None:
        self.open_access = open_access
        self.pool = MemoryPool(a=4096, b=4096, c=4096)
        self.lists = dict.fromkeys(self.pool.volumes)
        self.targets = Targets(self.pool, None, open_access)
        self.administration = TargetAdministration(self.targets)

    def teardown(self) -> None:
        self.loop.close()

    def run(self, change: Coroutine[Any, Any, Result]) -> Result | None:
        """The result, None for a refusal."""
        try:
            return self.loop.run_until_complete(change)
        except StorageError:
            return None

    @rule(name=CREATED)
    def create(self, name: str) -> None:
        created = self.run(self.administration.create(name))
        assert (created is not None) == (name not in self.lists)
        if created is not None:
            self.lists[name], self.mapped[name] = None, set()

    @rule(name=CREATED)
    def remove(self, name: str) -> None:
        free = name in self.mapped and all(target != name for _, target in self.sessions)
        assert (self.run(self.administration.remove(name)) is not None) == free
        if free:
            del self.lists[name], self.mapped[name]

    @rule(name=CREATED, vdisk=VDISKS)
    def map(self, name: str, vdisk: str) -> None:
        possible = (
            name in self.mapped and vdisk in self.pool.volumes and vdisk not in self.mapped[name]
        )
        if vdisk in self.pool.volumes:
            assert (
                self.run(self.administration.map(name, self.pool.volumes[vdisk], None)) is not None
            ) == possible
        if possible:
            self.mapped[name].add(vdisk)

    @rule(name=CREATED, vdisk=VDISKS)
    def unmap(self, name: str, vdisk: str) -> None:
        possible = vdisk in self.mapped.get(name, set())
        assert (self.run(self.administration.unmap(name, vdisk, None)) is not None) == possible
        if possible:
            self.mapped[name].remove(vdisk)

    @rule(name=VDISKS | CREATED, initiator=INITIATORS)
    def allow(self, name: str, initiator: str) -> None:
        assert (self.run(self.administration.allow(name, [initiator])) is not None) == (
            name in self.lists
        )
        if name in self.lists:
            self.lists[name] = (self.lists[name] or set()) | {initiator}

    @rule(name=VDISKS | CREATED, initiator=INITIATORS)
    def disallow(self, name: str, initiator: str) -> None:
        if name in self.lists:
            self.run(self.targets.access.remove(self.targets.named(name).key, initiator))
            found = self.lists[name]
            self.lists[name] = found and found - {initiator}

    @rule(name=VDISKS | CREATED)
    def clear(self, name: str) -> None:
        if name in self.lists:
            self.run(self.targets.access.clear(self.targets.named(name).key))
            self.lists[name] = None

    @rule(name=VDISKS | CREATED, initiator=INITIATORS)
    def log_in(self, name: str, initiator: str) -> None:
        if self.may(name, initiator):
            session = Session(TARGET_PREFIX + name, initiator)
            self.targets.session_opened(session)
            self.sessions.append((session, name))

    @rule()
    def end_those_shut_out(self) -> None:
        shut_out = [
            session for session, name in self.sessions if not self.may(name, session.initiator_name)
        ]
        assert self.targets.no_longer_allowed() == shut_out
        for session in shut_out:
            self.targets.session_closed(session)
        self.sessions = [
            (session, name) for session, name in self.sessions if session not in shut_out
        ]

    @rule(vdisk=VDISKS)
    def delete_and_make_anew(self, vdisk: str) -> None:
        """Deletion is refused to what is attached, and another vdisk of the same name has nothing
        of the first.
        """
        volume = self.pool.volumes[vdisk]
        in_use = any(vdisk in mapped for mapped in self.mapped.values()) or any(
            name == vdisk for _, name in self.sessions
        )
        assert bool(volume.labels) == in_use
        if not in_use:
            self.run(self.administration.forget(volume))
            made = AttachableMemory(vdisk, 4096)
            made.uuid = type(made.uuid)(int=volume.uuid.int + 1)
            self.pool.volumes[vdisk], self.lists[vdisk] = made, None

    @rule(first=VDISKS, second=VDISKS)
    def swap_names(self, first: str, second: str) -> None:
        if first == second or self.sessions:
            return
        volumes, names = self.pool.volumes, {first: second, second: first}
        volumes[first], volumes[second] = volumes[second], volumes[first]
        volumes[first].name, volumes[second].name = first, second
        self.lists[first], self.lists[second] = self.lists[second], self.lists[first]
        self.mapped = {
            target: {names.get(name, name) for name in mapped}
            for target, mapped in self.mapped.items()
        }

    @rule()
    def restart(self) -> None:
        self.sessions.clear()
        for volume in self.pool.volumes.values():
            volume.labels.clear()
        self.targets = Targets(self.pool, None, self.open_access)
        self.administration = TargetAdministration(self.targets)
        self.targets.load()

    def may(self, name: str, initiator: str) -> bool:
        if name not in self.lists:
            return False
        lists = [self.lists[name]]
        if name in self.pool.volumes and self.lists[name] is None:
            lists = [self.lists[target] for target, mapped in self.mapped.items() if name in mapped]
        found = [allowed for allowed in lists if allowed is not None]
        return any(initiator in allowed for allowed in found) if found else self.open_access

    @invariant()
    def nobody_sees_or_opens_more_or_less(self) -> None:
        for initiator in ("iqn.2026-01.test:x", "iqn.2026-01.TEST:Y", "iqn.2026-01.test:z"):
            expected = [
                TARGET_PREFIX + name
                for name in sorted(self.lists)
                if self.may(name, initiator.lower())
            ]
            assert self.targets.names_for(initiator, "p") == expected
            for name in ("a", "b", "c", "t", "u"):
                opened = self.targets.open_target(TARGET_PREFIX + name, initiator)
                assert (opened is not None) == (TARGET_PREFIX + name in expected)
                if opened is not None:
                    disks = self.mapped.get(name, {name})
                    assert {volume.name for volume in opened.luns.values()} == disks


TestAccess = Access.TestCase
TestAccess.settings = settings(max_examples=60, stateful_step_count=40)
