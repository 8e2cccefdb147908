"""Our initiator, sans-IO: the other side of the wire."""
