"""The superblock, from which everything else is found, and its two copies on a device."""
