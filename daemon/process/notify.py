"""sd_notify(3): tell systemd that the daemon is ready or stopping. Without NOTIFY_SOCKET it does
nothing.
"""

import os
import socket


def notify(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` or the like. An unreachable socket is not our failure:
    systemd notices by its own timeout.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(state.encode(), address)
        except FileNotFoundError:
            return
