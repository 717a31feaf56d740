"""``python -m redis_asgi``: the same as ``redis-asgi``."""

from .cli import main

main()
