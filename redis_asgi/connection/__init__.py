"""One Redis client per event loop, its circuit breaker, and how well its server is."""
