"""The pool: device, buffer trees, allocation, consistency points, images, split, background work,
check. Imports no other room.
"""
