"""``redis-asgi``, as it is typed."""
