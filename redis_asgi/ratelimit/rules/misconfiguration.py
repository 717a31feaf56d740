"""Likely misconfigurations, said once each with how to mend them,
at the first request that shows them.
"""

import logging
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from ...asgi.scope import Addressing, peer_host
from ...events import SaidOnce
from .compiled import CompiledRule
from .routing import Routing

logger = logging.getLogger("redis_asgi.ratelimit")

# What is wrong with a deployment shows in its first requests;
# looking at every one would cost each a microsecond.
LOOKS = 500


class Linter:
    """The warnings of one middleware, and the signs that it looks for.

    Args:
        routing: What stands between the middleware and the app's routes.
        rules: The middleware's.

    Attributes:
        looks: How many requests it still looks at.
    """

    def __init__(self, addressing: Addressing, routing: Routing, rules: Sequence[CompiledRule]) -> None:
        self._addressing = addressing
        self._routing = routing
        self._telling = frozenset((b"origin", b"x-forwarded-for", b"forwarded", addressing.header))
        self._by_user = next((rule for rule in rules if rule.partition.counts_users), None)
        self._has_looked_for_cors = False
        self._say = SaidOnce(logger).say
        self.looks = LOOKS

    def look(self, scope: Scope) -> None:
        """Look at a request for what its server, its proxy or the order of middlewares does wrong."""
        self.looks -= 1
        if self._by_user is not None and "user" not in scope:
            self._say("user_middleware_missing", rule=self._by_user.name, missing=self._by_user.partition.missing)
        host = peer_host(scope)
        if not host and self._addressing.client(scope) is None:
            self._say("no_client_address")
        for name, value in scope["headers"]:
            if name in self._telling:
                if name == b"origin":
                    self._look_at_origin(scope)
                elif host:
                    self._look_at_forwarding(scope, host, name, value)

    def _look_at_forwarding(self, scope: Scope, peer: str, name: bytes, value: bytes) -> None:
        # Silent when the server has applied the header: the peer is then one of its addresses.
        if not self._addressing.trusts_peer(scope) and peer.encode("utf-8", "replace") not in value:
            self._say("forwarded_header_untrusted", header=name.decode("latin-1"), peer=peer)

    def _look_at_origin(self, scope: Scope) -> None:
        # A WebSocket's handshake knows no CORS.
        if scope["type"] == "http" and not self._has_looked_for_cors:
            self._has_looked_for_cors = True
            if self._routing.has_inside(CORSMiddleware):
                self._say("cors_inside")

    def mounted_twice(self) -> None:
        """An outer instance has put the request to the same counter."""
        self._say("mounted_twice")
