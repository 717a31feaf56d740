"""The class of each request header: part of the key, of the lease only, or of neither.

An unknown header is in the key, so it can cause a miss, never another caller's vector and never a
permission. A header leaves the key only by standing in a group below, each with its reason, or by a
setting. Names that end in ``*`` stand for all that begin so.
"""

from collections.abc import Iterable
from enum import Enum

from ...settings import Settings


class HeaderClass(Enum):
    """The place where a header counts."""

    KEY = "key"  # and the lease
    CREDENTIAL = "credential"  # always the lease; the key, unless callers share or a partition stands for them
    LEASE = "lease"
    ADDRESS = "address"  # the lease of a request without a credential header
    NEITHER = "neither"


# May open or close a door, or choose the frame around the vectors, but not the vectors.
_LEASE = """
origin referer user-agent accept x-forwarded-proto x-forwarded-port x-forwarded-scheme x-forwarded-ssl x-scheme
front-end-https sec-fetch-* http-referer x-title x-appengine-inbound-appid x-appengine-cron x-appengine-queuename
x-azure-fdid cf-worker
"""

# Who sends it, where nothing else says so: an app may let an address in.
_ADDRESSES = """
forwarded x-forwarded-for x-original-forwarded-for x-real-ip x-client-ip client-ip x-cluster-client-ip true-client-ip
cf-connecting-ip cf-connecting-ipv6 cf-pseudo-ipv4 fastly-client-ip fly-client-ip do-connecting-ip x-azure-clientip
x-azure-socketip x-envoy-external-address x-original-client-ip x-vercel-forwarded-for x-appengine-user-ip
cloudfront-viewer-address
"""

_NEITHER = (
    # Framing, hop by hop: about the connection or this one message (RFC 9110, 7.6.1, 10.1).
    """
    connection keep-alive proxy-connection transfer-encoding te trailer upgrade http2-settings content-length expect
    max-forwards date early-data priority alt-used upgrade-insecure-requests save-data dnt
    """,
    # Negotiation that the cache itself answers, or that makes a request pass through.
    """
    accept-encoding accept-charset cache-control pragma want-digest want-content-digest content-encoding
    """,
    # The way a request took: what proxies say of themselves and of the connection.
    """
    via cdn-loop x-client-port x-forwarded-server x-envoy-attempt-count x-envoy-expected-rq-timeout-ms x-envoy-internal
    x-envoy-decorator-operation x-envoy-peer-metadata x-envoy-peer-metadata-id x-envoy-original-path x-request-start
    x-queue-start x-start-time x-timer x-varnish connect-time total-route-time fastly-ff fastly-ssl fastly-orig-*
    x-amzn-tls-* x-amz-cf-id cf-ray cf-visitor cf-ipcountry cf-ip* cf-ew-via cf-worker cf-region* cf-timezone
    cloudfront-* x-azure-ref x-azure-fdid x-azure-requestchain x-fd-* x-arr-log-id x-arr-ssl x-appgw-trace-id
    x-site-deployment-id x-waws-unencoded-url was-default-hostname x-appengine-* x-client-geo-* function-execution-id
    fly-region fly-request-id fly-traceparent fly-forwarded-* x-vercel-id x-vercel-ip-* x-railway-* rndr-id
    render-proxy-ttl x-heroku-* x-kong-request-id x-akamai-edgescape akamai-origin-hop l5d-ctx-* l5d-reqid
    """,
    # Tracing, and ids of one request;
    # with `baggage` in the key every user of Sentry would only miss.
    """
    traceparent tracestate baggage b3 x-b3-* uber-trace-id jaeger-debug-id jaeger-baggage sentry-trace newrelic
    x-newrelic-* x-datadog-* x-dynatrace x-dtc x-dtpc elastic-apm-traceparent sw8 sw8-correlation sw8-x x-instana-*
    x-cloud-trace-context grpc-trace-bin x-amzn-trace-id x-amzn-requestid x-honeycomb-trace pinpoint-*
    x-ot-span-context ot-tracer-* request-context correlation-context amz-sdk-invocation-id amz-sdk-request
    x-litellm-trace-id x-portkey-trace-id helicone-request-id
    """,
    # What an SDK or a browser says of itself.
    """
    x-stainless-* x-fern-* x-client-name x-client-version x-goog-api-client x-sdk-* x-ms-return-client-request-id
    x-ms-useragent sec-ch-* sec-gpc sec-purpose device-memory downlink ect rtt
    """,
)
_ID_ENDINGS = (b"request-id", b"correlation-id", b"trace-id", b"span-id", b"transaction-id")

_MAX_CLASSIFIED = 4096  # names, which are the client's
_CONTENT_TYPE = b"content-type"


class _Names:
    """Header names, some for all that begin so."""

    def __init__(self, names: Iterable[str]) -> None:
        listed = tuple(names)
        self._exact = frozenset(name.encode() for name in listed if not name.endswith("*"))
        self._prefixes = tuple(name[:-1].encode() for name in listed if name.endswith("*"))

    def __contains__(self, name: bytes) -> bool:
        return name in self._exact or (bool(self._prefixes) and name.startswith(self._prefixes))


class Headers:
    """The classes of one middleware.

    Args:
        settings: ``EMBEDDING_CACHE_CREDENTIAL_HEADERS``,
            ``_KEYED_HEADERS`` and ``_IGNORED_HEADERS`` of it.
        shared: Whether credentials are out of the key.
    """

    def __init__(self, settings: Settings, *, shared: bool) -> None:
        self._credentials = _Names(settings.EMBEDDING_CACHE_CREDENTIAL_HEADERS)
        self._keyed = _Names(settings.EMBEDDING_CACHE_KEYED_HEADERS)
        self._ignored = _Names(settings.EMBEDDING_CACHE_IGNORED_HEADERS)
        self._shared = shared
        self._classes: dict[bytes, HeaderClass] = {}

    def class_of(self, name: bytes) -> HeaderClass:
        """The class of the header *name* (lower case)."""
        kind = self._classes.get(name)
        if kind is not None:
            return kind
        if len(name) > _LONGEST_NAME:
            return HeaderClass.KEY
        if len(self._classes) >= _MAX_CLASSIFIED:
            self._classes.clear()  # a client makes names up; the usual ones are back at once
        kind = self._classes[name] = self._classify(name)
        return kind

    def is_keyed(self, name: bytes) -> bool:
        """Whether ``EMBEDDING_CACHE_KEYED_HEADERS`` names it:
        it is in the key whole, whatever else it is.
        """
        return name in self._keyed

    def is_in_key(self, name: bytes) -> bool:
        """Whether two requests that differ in the header *name* never share a vector."""
        if name in self._keyed:
            return True
        kind = self.class_of(name)
        # Of a content type only the media type is.
        return (kind is HeaderClass.KEY and name != _CONTENT_TYPE) or (
            kind is HeaderClass.CREDENTIAL and not self._shared
        )

    def _classify(self, name: bytes) -> HeaderClass:
        if name in self._credentials:
            return HeaderClass.CREDENTIAL
        if name in self._keyed:
            return HeaderClass.KEY
        if name in self._ignored:
            return HeaderClass.NEITHER
        for kind, names in _GROUPS:
            if name in names:
                return kind
        return HeaderClass.NEITHER if name.endswith(_ID_ENDINGS) else HeaderClass.KEY


_GROUPS = (
    (HeaderClass.LEASE, _Names(_LEASE.split())),
    (HeaderClass.ADDRESS, _Names(_ADDRESSES.split())),
    (HeaderClass.NEITHER, _Names(" ".join(_NEITHER).split())),
)
_LONGEST_NAME = 256  # bytes; what is longer is not kept in a cache
