"""The scripts on a real server: the twin's decisions,
number for number, and what they leave in Redis.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from redis.exceptions import NoScriptError, ResponseError

from redis_asgi.errors import Failure, classify_reply
from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.charge import Charge, Charges, Unread
from redis_asgi.ratelimit.limits.counter import Mode
from redis_asgi.ratelimit.limits.policy import LEASE, MICROSECONDS, STRATEGIES, Policy, PolicySet, log_key
from redis_asgi.ratelimit.limits.reply import Reply, charged_receipts, numbers_of
from redis_asgi.ratelimit.transport.check import Check, HoldingCheck
from redis_asgi.ratelimit.transport.script import SCRIPT, SCRIPT_SHA, Call

from ..conftest import StartServer
from ..kit.servers import ExternalServer
from .histories import EPOCH, Keeping, charge, client, costs, deltas_and_back, numbers, policy

pytestmark = pytest.mark.server
_fresh = count()
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
# How much longer (ms) than it counts a key stays:
# on Redis's own clock, and on one that a test holds.
SLACK, HELD_SLACK = 1000, 600_000


class Script:
    """The script, called over one connection with a clock in hand."""

    def __init__(self, server: redis.Redis) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._connection = server.connection_pool.get_connection()
        self.server.script_load(SCRIPT.decode())

    def close(self) -> None:
        self.server.connection_pool.release(self._connection)
        self._loop.close()

    def check(
        self, mode: Mode, charges: Sequence[Charge], receipts: Sequence[int] = (), holders: Sequence[bytes] = ()
    ) -> Check:
        """One request's question."""
        return check_of(self._loop, mode, charges, receipts, holders)

    def run(self, trace: Sequence[tuple[int, Check]]) -> list[Any]:
        """The replies to checks at their times, in one trip."""
        calls = [Call([check], number, now) for number, (now, check) in enumerate(trace)]
        self._connection.send_packed_command([call.command() for call in calls])
        replies = [cast("list[Any]", self._connection.read_response()) for _ in trace]
        assert [call.number for call in calls] == [reply[0] for reply in replies]
        return [reply[1] for reply in replies]

    def decide(
        self,
        mode: Mode,
        charges: Sequence[Charge],
        *,
        receipts: Sequence[int] = (),
        holders: Sequence[bytes] = (),
        now: int | None = None,
    ) -> Reply:
        """One reply, as `LocalEngine.decide` gives it."""
        check = self.check(mode, charges, receipts, holders)
        self._connection.send_packed_command([Call([check], 17, now).command()])
        return cast(Reply, cast("list[Any]", self._connection.read_response())[1])


def check_of(
    loop: asyncio.AbstractEventLoop,
    mode: Mode,
    charges: Sequence[Charge],
    receipts: Sequence[int] = (),
    holders: Sequence[bytes] = (),
) -> Check:
    """A question, about requests in flight where it has *holders*."""
    return HoldingCheck(loop, mode, Charges(charges), 1.0, tuple(receipts), holders=holders)


@pytest.fixture
def script(redis_client: redis.Redis) -> Iterator[Script]:
    """The script on the shared server."""
    made = Script(redis_client)
    yield made
    made.close()


@dataclass
class Step:
    """One request of a trace, and what the twin says of it."""

    now: int
    mode: Mode
    charges: tuple[Charge, ...]
    receipts: list[int]
    holders: tuple[bytes, ...] = ()
    expected: Reply = field(default_factory=list)

    def __str__(self) -> str:
        costs = [(charge.cost, [str(p) for p in charge.policies]) for charge in self.charges]
        return f"{self.mode} at {self.now} of {costs}, receipts {self.receipts}, holders {self.holders!r}"


policies = st.builds(
    policy,
    st.sampled_from(STRATEGIES),
    st.sampled_from([0, 1, 2, 3, 7, 10, 100]),
    st.sampled_from([1, 2, 10, 60, 3600]),
    shadow=st.sampled_from([False, False, False, True]),
)
vast = st.builds(
    policy,
    st.sampled_from(["fixed-window", "sliding-window-counter", "gcra"]),
    st.sampled_from([10**6, 10**9 - 1, 10**9]),
    st.sampled_from([1, 60, 366 * 86_400]),
)


@st.composite
def traces(draw: st.DrawFn) -> list[Step]:
    """Requests under one to three rules of one or two partitions, with the twin's answers."""
    drawn = draw(st.lists(st.one_of(policies, policies, policies, vast), min_size=1, max_size=4))
    named = [Policy(f"p{i}", p.quota, p.window, p.strategy, p.shadow) for i, p in enumerate(drawn)]
    cut = draw(st.integers(0, len(named)))
    who = [f"trace-{next(_fresh)}"]
    who.append(draw(st.sampled_from([who[0], who[0] + "-other"])))
    rules = [
        (PolicySet(tuple(group)), client(name))
        for group, name in zip((named[:cut], named[cut:]), who, strict=True)
        if group
    ]
    in_flight = [
        Charge(PolicySet((Policy(f"c{i}", quota, 0, "concurrency", shadow),)), client(who[i % 2]))
        for i, (quota, shadow) in enumerate(
            draw(st.lists(st.tuples(st.sampled_from([0, 1, 2, 4]), st.sampled_from([False, False, True])), max_size=2))
        )
    ]
    now = EPOCH + draw(st.integers(0, 3_600_000_000))
    twin = Keeping(lease=LEASE * MICROSECONDS)
    ids = count()
    admitted: list[tuple[tuple[Charge, ...], list[int], tuple[bytes, ...]]] = []
    steps: list[Step] = []
    # A window after a request, to the microsecond, is where two implementations part.
    edges = [(p.window or LEASE) * MICROSECONDS + offset for p in (*named, *_IN_FLIGHT) for offset in (-1, 0, 1)]
    steps_of_time = st.one_of(deltas_and_back, st.sampled_from(edges), st.just(0))
    for _ in range(draw(st.sampled_from([5, 15, 30]))):
        now += draw(steps_of_time)
        mode: Mode = draw(st.sampled_from(_MODES))
        receipts: list[int] = []
        holders: tuple[bytes, ...] = (b"id%d" % next(ids),)
        if mode == "refund" and admitted:
            charges, receipts, holders = admitted.pop(draw(st.integers(0, len(admitted) - 1)))
        else:
            if mode == "charge" and admitted:
                # A renewal, of one or of all.
                holders = draw(st.sampled_from([admitted[-1][2], tuple(h for *_, each in admitted for h in each)]))
            mode = "consume" if mode == "refund" else mode
            charges = tuple(
                Charge(group, partition, draw(costs(min(p.quota for p in group)))) for group, partition in rules
            )
            if mode != "charge" and draw(st.sampled_from([False, False, False, True])):
                charges = (*charges[:-1], replace(charges[-1], cost=1, unread=Unread()))
            charges += tuple(in_flight)
        step = Step(now, mode, charges, receipts, holders)
        step.expected = twin.decide(mode, charges, receipts=receipts, holders=holders, now=now)
        if mode == "consume" and step.expected[0]:
            admitted.append((as_taken(charges, step.expected), charged_receipts(step.expected), holders))
            if draw(st.sampled_from([False, False, True])):
                admitted.append(
                    admitted[-1]
                )  # given back twice, which is once too often for a rate, and nothing for an id
        steps.append(step)
    return steps


def as_taken(charges: Sequence[Charge], reply: Reply) -> tuple[Charge, ...]:
    """*charges* at what they were charged: what remained, where that is what they asked."""
    said = iter(numbers_of(reply))
    taken = [max(charge.taken(next(said).fits) for _ in charge.policies) for charge in charges]
    return tuple(replace(charge, cost=cost, unread=None) for charge, cost in zip(charges, taken, strict=True))


_IN_FLIGHT = (Policy("c", 1, 0, "concurrency"),)
_MODES: list[Mode] = ["consume", "consume", "consume", "consume", "peek", "charge", "refund"]
on_one_server = example_settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@on_one_server
@given(trace=traces())
def test_script_and_twin_give_the_same_numbers(script: Script, trace: list[Step]) -> None:
    """Verdict, remaining, reset, retry and receipt agree to the microsecond,
    step by step, whatever happened before.
    """
    checks = [script.check(step.mode, step.charges, step.receipts, step.holders) for step in trace]
    actual = script.run([(step.now, check) for step, check in zip(trace, checks, strict=True)])

    for step, reply in zip(trace, actual, strict=True):
        assert step.expected == reply, str(step)


@every_strategy
def test_late_refund_of_a_client_in_debt(script: Script, strategy: str) -> None:
    """Given back after its window while later charges exceed the quota:
    script and twin name the same wait.
    """
    asked = [charge(policy(strategy, 2, 1))]
    twin = LocalEngine()
    receipts = charged_receipts(twin.decide("consume", asked, now=EPOCH))
    story: list[tuple[int, Mode, list[Charge], list[int]]] = [
        (EPOCH + 300_000, "charge", asked, []),
        (EPOCH + 600_000, "charge", asked, []),
        (EPOCH + 900_000, "charge", asked, []),
        (EPOCH + 1_200_000, "refund", asked, receipts),
        (EPOCH + 1_200_000, "consume", asked, []),
        (EPOCH + 1_500_000, "consume", asked, []),
    ]
    assert receipts == charged_receipts(script.decide("consume", asked, now=EPOCH))

    for now, mode, charges, back in story:
        expected = twin.decide(mode, charges, receipts=back, now=now)
        assert expected == script.decide(mode, charges, receipts=back, now=now)


@on_one_server
@given(trace=traces())
def test_every_key_has_a_ttl_after_every_step(script: Script, trace: list[Step]) -> None:
    """Whatever was asked last, refunds and charges included, no key is there to stay."""
    for step in trace:
        script.decide(step.mode, step.charges, receipts=step.receipts, holders=step.holders, now=step.now)
        for key in _keys(step.charges):
            assert script.server.pttl(key) != -1, str(step)


def _keys(charges: Sequence[Charge]) -> set[bytes]:
    keys = {charge.partition.key for charge in charges}
    return keys | {log_key(charge.partition.key, name) for charge in charges for name in charge.policies.logs}


@example_settings(deadline=None)
@given(trace=traces(), clock=st.none() | st.integers(0, 2 * EPOCH))
def test_command_is_the_plain_one(trace: list[Step], clock: int | None) -> None:
    """The command joined from ready parts is byte for byte the one written out."""
    loop = asyncio.new_event_loop()
    try:
        checks = [check_of(loop, step.mode, step.charges, step.receipts, step.holders) for step in trace]
    finally:
        loop.close()

    call = Call(checks, 17, clock)
    words = plain_words(checks, 17, clock)
    plain = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)

    assert plain == call.command()
    assert [words[0].decode(), *words[1:]] == call.words()


def plain_words(checks: Sequence[Check], number: int, clock: int | None) -> list[bytes]:
    """A call as the script's head describes it, written out."""
    keys: list[bytes] = []
    words: list[object] = [number, "" if clock is None else clock]
    for check in checks:
        words += (check.mode, len(check.asked))
        for each in check.asked:
            keys.append(each.partition.key)
            keys += (log_key(each.partition.key, name) for name in each.policies.logs)
            words += (each.policies.spec.decode(), each.cost if each.unread is None else -1)
        words += check.receipts
        if check.asked.holds and check.mode != "peek":
            words.append(b" ".join(check.holders).decode())
    return [b"EVALSHA", SCRIPT_SHA, b"%d" % len(keys), *keys, *(str(word).encode() for word in words)]


@every_strategy
def test_refused_request_leaves_every_key_as_it_was(script: Script, strategy: str) -> None:
    """One policy refuses, and no byte of any other changes, in whatever slot or rule it is."""
    full = policy(strategy, 2, 10, name="full")
    free = [policy(other, 50, 60, name=f"free-{i}") for i, other in enumerate(STRATEGIES)]
    charges = [charge(*free), charge(full), charge(*free, who="198.51.100.9")]
    for _ in range(2):
        assert script.decide("consume", charges, now=EPOCH)[0] == 1
    before = _dump(script.server)

    assert script.decide("consume", charges, now=EPOCH + 1)[0] == 0
    assert before == _dump(script.server)


@every_strategy
def test_peek_writes_nothing(redis_server: ExternalServer, script: Script, strategy: str) -> None:
    """Looking changes no key and makes none, so it may be sent to a replica;
    expired stamps are not trimmed either.
    """
    asked = [charge(policy(strategy, 5, 1))]
    assert script.decide("peek", asked, now=EPOCH)[0] == 1
    assert _dump(script.server) == {}

    script.decide("consume", asked, now=EPOCH)
    before = _dump(script.server)
    for later in (1, 999_999, 1_000_000, 5_000_000):
        script.decide("peek", asked, now=EPOCH + later)

    assert before == _dump(script.server)


@every_strategy
def test_peek_may_be_sent_as_read_only(script: Script, strategy: str) -> None:
    """The server itself lets a look pass as one that writes nothing."""
    asked = [charge(policy(strategy, 5, 1))]
    script.decide("consume", asked, now=EPOCH)
    command = ("EVALSHA_RO", *Call([script.check("peek", asked)], 17, EPOCH).words()[1:])
    try:
        read_only = script.server.execute_command(*command)
    except ResponseError as error:
        if "unknown command" in str(error):
            pytest.skip("Redis 6.2 has no EVALSHA_RO")
        raise

    assert (1, 4) == (read_only[1][0], read_only[1][2])


def _dump(server: redis.Redis) -> dict[bytes, Any]:
    return {key: server.dump(key) for key in cast("list[bytes]", server.keys("*"))}


@every_strategy
def test_key_that_lost_its_ttl_gets_one_in_the_next_window(script: Script, strategy: str) -> None:
    """Somebody's PERSIST does not make a client's key immortal."""
    asked = [charge(policy(strategy, 5, 1))]
    script.decide("consume", asked, now=EPOCH)
    for key in _keys(asked):
        script.server.persist(key)

    script.decide("consume", asked, now=EPOCH + 1_000_000)

    assert all(HELD_SLACK < script.server.pttl(key) <= HELD_SLACK + 2000 for key in _keys(asked))


@every_strategy
def test_shorter_policy_never_shortens_the_ttl(script: Script, strategy: str) -> None:
    """A partition's one TTL is that of the policy that counts longest."""
    long = policy("fixed-window", 5, 3600, name="long")
    script.decide("consume", [charge(long)], now=EPOCH)

    script.decide("consume", [charge(policy(strategy, 5, 1, name="short"))], now=EPOCH + 1)

    assert 3_590_000 < script.server.pttl(client("203.0.113.7").key) - HELD_SLACK <= 3_600_000


@every_strategy
def test_key_expires_with_what_it_counts(script: Script, strategy: str) -> None:
    """On Redis's own clock nothing is left of a client a second after its counters say nothing any
    more.
    """
    asked = [charge(policy(strategy, 5, 10), cost=5)]
    script.decide("consume", asked)

    assert all(9_000 < script.server.pttl(key) <= 20_000 + SLACK for key in _keys(asked))


@every_strategy
def test_late_refund_makes_no_key(script: Script, strategy: str) -> None:
    """What comes back after the client's key has gone is dropped, not stored for ever."""
    asked = [charge(policy(strategy, 100, 60))]
    receipts = charged_receipts(script.decide("consume", asked, now=EPOCH))
    script.server.unlink(client("203.0.113.7").key)

    script.decide("refund", asked, receipts=receipts, now=EPOCH + 30_000_000)

    assert [] == [key for key in cast("list[bytes]", script.server.keys("*")) if script.server.pttl(key) == -1]


@pytest.mark.parametrize("right", ["pexpire", "pttl"])
@every_strategy
def test_no_key_without_ttl_when_the_acl_forbids_one(private_server: StartServer, strategy: str, right: str) -> None:
    """A user that may not PEXPIRE, or not PTTL, gets an error that says so,
    and Redis no key that would stay.
    """
    server = private_server()
    server.add_user("app", ">secret", "~*", "+@all", f"-{right}")
    looking = server.client()
    app = redis.Redis(host=server.host, port=server.port, username="app", password="secret", protocol=2)
    script = Script(app)
    try:
        text = cast(Any, script.decide("consume", [charge(policy(strategy))]))
    finally:
        script.close()
        app.close()

    assert Failure.PERMISSION is classify_reply(text.decode())
    assert [] == [key for key in cast("list[bytes]", looking.keys("*")) if looking.pttl(key) == -1]


def test_odd_key_costs_only_its_own_request_the_verdict(script: Script) -> None:
    """Within a batch a request that meets somebody else's key fails alone; its neighbours are
    decided.
    """
    odd = client("odd").key
    script.server.set(odd, "not a hash")
    checks = [script.check("consume", [charge(policy("fixed-window"), who=who)]) for who in ("a", "odd", "b")]

    call = Call(checks, 17, EPOCH)
    call.hand_out(script.server.execute_command(*call.words()))

    assert [4, "reply", 4] == [
        outcome[2] if isinstance(outcome, list) else str(outcome)
        for outcome in (check.future.result() for check in checks)
    ]


@pytest.mark.parametrize(
    ("strategy", "stored"),
    [
        pytest.param("fixed-window", "one two", id="fixed window"),
        pytest.param("sliding-window-counter", "1 2", id="sliding window counter"),
        pytest.param("moving-window", "", id="moving window"),
        pytest.param("gcra", "17 1", id="gcra"),
    ],
)
def test_field_that_is_no_counter_is_an_error(script: Script, strategy: str, stored: str) -> None:
    """What this package did not write is not guessed at."""
    asked = policy(strategy)
    script.server.hset(client("203.0.113.7").key, asked.field.decode(), stored)

    reply = script.decide("consume", [charge(asked)], now=EPOCH)

    assert b"not a counter of this package" in cast(bytes, reply)


def test_requests_of_one_batch_are_decided_in_turn(script: Script) -> None:
    """Eight requests in one call against a quota of five: the first five are admitted."""
    for strategy in STRATEGIES:
        checks = [script.check("consume", [charge(policy(strategy), who=strategy)]) for _ in range(8)]
        call = Call(checks, 17, EPOCH)
        call.hand_out(script.server.execute_command(*call.words()))

        assert [1] * 5 + [0] * 3 == [cast(Reply, check.future.result())[0] for check in checks]


def test_clock_is_the_servers_own(script: Script) -> None:
    """Without a clock in hand the script reads Redis's: no worker's clock is involved."""
    seconds, micros = script.server.time()

    (found,) = numbers(script.decide("consume", [charge(policy("fixed-window"))]))

    assert 0 <= found.receipt - (seconds * 1_000_000 + micros) < 5_000_000


def test_script_is_not_known_before_it_was_sent(redis_client: redis.Redis) -> None:
    """An EVALSHA of an unknown script runs nothing,
    which is why sending it again as EVAL counts once.
    """
    with pytest.raises(NoScriptError):
        redis_client.execute_command("EVALSHA", SCRIPT_SHA, 0, 17, "")


def test_three_limits_cost_little_memory(script: Script) -> None:
    """One hash with three fields: at most 300 bytes a client, all told."""
    limits = [policy("fixed-window", quota, window, name=f"default-{window}s") for quota, window in _THREE]
    for i in range(100):
        script.decide("consume", [charge(*limits, who=f"203.0.113.{i}")])

    keys = cast("list[bytes]", script.server.keys("*"))

    assert 100 == len(keys)
    assert max(cast(int, script.server.memory_usage(key)) for key in keys) <= 300


_THREE = [(20, 1), (1000, 3600), (10_000, 86_400)]


def test_layout_is_the_documented_one(script: Script) -> None:
    """One hash per partition, a field per policy named by policy, strategy,
    window and layout; a list only for logs.
    """
    every = [policy(strategy, 5, 60, name="all") for strategy in STRATEGIES]
    script.decide("consume", [charge(*every)], now=EPOCH)

    assert {
        b"rate_limit:{203.0.113.7}": b"hash",
        b"rate_limit:{203.0.113.7}:all:m60:1": b"list",
    } == {key: script.server.type(key) for key in cast("list[bytes]", script.server.keys("*"))}
    assert {
        b"all:f60:1": b"%d 1" % EPOCH,
        b"all:s60:1": b"%d 1 0" % EPOCH,
        b"all:m60:1": b"%d" % EPOCH,
        b"all:g60:1": b"%d 1 5" % EPOCH,
    } == script.server.hgetall("rate_limit:{203.0.113.7}")
    assert [b"%d" % EPOCH] == script.server.lrange("rate_limit:{203.0.113.7}:all:m60:1", 0, -1)


def test_one_call_trims_a_bounded_number_of_stamps(script: Script) -> None:
    """An idle client's ten thousand expired stamps go a thousand at a time,
    and count for nothing meanwhile.
    """
    asked = policy("moving-window", 10_000, 1)
    log = log_key(client("203.0.113.7").key, asked.field)
    script.decide("consume", [charge(asked, cost=10_000)], now=EPOCH)

    reply = script.decide("consume", [charge(asked)], now=EPOCH + 2_000_000)

    assert (1, 9_999) == (reply[0], reply[2])
    assert 9_000 == script.server.llen(log)


def test_changed_quota_keeps_what_was_counted(script: Script) -> None:
    """Lowering or raising a limit neither forgets the past nor breaks on it;
    what a bucket owes is scaled with it.
    """
    kept = [0, 0, 1, 16]
    for strategy in STRATEGIES:
        script.decide("consume", [charge(policy(strategy, 10), cost=4, who=strategy)], now=EPOCH)
        left = [
            script.decide("peek", [charge(policy(strategy, quota), who=strategy)], now=EPOCH)[2]
            for quota in (3, 4, 5, 20)
        ]

        assert ([1, 2, 3, 12] if strategy == "gcra" else kept) == left, strategy


@every_strategy
def test_what_remains_is_taken_whole_and_admitted_while_anything_does(script: Script, strategy: str) -> None:
    """The least that remains of a rule's enforcing policies, at least one unit;
    twin and script name what it was.
    """
    small, large = policy(strategy, 5, 60, name="small"), policy(strategy, 50, 60, name="large")
    watched = policy(strategy, 1, 60, name="watched", shadow=True)
    rule = charge(small, watched, large)
    story = [(rule, 2), (replace(rule, unread=Unread()), 1), (replace(rule, unread=Unread()), 1)]
    twin, said = LocalEngine(), []

    for asked, cost in story:
        reply = script.decide("consume", [replace(asked, cost=cost)], now=EPOCH)
        assert twin.decide("consume", [replace(asked, cost=cost)], now=EPOCH) == reply
        counters = numbers_of(reply)
        said.append((reply[0], [each.fits for each in counters], [each.remaining for each in counters]))

    # The shadow does not fit two units, then not three,
    # then not one of what remains: it has never been charged.
    assert [(1, [1, 0, 1], [3, 1, 48]), (1, [3, 0, 3], [0, 1, 45]), (0, [0, 1, 1], [0, 1, 45])] == said


@every_strategy
def test_quota_of_nothing_refuses_everything_for_good(script: Script, strategy: str) -> None:
    """Whatever was counted under another quota, and whatever it costs;
    nothing is written, nothing divided by zero.
    """
    none, some = policy(strategy, 0), policy(strategy, 5)
    script.decide("consume", [charge(some, cost=3)], now=EPOCH)
    before = _dump(script.server)
    modes: list[Mode] = ["consume", "peek", "charge", "refund"]

    for mode in modes:
        for cost in (0, 1, 5):
            receipts = [EPOCH] if mode == "refund" else []
            (found,) = numbers(script.decide(mode, [charge(none, cost=cost)], receipts=receipts, now=EPOCH))
            assert (False, 0, 0, -1) == (found.fits, found.remaining, found.reset, found.retry)

    assert before == _dump(script.server)
    assert 2 == script.decide("peek", [charge(some)], now=EPOCH)[2]
