"""iSCSI over TCP: the daemon's listener with its connections, and an initiator of our own."""
