"""A real Linux initiator: a Debian kernel with open-iscsi in a small QEMU guest, with file systems
and fio on cleaved's disks.

`packages` fetches what the machine lacks, `image` builds an initramfs of it, `machine` runs QEMU
with a shell on a serial line, and `open_iscsi` speaks to the daemon through that shell.
docs/conformance.md says how to run it.
"""
