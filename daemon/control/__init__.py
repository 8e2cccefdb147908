"""The control service: its Unix socket, and each of its methods carried out (`handlers`)."""
