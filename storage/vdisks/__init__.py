"""Vdisks, snapshots and clones as clients and administrators reach them: volumes, their life cycle,
and what lists show.
"""
