"""open-iscsi in the guest, against a daemon on this machine."""

from typing import Any

from daemon.targets.names import TARGET_PREFIX
from tests.daemon.programs import Daemon
from tests.guest.machine import Machine, Reply

# The host's loopback, as the guest sees it through QEMU's user-mode network.
HOST_ADDRESS = "10.0.2.2"


class OpenIscsi:
    """The steps of iscsiadm. Targets are named by their vdisk."""

    def __init__(self, machine: Machine, daemon: Daemon) -> None:
        self._machine = machine
        self.portal = f"{HOST_ADDRESS}:{daemon.portal.rpartition(':')[2]}"

    def _node(self, vdisk: str) -> str:
        return f"iscsiadm -m node -T {TARGET_PREFIX}{vdisk} -p {self.portal}"

    async def discover(self) -> list[str]:
        """Return the vdisks that SendTargets shows. Its addresses are those of the daemon, which
        the guest cannot reach: `login` writes the node records.
        """
        listed = await self._machine.succeed(
            f"iscsiadm -m discovery -t sendtargets -o nonpersistent -p {self.portal}"
        )
        return [line.rpartition(TARGET_PREFIX)[2] for line in listed.splitlines()]

    async def try_login(self, vdisk: str, **settings: str) -> Reply:
        """Create the node's record, apply the given settings, and log in."""
        await self._machine.succeed(f"{self._node(vdisk)} -o new")
        for name, value in settings.items():
            await self._machine.succeed(f"{self._node(vdisk)} -o update -n '{name}' -v '{value}'")
        return await self._machine.run(f"{self._node(vdisk)} --login 2>&1")

    async def login(self, vdisk: str, **settings: str) -> str:
        """Log in; return the device of the target's LUN 0."""
        reply = await self.try_login(vdisk, **settings)
        assert reply.status == 0, reply.output
        return await self._machine.succeed(f"disk-of {TARGET_PREFIX}{vdisk}")

    async def rescan(self) -> None:
        """Rescan all disks, as after a resize."""
        await self._machine.succeed("iscsiadm -m session --rescan")

    async def logout(self, vdisk: str) -> None:
        await self._machine.succeed(f"{self._node(vdisk)} --logout")

    async def negotiated(self) -> str:
        """Return the negotiated values of the sessions, as iscsiadm prints them."""
        return await self._machine.succeed("iscsiadm -m session -P 2")


async def sessions(daemon: Daemon) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = await daemon.ctl("session", "ls")
    return rows
