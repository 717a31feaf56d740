"""A clock that is set back, or a replica that is behind:
nobody is locked out for it, and nothing is opened again.
"""

from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from redis_asgi.ratelimit.limits.counter import Mode
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, Policy, log_key
from redis_asgi.ratelimit.limits.reply import Numbers, charged_receipts

from ..kit.servers import Server, wait_until
from .histories import EPOCH, Keeping, Twin, charge, client, numbers, policy
from .test_scripts import Script, script  # noqa: F401 - a fixture

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
HOUR = 3600 * MICROSECONDS
WINDOW = 60 * MICROSECONDS
# Any step of which a stored time is left behind in the future, whatever the strategy keeps.
steps = st.one_of(st.sampled_from([2 * WINDOW, HOUR, 10 * HOUR]), st.integers(2 * WINDOW, 10**15))
often = example_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Both:
    """The script and its twin, asked the same, of which one answer is expected."""

    def __init__(self, script: Script, *policies: Policy) -> None:  # noqa: F811 - a fixture's
        self.script = script
        self.twin = Twin(*policies, engine=Keeping())
        script.server.flushdb()

    def ask(self, mode: Mode, cost: int = 1, *, at: int, receipts: list[int] | None = None) -> list[int]:
        """One request's reply."""
        asked = [charge(*self.twin.policies, cost=cost)]
        expected = self.twin.ask(mode, cost, at=at, receipts=receipts or [])
        assert expected == self.script.decide(mode, asked, receipts=receipts or [], now=at)
        return expected

    def numbers(self, mode: Mode, cost: int = 1, *, at: int) -> Numbers:
        """The only policy's numbers."""
        (found,) = numbers(self.ask(mode, cost, at=at))
        return found

    def stored(self) -> dict[Any, Any]:
        """Every key in Redis, and what it holds."""
        return dump(self.script.server)


def dump(server: redis.Redis) -> dict[Any, Any]:
    """Every key of *server*, and what it holds."""
    found: dict[Any, Any] = {}
    for key in server.keys():
        found[key] = server.hgetall(key) if server.type(key) == b"hash" else server.lrange(key, 0, -1)
    return found


@every_strategy
@often
@given(step=steps, every=st.sampled_from([0, 1, MICROSECONDS, 7 * MICROSECONDS]), later=st.integers(0, WINDOW))
def test_who_is_refused_is_not_locked_out_by_a_step(
    script: Script,  # noqa: F811 - the fixture
    strategy: str,
    step: int,
    every: int,
    later: int,
) -> None:
    """A used quota stays used after a step of any size,
    and is back when the first refusal says, whoever asks again.
    """
    both = Both(script, policy(strategy, 5, 60))
    assert both.ask("consume", 5, at=EPOCH + later)[0]
    now = EPOCH + later - step
    told = both.numbers("consume", at=now)
    assert (False, 0) == (told.fits, told.remaining)
    assert told.retry <= (2 if strategy == "sliding-window-counter" else 1) * WINDOW
    # Asking again and again, as clients do.
    for n in range(1, 4):
        assert now + n * every >= now + told.retry or not both.numbers("consume", at=now + n * every).fits
    assert both.numbers("consume", at=now + told.retry).fits


@every_strategy
@often
@given(step=steps, used=st.integers(0, 5))
def test_what_was_used_stays_used_and_the_rest_is_there(
    script: Script,  # noqa: F811 - the fixture
    strategy: str,
    step: int,
    used: int,
) -> None:
    """Of five, what a client has not used before a step remains after it,
    and the full quota is back in time.
    """
    both = Both(script, policy(strategy, 5, 60))
    both.ask("consume", used, at=EPOCH)
    now = EPOCH - step
    assert 5 - used == both.numbers("peek", at=now).remaining
    assert 5 - used == both.numbers("consume", 0, at=now).remaining
    found = both.numbers("peek", at=now)
    assert found.reset <= (2 if strategy == "sliding-window-counter" else 1) * WINDOW
    assert 5 == both.numbers("peek", at=now + found.reset).remaining


@every_strategy
@pytest.mark.parametrize(
    ("mode", "cost"), [("consume", 0), ("consume", 1), ("consume", 9), ("charge", 1), ("refund", 1)]
)
def test_every_decision_writes_the_step_back(script: Script, strategy: str, mode: Mode, cost: int) -> None:  # noqa: F811
    """Refusals, requests that cost nothing and late refunds make a stored time of the future one of
    now.
    """
    both = Both(script, policy(strategy, 5, 60))
    reply = both.ask("consume", 5, at=EPOCH)
    now = EPOCH - HOUR
    both.ask(mode, cost, at=now, receipts=charged_receipts(reply) if mode == "refund" else None)

    assert both.stored()
    key, field = client("203.0.113.7").key, policy(strategy, 5, 60).field
    first = int(script.server.hget(key, field.decode()).split()[0])  # type: ignore[union-attr]  # it is there
    assert now == first
    stamps = [int(stamp) for stamp in script.server.lrange(log_key(key, field), 0, -1)]
    assert {now} >= set(stamps)


@every_strategy
def test_peek_only_reckons(script: Script, strategy: str) -> None:  # noqa: F811 - the fixture
    """A look after a step tells what a decision would, and leaves every key as it was."""
    both = Both(script, policy(strategy, 5, 60))
    both.ask("consume", 5, at=EPOCH)
    before = both.stored()
    looked = both.numbers("peek", at=EPOCH - HOUR)

    assert before == both.stored()
    assert looked == both.numbers("consume", at=EPOCH - HOUR)


@every_strategy
@often
@given(step=steps, first=st.sampled_from(["refund", "consume"]))
def test_receipts_of_before_a_step_give_nothing_back(
    script: Script,  # noqa: F811 - the fixture
    strategy: str,
    step: int,
    first: Mode,
) -> None:
    """Whether the refund is the first to see the step or not;
    one of after the step gives back what it says.
    """
    both = Both(script, policy(strategy, 5, 60))
    old = charged_receipts(both.ask("consume", 3, at=EPOCH))
    now = EPOCH - step
    if first == "consume":
        both.ask("consume", 0, at=now)
    both.ask("refund", 3, at=now, receipts=old)
    assert 2 == both.numbers("peek", at=now).remaining
    new = charged_receipts(both.ask("consume", 2, at=now))
    both.ask("refund", 2, at=now, receipts=new)
    assert 2 == both.numbers("peek", at=now).remaining


@often
@given(
    stamps=st.lists(st.integers(0, 3 * WINDOW), min_size=1, max_size=30),
    back=st.integers(0, 4 * WINDOW),
    cost=st.integers(0, 30),
)
def test_log_is_cut_where_now_is(
    script: Script,  # noqa: F811 - the fixture
    stamps: list[int],
    back: int,
    cost: int,
) -> None:
    """The stamps of the future become as many of now,
    and those of before stay and expire when they would have.
    """
    both = Both(script, policy("moving-window", 100, 60))
    for stamp in sorted(stamps):
        both.ask("consume", 1, at=EPOCH + stamp)
    now = EPOCH + max(stamps) - back
    both.ask("consume", cost, at=now)
    key = log_key(client("203.0.113.7").key, policy("moving-window", 100, 60).field)
    found = [int(stamp) for stamp in script.server.lrange(key, 0, -1)]

    assert found == sorted(found)
    assert now >= max(found, default=0)
    live = [EPOCH + stamp for stamp in sorted(stamps) if EPOCH + max(stamps) - WINDOW < EPOCH + stamp]
    assert [min(stamp, now) for stamp in live] + [now] * cost == found[-len(live) - cost :]


@every_strategy
def test_replica_that_is_behind_takes_over(strategy: str, private_server: Callable[..., Server]) -> None:
    """After a failover to a server whose clock is half a minute behind,
    counts are as they were, and waits bounded.
    """
    primary = private_server()
    follower = private_server("--replicaof", primary.host, str(primary.port))
    limit = policy(strategy, 5, 60)
    first = Script(primary.client())
    first.decide("consume", [charge(limit, cost=5, who="full")], now=EPOCH)
    first.decide("consume", [charge(limit, cost=2, who="half")], now=EPOCH)
    wait_until(lambda: dump(follower.client()) == dump(primary.client()), "the replica has it all")
    follower.command("REPLICAOF", "NO", "ONE")
    taken_over = Script(follower.client())
    behind = EPOCH - 30 * MICROSECONDS

    (full,) = numbers(taken_over.decide("consume", [charge(limit, who="full")], now=behind))
    (half,) = numbers(taken_over.decide("consume", [charge(limit, who="half")], now=behind))
    assert (False, True, 2) == (full.fits, half.fits, half.remaining)
    assert full.retry <= (2 if strategy == "sliding-window-counter" else 1) * WINDOW
    again = taken_over.decide("consume", [charge(limit, who="full")], now=behind + full.retry)
    assert numbers(again)[0].fits
    first.close()
    taken_over.close()
