"""What is kept, as values: vectors, leases, their keys and epochs; no I/O."""
