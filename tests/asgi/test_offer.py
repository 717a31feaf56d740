"""What middlewares offer to those below them: the managers of all,
the nearest addresses, the outermost style.
"""

import gc
import weakref

from redis_asgi import Settings
from redis_asgi.asgi.offer import OFFER, Offer, offer_of
from redis_asgi.asgi.scope import Addressing

ADDRESSING = Addressing(Settings())


def test_nothing_is_offered_where_there_is_no_middleware() -> None:
    """Whatever else a scope holds."""
    assert offer_of({"type": "http"}) is None


def test_of_two_the_outer_one_styles_and_the_inner_one_addresses() -> None:
    """Managers are told in their order, and one that both use once."""
    inner = Offer("b", "a", addressing=ADDRESSING, style="inner")
    joined = inner.below(Offer("a", addressing=Addressing(Settings()), style="outer"))

    assert (("a", "b"), ADDRESSING, "outer") == (joined.managers, joined.addressing, joined.style)
    assert inner is inner.below(None)


def test_what_one_does_not_say_is_the_others() -> None:
    """A cache has neither addresses nor a style, and hides those of a limiter outside from nobody."""
    limiter, cache = Offer("a", addressing=ADDRESSING, style="plain"), Offer("b")
    for joined in (cache.below(limiter), limiter.below(cache)):
        assert (ADDRESSING, "plain") == (joined.addressing, joined.style)


def test_the_same_two_offer_the_same() -> None:
    """A request makes none of its own, unless what is outside has changed."""
    inner, outer, other = Offer("b"), Offer("a"), Offer("c")

    assert inner.below(outer) is inner.below(outer)
    assert ("c", "b") == inner.below(other).managers
    assert ("a", "b") == inner.below(outer).managers


def test_one_of_a_request_is_gone_with_it() -> None:
    """In a style of its own there is one for each request, and no cycle that keeps it."""

    class Style:
        pass

    gc.disable()
    try:
        style = Style()
        scope = {OFFER: Offer("a").in_style(style)}
        seen = weakref.ref(style)
        del style, scope
        assert seen() is None
    finally:
        gc.enable()
