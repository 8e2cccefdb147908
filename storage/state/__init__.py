"""What all rooms of an open pool share: its state, epochs, whether the host has room, and how long
jobs are cut into slices.
"""
