"""Likely misconfigurations, said once each with a code and how to mend it, at the first request that shows them."""

import logging

from starlette.types import Scope

from ..scope import Addressing, peer_host

logger = logging.getLogger("redis_asgi.ratelimit")

_FORWARDING = frozenset((b"x-forwarded-for", b"forwarded"))


# What is wrong with a deployment shows in its first requests; looking at every one would cost each a microsecond.
LOOKS = 1000


class Linter:
    """What one middleware has said already, and what it looks for.

    Attributes:
        looks: How many requests it still looks at.
    """

    def __init__(self, addressing: Addressing) -> None:
        self._addressing = addressing
        self._said: set[str] = set()
        self.looks = LOOKS

    def look(self, scope: Scope) -> None:
        """Look at a request for what its server or proxy setting does wrong."""
        self.looks -= 1
        host = peer_host(scope)
        if not host:
            if self._addressing.client(scope) is None:
                self._say(
                    "no_client_address",
                    "The server gives no client address, as on a unix socket, so all clients share one counter. If a "
                    "proxy is at its other end, set RATE_LIMIT_TRUSTED_PROXIES=unix, and the proxy to overwrite its "
                    "forwarding header; or partition by something else.",
                )
            return
        for name, value in scope["headers"]:
            if (name in _FORWARDING or name == self._addressing.header) and not self._addressing.trusts_peer(scope):
                # Silent when the server has applied the header: the peer is then one of its addresses.
                if host.encode("utf-8", "replace") not in value:
                    self._say(
                        "forwarded_header_untrusted",
                        "A forwarding header came from a peer that is not trusted, so clients behind it share its "
                        "counter. If it is your proxy, set RATE_LIMIT_TRUSTED_PROXIES to its address or network.",
                    )
                return

    def mounted_twice(self) -> None:
        """An outer instance has put the request to the same counter."""
        self._say(
            "mounted_twice",
            "RateLimitMiddleware wraps this app twice with the same limit; the inner one skips it. Remove one.",
        )

    def _say(self, code: str, fix: str) -> None:
        if code not in self._said:
            self._said.add(code)
            logger.warning("redis_asgi.misconfigured", extra={"code": code, "fix": fix})
