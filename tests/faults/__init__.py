"""The laboratory: the whole package in one app, in front of a Redis that misbehaves,
and an oracle that counts along.

``service``     the app under test: three limits, each failing its own way, the cache, and every page
``table``       one row for each way in which Redis can be ill, and what is promised then
``story``       what one row looks like from outside: before, during and after
``asking``      one request, and its answer
``oracle``      what may be admitted and answered at all, counted apart from the package
``storm``       clients that leave at every stage
``soak``        one restart of Redis after another
``chaos``       a connection that changes its fault all the time
``serving``     a real uvicorn

Durations are compared with a control that the same loop ran at the same time, never with a number
of seconds: see `story.Control`.
"""
