"""The data path: how blocks of an image are read, written, trimmed and copied, and what is
allocated.
"""
