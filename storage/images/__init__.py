"""Images: vdisks, snapshots and clones; their table entries, and the volume through which clients
reach one.
"""
