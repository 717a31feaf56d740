"""The decision on a request, as attributes of the OpenTelemetry span it runs in; no spans of our
own.
"""

import sys
from contextvars import copy_context
from functools import lru_cache

# What a server's task begins with is no context variable at all, and then there is no span: seen at
# next to no cost, for what would annotate at every request.
may_be_traced = copy_context


def annotate_span(**attributes: str | bool | float | None) -> None:
    """Set attributes on the current OpenTelemetry span; nothing when there is none that records.

    ``annotate_span(ratelimit_decision="refused", cache_result=None)`` sets
    ``redis_asgi.ratelimit.decision``: the part of the package comes first, and ``None`` is left
    out. opentelemetry-api is never imported: where nothing else has, there is no span, and a call
    costs one look into a dictionary.

    Args:
        attributes: Never an identity, a key or a text:
            traces are read by more people than Redis is.
    """
    # They may be half imported by another thread. redis-py imports them wherever they are
    # installed, also where nothing traces; whether there is a context at all is cheaper to see than
    # that it holds no span.
    context = getattr(sys.modules.get("opentelemetry.context"), "get_current", None)
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if context is None or current is None or not context():
        return
    span = current()
    if span.is_recording():
        for name, value in attributes.items():
            if value is not None:
                span.set_attribute(_attribute(name), value)


@lru_cache(maxsize=64)
def _attribute(name: str) -> str:
    """``cache_hit_rate`` as ``redis_asgi.cache.hit_rate``."""
    part, _, rest = name.partition("_")
    return f"redis_asgi.{part}.{rest}"
