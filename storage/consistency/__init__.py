"""What makes changes durable: epochs, consistency points, superblocks, and the intent log between
two of them.
"""
