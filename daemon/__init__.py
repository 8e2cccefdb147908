"""The process: configuration, listeners, sessions' sockets, the control service, logging, and the
two commands.

It wires `storage` (the pool) to `protocol` (the wire), and is the only layer that knows sockets,
clocks and the event loop.
"""

VERSION = "0.2.0"
CONTROL_PATH_DEFAULT = "/run/cleaved/control.sock"
