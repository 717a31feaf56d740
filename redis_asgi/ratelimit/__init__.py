"""Rate limiting: a request's rules become charges, decided together: all are made, or none.

``rules``       which requests, who shares a counter (``partition``), at what cost; ``policy``: the nouns of a limit
``strategies``  the arithmetic, kept in this process by ``local``; ``scripts/*.lua`` is the same in Redis
``batch``       checks that share a round trip (``wires``, ``cluster``); ``refusals``: those that need none
``engine``      refusal memory, then Redis, then ``on_redis_error``; ``limiter``: `RateLimiter` for direct use
``headers``     fields and problem documents of a ``decision``; ``responses``: what a refused client gets
``middleware``  all of it around an app (``request``: its rules; ``lint``: its mistakes); ``route``: around an endpoint
``overview``    what of all that is in force, for who asks from outside
``openapi``     what a refused client gets, in an app's document; ``current``: the decision as FastAPI injects it
``ledger``      what a request has been charged, and what its response changes about that
"""
