"""A real Linux initiator: a Debian kernel with open-iscsi in a small QEMU guest, with file systems
and fio on cleaved's disks.

`packages` downloads what the machine lacks, `image` builds an initramfs from it, `machine` runs
QEMU with a shell on a serial line, and `open_iscsi` controls the initiator through that shell.
docs/conformance.md describes how to run it.
"""
