"""The pool: all that the daemon knows of the store (docs/design.md, "What the daemon calls").

This room puts the others together, opens and closes them, and makes new pools.
"""

from storage.pool.pool import Pool

__all__ = ["Pool"]
