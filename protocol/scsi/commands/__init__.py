"""The SCSI commands, one module a family.

A family is named for what its commands are about, by the word of SPC or SBC, and has its rows of
the command table in ``COMMANDS``, which `protocol.scsi.dispatch` lists. What one family alone uses
stands beside it under its name (``copy_job``); what several use has a name of its own (``scan``).
"""
