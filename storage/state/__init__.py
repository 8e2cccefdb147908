"""What all rooms of an open pool share: its state, and whether the host has room for it."""
