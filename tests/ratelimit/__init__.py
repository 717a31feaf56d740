"""Tests of ``redis_asgi.ratelimit``, a file per module; ``harness`` has the apps they share."""
