"""Tests of ``redis_asgi.embeddings``, a file per module."""
