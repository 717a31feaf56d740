"""The origin of vectors: the wrapped app, called once for concurrent requests, and its answer read."""
