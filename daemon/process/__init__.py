"""The process itself: configuration, log, signals, descriptors, and how the interpreter
is tuned.
"""
