"""Fuzzing of everything that a peer's bytes reach: PDU framing, login text, CHAP, CDBs and
parameter data.

`python -m tests.fuzz.run` prints its seed first, and for a failure the command that replays it. A
slice runs with the tests, and so do canaries: planted bugs that each surface must find.
"""
