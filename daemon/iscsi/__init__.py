"""iSCSI over TCP: listening sockets, admission, connections, and an asyncio initiator."""
