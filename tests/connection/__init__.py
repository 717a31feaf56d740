"""The client, its breaker, its names and nodes, a file per module."""
