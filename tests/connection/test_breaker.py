"""The breaker's states, with time and the server as arguments;
`tests.ratelimit.test_faults` has the real failures.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import AuthenticationError

from redis_asgi.connection import breaker as module
from redis_asgi.connection.breaker import Breaker
from redis_asgi.errors import Failure

from ..kit.logs import event_of
from ..kit.patience import until

pytestmark = pytest.mark.anyio


class FakeServer:
    """Answers probes, or not; counts them."""

    def __init__(self) -> None:
        self.error: Exception | None = ConnectionError()
        self.probes = 0
        self.drops = 0

    async def probe(self) -> None:
        self.probes += 1
        if self.error is not None:
            raise self.error

    async def drop(self) -> None:
        self.drops += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes every 10 ms."""
    monkeypatch.setattr(module, "PROBE_EVERY", 0.01)


def state_of(breaker: Breaker) -> str:
    """Its state now: mypy takes an attribute for what it was."""
    return breaker.state


async def opened(server: FakeServer) -> Breaker:
    """A breaker that is open."""
    breaker = Breaker(server.probe, server.drop)
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT)
    assert "open" == state_of(breaker)
    return breaker


async def test_five_in_a_row_open_it_and_no_fewer() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker(FakeServer().probe, FakeServer().drop)
    for _ in range(3):
        for _ in range(4):
            breaker.failed(Failure.CONNECTION)
        if state_of(breaker) == "closed":
            for _ in range(9):
                breaker.worked()
    assert "closed" == state_of(breaker)
    assert breaker.admits()
    for _ in range(5):
        breaker.failed(Failure.CONNECTION)
    assert "open" == state_of(breaker)
    assert not breaker.admits()
    assert Failure.CONNECTION is breaker.reason
    await breaker.aclose()


async def test_half_of_the_last_twenty_open_it() -> None:
    """A server that answers every other command is not worth the wait; nine bad ones of twenty are."""
    breaker = Breaker(FakeServer().probe, FakeServer().drop)
    for _ in range(9):
        breaker.failed(Failure.TIMEOUT)
        breaker.worked()
    breaker.worked()
    breaker.worked()
    breaker.worked()
    breaker.failed(Failure.TIMEOUT)
    assert "closed" == state_of(breaker)
    breaker.failed(Failure.TIMEOUT)
    breaker.failed(Failure.TIMEOUT)
    assert "open" == state_of(breaker)
    await breaker.aclose()


@pytest.mark.parametrize("failure", [Failure.AUTH, Failure.PERMISSION])
async def test_what_will_not_pass_opens_it_at_once(failure: Failure) -> None:
    """A refused login or right: one failure is enough, and probes are slow."""
    server = FakeServer()
    breaker = Breaker(server.probe, server.drop)
    breaker.failed(failure)
    assert "open" == state_of(breaker)
    await asyncio.sleep(0.05)
    assert 0 == server.probes
    await breaker.aclose()


@pytest.mark.parametrize("failure", [Failure.POOL, Failure.OOM, Failure.REPLY])
async def test_what_says_nothing_about_the_server_never_opens_it(failure: Failure) -> None:
    """Our own load, a full memory and odd replies."""
    breaker = Breaker(FakeServer().probe, FakeServer().drop)
    for _ in range(50):
        breaker.failed(failure)
    assert "closed" == state_of(breaker)


@pytest.mark.parametrize("failure", [Failure.READONLY, Failure.CLUSTER])
async def test_the_wrong_server_drops_the_connections(failure: Failure) -> None:
    """A demoted master is left at the first such reply."""
    server = FakeServer()
    breaker = Breaker(server.probe, server.drop)
    breaker.failed(failure, vectors=True)
    await until(lambda: server.drops == 1)
    await breaker.aclose()


async def test_one_trial_decides_after_a_good_probe() -> None:
    """Half open admits one command; its failure opens again, its success closes."""
    server = FakeServer()
    breaker = await opened(server)
    await until(lambda: server.probes >= 3)
    assert "open" == state_of(breaker)
    server.error = None
    await until(lambda: breaker.state == "half_open")
    assert [True, False, False] == [breaker.admits() for _ in range(3)]
    breaker.failed(Failure.TIMEOUT)
    assert "open" == state_of(breaker)
    await until(lambda: breaker.state == "half_open")
    assert breaker.admits()
    breaker.worked()
    assert "closed" == state_of(breaker)
    assert [True, True] == [breaker.admits() for _ in range(2)]
    breaker.failed(Failure.TIMEOUT)
    assert "closed" == state_of(breaker)
    probes = server.probes
    await asyncio.sleep(0.03)
    assert probes == server.probes
    await breaker.aclose()


async def test_a_trial_that_was_never_sent_does_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request may have gone away."""
    monkeypatch.setattr(module, "_TRIAL_WITHIN", 0.02)
    server = FakeServer()
    server.error = None
    breaker = await opened(server)
    await until(lambda: breaker.state == "half_open")
    assert [True, False] == [breaker.admits(), breaker.admits()]
    await asyncio.sleep(0.03)
    assert breaker.admits()
    await breaker.aclose()


@pytest.mark.parametrize("outcome", ["withdrawn", Failure.POOL, Failure.DEFECT, Failure.TIMEOUT])
async def test_a_trial_that_says_nothing_is_followed_by_the_next(outcome: Failure | str) -> None:
    """Another is let through: that one was not sent, or shows our own load or fault,
    or vectors slow for their size.
    """
    server = FakeServer()
    server.error = None
    breaker = await opened(server)
    await until(lambda: breaker.state == "half_open")
    assert [True, False] == [breaker.admits(), breaker.admits()]
    if isinstance(outcome, Failure):
        breaker.failed(outcome, vectors=True)
    else:
        breaker.withdrawn()
    await until(breaker.admits)
    assert "half_open" == state_of(breaker)
    await breaker.aclose()


async def test_a_trial_of_vectors_counts_only_when_a_probe_fails_too() -> None:
    """As ever; what made it open says nothing about it."""
    server = FakeServer()
    server.error = None
    breaker = await opened(server)
    await until(lambda: breaker.state == "half_open")
    probes = server.probes
    assert breaker.admits()
    breaker.failed(Failure.TIMEOUT, vectors=True)
    # What comes next is the trial, and need not wait for that probe.
    assert ("half_open", True, False) == (state_of(breaker), breaker.admits(), breaker.admits())
    await until(lambda: server.probes == probes + 1)
    await asyncio.sleep(0)
    assert "half_open" == state_of(breaker)
    server.error = ConnectionError()
    breaker.failed(Failure.TIMEOUT, vectors=True)
    await until(lambda: breaker.state == "open")
    await breaker.aclose()


async def test_nothing_but_odd_replies_is_a_refusal() -> None:
    """Twenty in a row, for ten seconds after the last,
    whatever becomes of vectors; one answer ends it.
    """
    breaker = Breaker(FakeServer().probe, FakeServer().drop)
    for _ in range(19):
        breaker.failed(Failure.REPLY)
        breaker.worked(vectors=True)
    breaker.failed(Failure.REPLY, vectors=True)
    assert not breaker.is_refused
    breaker.failed(Failure.REPLY)
    assert breaker.is_refused
    breaker._refused_at -= 10
    assert not breaker.is_refused
    breaker.failed(Failure.REPLY)
    assert breaker.is_refused
    breaker.worked()
    assert not breaker.is_refused
    assert "closed" == state_of(breaker)


async def test_half_open_is_in_doubt_for_a_while() -> None:
    """Whoever gets no requests as long as it is would never try it."""
    server = FakeServer()
    breaker = await opened(server)
    assert breaker.is_in_doubt
    server.error = None
    await until(lambda: breaker.state == "half_open")
    assert breaker.is_in_doubt
    breaker._last_trouble -= 10
    assert not breaker.is_in_doubt
    breaker.worked()
    assert not breaker.is_in_doubt


async def test_what_a_dropped_connection_ends_has_no_reason_of_its_own() -> None:
    """Who was under way on it tells nothing new of the server; ten seconds later it does."""
    server = FakeServer()
    server.error = None
    breaker = Breaker(server.probe, server.drop)
    for failure in (Failure.READONLY, *[Failure.CONNECTION] * 4):
        breaker.failed(failure)
    await until(lambda: breaker.state == "half_open")
    breaker.failed(Failure.CONNECTION)
    assert ("open", Failure.READONLY) == (state_of(breaker), breaker.reason)
    await until(lambda: breaker.state == "half_open")
    breaker._dropped_at -= 10
    breaker.failed(Failure.CONNECTION)
    assert ("open", Failure.CONNECTION) == (state_of(breaker), breaker.reason)
    await breaker.aclose()


async def test_vectors_count_only_when_a_probe_fails_too() -> None:
    """A large reply may be slow on a server that is well."""
    server = FakeServer()
    server.error = None
    breaker = Breaker(server.probe, server.drop)
    for _ in range(30):
        breaker.failed(Failure.TIMEOUT, vectors=True)
    await until(lambda: server.probes == 1)
    await asyncio.sleep(0)
    assert "closed" == state_of(breaker)
    server.error = ConnectionError()
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT, vectors=True)
    await until(lambda: breaker.state == "open")
    assert Failure.CONNECTION is breaker.reason
    await breaker.aclose()


async def test_a_loop_that_is_held_up_fails_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody had the time to read is no fault of the server's."""
    monkeypatch.setattr(module, "PROBE_WITHIN", 0.05)
    answered = 0

    async def takes_turns() -> None:
        nonlocal answered
        for _ in range(12):
            time.sleep(0.005)  # noqa: ASYNC251 - the loop is held up by somebody
            await asyncio.sleep(0)
        answered += 1

    breaker = Breaker(takes_turns, FakeServer().drop)
    for _ in range(10):
        breaker.failed(Failure.TIMEOUT, vectors=True)
    await until(lambda: answered == 1)
    await asyncio.sleep(0.01)
    assert ("closed", 0) == (breaker.state, breaker._failures)
    await breaker.aclose()


async def test_a_probe_learns_a_new_reason() -> None:
    """A restarted server with another password: the reason is told as it is now."""
    server = FakeServer()
    server.error = AuthenticationError()
    breaker = await opened(server)
    await until(lambda: breaker.reason is Failure.AUTH)
    await breaker.aclose()


async def test_a_hung_probe_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own limit, so that the next is made."""
    monkeypatch.setattr(module, "PROBE_WITHIN", 0.01)
    count = 0

    async def hangs() -> None:
        nonlocal count
        count += 1
        await asyncio.sleep(10)

    breaker = Breaker(hangs, FakeServer().drop)
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT)
    await until(lambda: count >= 3)
    assert "open" == state_of(breaker)
    await breaker.aclose()


async def test_a_probe_over_a_long_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer than its limit counts when it is answered,
    and few are under way at once meanwhile.
    """
    monkeypatch.setattr(module, "PROBE_WITHIN", 0.01)
    under_way, most = 0, 0

    async def far() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0.2)
        finally:
            under_way -= 1

    breaker = Breaker(far, FakeServer().drop)
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT)
    await until(lambda: breaker.state == "half_open")
    assert [1, 2] == [breaker.good_probes, most]
    await breaker.aclose()
    assert 0 == under_way


async def test_a_probe_that_hangs_keeps_no_sign_of_life_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of an earlier one counts at once,
    whatever becomes of the latest, which takes its time to end.
    """
    monkeypatch.setattr(module, "PROBE_WITHIN", 0.01)
    count = 0
    ending = asyncio.Event()

    async def probe() -> None:
        nonlocal count
        count += 1
        if count == 1:
            await asyncio.sleep(0.05)
            return
        try:
            await asyncio.sleep(10)
        finally:
            await ending.wait()

    breaker = Breaker(probe, FakeServer().drop)
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT)
    await until(lambda: breaker.state == "half_open")
    assert count > 1
    ending.set()
    await breaker.aclose()


async def test_an_answer_that_comes_late_is_not_waited_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts when it is there, not when the next probe is due."""
    monkeypatch.setattr(module, "PROBE_WITHIN", 0.01)

    async def slow() -> None:
        monkeypatch.setattr(module, "PROBE_EVERY", 60)
        await asyncio.sleep(0.05)

    breaker = Breaker(slow, FakeServer().drop)
    for _ in range(5):
        breaker.failed(Failure.TIMEOUT)
    await until(lambda: breaker.state == "half_open")
    await breaker.aclose()


async def test_closing_ends_the_probe() -> None:
    """Nothing outlives `aclose`."""
    server = FakeServer()
    breaker = await opened(server)
    await breaker.aclose()
    probes = server.probes
    await asyncio.sleep(0.05)
    assert probes == server.probes
    assert {asyncio.current_task()} == {t for t in asyncio.all_tasks() if "Breaker" in repr(t)} | {
        asyncio.current_task()
    }


async def test_log_has_one_line_per_transition(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost once, back once, however many commands fail; odd replies are rate limited."""
    monkeypatch.setattr(module, "_SETTLED", 0.0)
    caplog.set_level(logging.INFO)
    server = FakeServer()
    server.error = None
    breaker = await opened(server)
    for _ in range(100):
        breaker.failed(Failure.CONNECTION)
        breaker.failed(Failure.REPLY)
    await until(lambda: breaker.state == "half_open")
    breaker.admits()
    for _ in range(10):
        breaker.worked()
    expected = ["redis_asgi.redis_unavailable", "redis_asgi.command_failed", "redis_asgi.redis_back"]
    assert expected == [event_of(record) for record in caplog.records]
    await breaker.aclose()


def test_it_ends_with_its_loop() -> None:
    """An open breaker in a loop that ends leaves no pending task and no warning."""

    async def story() -> Callable[[], Awaitable[None]]:
        breaker = await opened(FakeServer())
        return breaker.aclose

    asyncio.run(story())
