"""Tests of ``redis_asgi``; each file mirrors a module, ``kit`` is what they share."""
