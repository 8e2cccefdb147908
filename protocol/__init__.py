"""The wire, sans I/O: bytes in, bytes and calls on a BlockVolume out. Imports nothing of storage or
daemon, no sockets, no clocks.
"""
