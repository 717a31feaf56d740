"""Rate limiting: a request's rules become charges, decided together: all are made, or none.

The doors lie here; imports point from each line to those below it.

``middleware``   all of it around an app; ``route`` and ``decorator``: around an endpoint; ``limiter``: direct use
``pricing``      what a callable says of the cost, and what is not charged twice; ``current``: for FastAPI's endpoints
``overview``     what is in force, for those who ask without a request; ``openapi/`` stands on all: an app's document
``styles``       in which dialect a middleware speaks on each path
``answers/``     what is said: header fields, refusals and their ``dialects``, ``request.state.rate_limit``
``counting/``    who counts: ``engine`` asks refusal memory, then Redis, then this process; ``settlement``: what changes
``transport/``   how checks share a trip to Redis, and one script; ``scripts/*.lua``: the strategies there
``budgets/``     tokens: what a request may cost, and what its answer says that it used
``rules/``       what is asked: a ``plan`` per shape of request, whom each ``rule`` counts (``partition``), for how much
``limits/``      the nouns (``policy``), the strategies in this process, and the ``reply`` that both kinds give
"""
