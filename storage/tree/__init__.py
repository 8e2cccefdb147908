"""Buffer trees: pointer blocks in memory, how they are found, loaded, and copied before they are
changed.
"""
