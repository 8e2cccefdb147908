"""The SCSI commands: one module a family, each with its rows of the command table."""
