"""The pool as the daemon sees it: its volumes, its configuration, its events and its space."""
