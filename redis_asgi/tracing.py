"""The decision on a request, as attributes of the OpenTelemetry span it runs in; no spans of our own."""

import sys
from functools import lru_cache


def annotate_span(**attributes: str | bool | float | None) -> None:
    """Set attributes on the current OpenTelemetry span; nothing when there is none that records.

    ``annotate_span(ratelimit_decision="refused", cache_result=None)`` sets ``redis_asgi.ratelimit.decision``: the
    part of the package comes first, and ``None`` is left out. opentelemetry-api is never imported: where nobody else
    has, there is no span, and a call costs one look into a dictionary.

    Args:
        attributes: Never an identity, a key or a text: traces are read by more people than Redis is.
    """
    # It may be half imported by another thread.
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return
    span = current()
    if span.is_recording():
        for name, value in attributes.items():
            if value is not None:
                span.set_attribute(_attribute(name), value)


def may_be_traced() -> bool:
    """Whether there is anything that a span could be in: cheaper to see than that there is no span.

    redis-py imports the API wherever it is installed, also where nobody traces.
    """
    context = getattr(sys.modules.get("opentelemetry.context"), "get_current", None)
    return context is not None and bool(context())


@lru_cache(maxsize=64)
def _attribute(name: str) -> str:
    """``cache_hit_rate`` as ``redis_asgi.cache.hit_rate``."""
    part, _, rest = name.partition("_")
    return f"redis_asgi.{part}.{rest}"
