"""Tests of ``redis_asgi.embeddings``, a file per module; ``servers`` has the fake apps they share."""
