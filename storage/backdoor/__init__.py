"""The backdoor message handler: all deferred work (split, reclaim) as small messages, in periods of
reduced activity.
"""
