"""SCSI device server: SPC-4 and SBC-3 commands over a `BlockVolume`, sans-IO.

A transport asks `dispatch.prepare` what a CDB wants, moves the data, and gives the answer; sense
data, unit attentions and limits are made here, and nothing here knows which transport carries the
command.
"""
