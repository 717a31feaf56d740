"""Who computes: the wrapped app, called once for concurrent requests, and its answer read."""
