"""The rate notation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi import ConfigurationError
from redis_asgi.settings.notation import MAX_QUOTA, MAX_WINDOW, Limit, parse_limits, read_limits


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("10/second", [(10, 1)]),
        ("10 per second", [(10, 1)]),
        ("10/minute", [(10, 60)]),
        ("5/10 seconds", [(5, 10)]),
        ("5 per 10 minutes", [(5, 600)]),
        ("100/hour", [(100, 3600)]),
        ("100/day", [(100, 86400)]),
        ("20/second; 1000/hour", [(20, 1), (1000, 3600)]),
        ("1000/hour;20/second", [(1000, 3600), (20, 1)]),
        ("20/second, 1000/hour", [(20, 1), (1000, 3600)]),
        ("10/MINUTE", [(10, 60)]),
        ("10/s", [(10, 1)]),
        ("5/30s", [(5, 30)]),
        ("5/30 secs", [(5, 30)]),
        ("100/min", [(100, 60)]),
        ("5 per M; 7/2 mins", [(5, 60), (7, 120)]),
        ("3/2h, 10/hr|20/d", [(3, 7200), (10, 3600), (20, 86400)]),
        (f"{MAX_QUOTA}/{MAX_WINDOW} seconds", [(MAX_QUOTA, MAX_WINDOW)]),
    ],
)
def test_notation_is_read_in_the_order_written(notation: str, expected: list[tuple[int, int]]) -> None:
    """The notation of ``limits``, and its usual short forms, mean quota and whole seconds."""
    assert expected == [(limit.quota, limit.window) for limit in read_limits(notation)]


@pytest.mark.parametrize(
    ("notation", "why"),
    [
        ("", "not in the notation"),
        ("often", "not in the notation"),
        ("10", "not in the notation"),
        ("-1/second", "not in the notation"),
        ("1.5/second", "not in the notation"),
        ("10/fortnight", "not in the notation"),
        ("10/ms", "not in the notation"),
        ("10 s", "not in the notation"),
        ("10/second s", "not in the notation"),
        ("10/0s", "window of 0"),
        ("0/second", "quota 0"),
        (f"{MAX_QUOTA + 1}/second", "quota 1000000001"),
        ("10/0 seconds", "window of 0"),
        ("10 per 0 minutes", "window of 0"),
        ("10 per 00 minutes", "window of 0"),
        ("5/second; 10/0seconds", "window of 0"),
        ("10/367 days", "366 days"),
        ("10/second; 20/second", "same window"),
        ("60/minute; 100/60 seconds", "same window"),
        ("1/second;" * 200, "longer than"),
    ],
)
def test_bad_notation_says_what_is_wrong(notation: str, why: str) -> None:
    """What ``limits`` would bend into something else is refused with the reason."""
    with pytest.raises(ValueError, match=why):
        read_limits(notation)


@pytest.mark.parametrize(
    "notation",
    [
        "10/second please",
        "10/second or so",
        "maybe 10/second",
        "10/second 20/minute",
        "10/second;nonsense",
        "10/second;;",
    ],
)
def test_what_stands_beside_a_limit_is_not_ignored(notation: str) -> None:
    """A limit with words around it is not silently read as that limit."""
    with pytest.raises(ValueError, match="notation"):
        read_limits(notation)


def test_argument_that_cannot_be_read_is_a_configuration_error() -> None:
    """The error shows the notation, cut when long, the reason and one that works."""
    with pytest.raises(ConfigurationError) as caught:
        parse_limits("often")
    assert str(caught.value) == (
        "limits='often': not in the notation '<quota>/<window>', joined by ';'. "
        "Try '100/minute' or '20/second; 1000/hour'."
    )

    with pytest.raises(ConfigurationError, match=r"x{77}\.\.\.'"):
        parse_limits("x" * 500)


@given(quota=st.integers(1, MAX_QUOTA), window=st.integers(1, MAX_WINDOW))
def test_limit_reads_back_what_it_prints(quota: int, window: int) -> None:
    """``str`` of a limit is notation for the same limit."""
    assert read_limits(str(Limit(quota, window))) == (Limit(quota, window),)


@given(text=st.text(max_size=60) | st.from_regex(r"[0-9 /;,a-z]{0,40}", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Hostile notation (a dynamic limit may come from anywhere) is a ``ValueError``, nothing else."""
    try:
        limits = read_limits(text)
    except ValueError:
        return
    assert all(1 <= limit.quota <= MAX_QUOTA and 1 <= limit.window <= MAX_WINDOW for limit in limits)
