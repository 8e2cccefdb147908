"""An epoch, all that changes between two freezes: which blocks, what the intent log does not say
yet, and what a consistency point has to write.
"""
