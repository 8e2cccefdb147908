"""What the daemon asks of a pool, what it keeps in it, and the watch over its space."""
