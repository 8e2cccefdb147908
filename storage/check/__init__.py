"""The check of a whole pool, offline or live: it walks everything that the superblock reaches,
recomputes what the format calls derived (active map, share map, region summary, counters),
compares, and says every difference in words. It shares the format definitions of ``storage.layout``
with the code that writes pools, and nothing else.
"""

from storage.check.drivers import BlockReader, check_device, check_live, check_path
from storage.check.engine import Check
from storage.check.report import CheckReport

__all__ = ["BlockReader", "Check", "CheckReport", "check_device", "check_live", "check_path"]
