"""Leases and refusals, as values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.records.lease import Denials, Lease, shortest


@pytest.mark.parametrize(
    ("answered_at", "now", "expected"),
    [
        (1000.0, 1000.0, 60.0),
        (1000.0, 1030.0, 30.0),
        (1000.0, 1060.0, 0.0),
        (1000.0, 1100.0, -40.0),
        (1000.0, 900.0, 60.0),
    ],
)
def test_a_lease_ends_after_its_seconds(answered_at: float, now: float, expected: float) -> None:
    """A clock that lags behind the writer's never makes it last longer."""
    assert expected == Lease(answered_at - 1, answered_at, 200, "", (), {}).remaining(60.0, now)


@pytest.mark.parametrize(
    ("names", "moment", "expected"),
    [
        ([b"a"], 5.0, True),
        ([b"a"], 10.0, True),
        ([b"a"], 10.1, False),
        ([b"b"], 0.0, False),
        ([b"b", b"a"], 5.0, True),
        ([], 0.0, False),
    ],
)
def test_a_refusal_holds_for_what_was_asked_before(names: list[bytes], moment: float, expected: bool) -> None:
    """What was asked before the app refused, or at that moment, is refused."""
    denials = Denials()
    assert not denials.since(names, moment)
    denials.note(b"a", 10.0)
    denials.note(b"a", 7.0)  # of an older request, whose answer was late

    assert expected is denials.since(names, moment)


def test_refusals_are_bounded_and_the_oldest_go_first() -> None:
    """Ten thousand are kept; one that is noted again is not old."""
    denials = Denials()
    for number in range(10_000):
        denials.note(b"%d" % number, 1.0)
    denials.note(b"0", 2.0)
    denials.note(b"more", 1.0)

    assert [True, False, True, True] == [denials.since([name], 1.0) for name in (b"0", b"1", b"2", b"more")]


@given(st.lists(st.integers(0, 100), min_size=1))
def test_the_shortest_is_the_first_of_the_smallest(lengths: list[int]) -> None:
    """An index, as of `list.index`."""
    assert lengths.index(min(lengths)) == shortest(lengths)
