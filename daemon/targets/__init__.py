"""Which iSCSI targets there are, who may use them, and what of that outlives a restart."""
