"""The split: a clone gets every block of its own (or a share in it) until its backing store can be
released (design section 5).
"""
