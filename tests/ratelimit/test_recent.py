"""A cache in two generations: bounded by weight, and true to what was made."""

from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.ratelimit.rules.recent import Recent


@given(st.lists(st.integers(0, 300)))
def test_what_is_found_is_what_was_made(keys: list[int]) -> None:
    """Whatever is forgotten, a value is the one of its key,
    and what is kept weighs no more than twice the limit.
    """
    recent: Recent[int, str] = Recent(100, lambda _: 1)
    for key in keys:
        assert str(key) == (recent.young.get(key) or recent.find(key, str))
        assert 100 >= len(recent.young)


def test_what_is_used_is_kept() -> None:
    """A key that was looked for lately outlives those that were not."""
    made: list[int] = []
    recent: Recent[int, int] = Recent(100, lambda _: 1)

    def make(key: int) -> int:
        made.append(key)
        return key + 1

    for key in range(1, 500):
        for wanted in (0, key):
            if wanted not in recent.young:
                recent.find(wanted, make)
    recent.find(1, make)

    assert (1, 2) == (made.count(0), made.count(1))


def test_what_weighs_too_much_is_not_kept() -> None:
    """More than a hundredth of the limit is made anew each time."""
    recent: Recent[str, int] = Recent(100, len)
    recent.find("a", len)
    recent.find("bb", len)

    assert {"a": 1} == recent.young
