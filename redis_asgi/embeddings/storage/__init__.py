"""Storage in this process, on one Redis or on a cluster; knows no HTTP and no wire format.

``lookup``         what is stored for a request, read: the way in (``joint_lookup``: small ones
                   share a trip)
``vector_cache``   what is kept of an answer, written: vectors, the lease, the epoch (``epochs``)
``l1``             the layer in this process
``store``          the store behind a manager: ``redis_store``, ``cluster_store``,
                   ``memory_store`` or ``unavailable_store``
``operations``     what stores are asked, and their results; ``owed_writes``: those to be made later
``pipeline``       how commands reach Redis, within a deadline
"""
