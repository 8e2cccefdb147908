"""The block allocation structures (active map, share map, region summary) and the write allocator
that reads them.
"""
