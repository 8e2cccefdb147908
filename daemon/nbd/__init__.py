"""NBD over TCP and Unix sockets: the listener, its exports, and its sessions."""
