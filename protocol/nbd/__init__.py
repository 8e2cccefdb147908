"""The NBD server, sans-IO: fixed newstyle handshake and transmission over `protocol.volume`.

Docstrings cite sections of the protocol document, doc/proto.md of
github.com/NetworkBlockDevice/nbd; "extended headers" are those of its branch extension-ext-header.
Constants have the document's names without ``NBD_``.
"""
