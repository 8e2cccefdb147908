"""What all protocols that are served over TCP share: taking connections, how many and how fast, and
what the daemon asks of a protocol's listener.
"""
