"""Records as values: vectors, leases, their keys and epochs; no I/O."""
