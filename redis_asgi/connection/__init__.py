"""One Redis client per event loop, its circuit breaker, and how well its server is.

``manager``          the client of each loop (``open_client``), shared by all parts;
                     ``redis_argument``: which manager a part uses
``client_factory``   clients as settings describe them, and their pools (``pool_usage``)
``sockets``          how a server is reached, found by ``resolver``, ``sentinels`` and
                     ``cluster_nodes``
``direct``           commands without redis-py's layers; ``side_connection``: outside of any pool
``breaker``          after repeated failures nothing waits for Redis
``operation``        a user's own functions
``health_check``     a look at a server (``server_info``), kept for a second (``health_cache``)
``lifespan``         the client stays open while the app lives
"""
