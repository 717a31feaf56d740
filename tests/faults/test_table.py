"""Each row of the table: what users, operators and Redis see before, during and after."""

import json
import re

from .asking import Answer, assert_right
from .service import MODES
from .story import CREDENTIAL, Phase, Told, statuses
from .table import ROWS, SECRET

QUOTA = 5
DOWN = "redis-asgi; fwd=bypass; detail=redis-down"


def assert_well(phase: Phase) -> None:
    """Every mode held the limit on Redis, stored vectors were found, and every page said so."""
    for mode in MODES:
        assert {200: QUOTA, 429: 3} == statuses(phase.limited[mode]), mode
        assert {"redis"} == {answer.headers["x-source"] for answer in phase.limited[mode] if answer.status == 200}
    assert "hit" in phase.embeddings[-1][1].headers["cache-status"]
    assert {200} == {answer.status for answer in phase.pages.values()}
    assert ("healthy", None) == (phase.pages["/health/"].json["status"], phase.pages["/health/"].json["error"])


def test_all_was_well(told: Told) -> None:
    """Before: the limits hold, vectors are found, pages are healthy; or the app has booted without."""
    if not told.row.from_start:
        assert_well(told.before)


def test_nobody_waits_longer_than_the_deadline(told: Told) -> None:
    """A request is late by no more than a timer beside it was,
    and the work that the same burst took when well.
    """
    work = told.before.slowest if not told.row.from_start else told.during.pages["/metrics/"].seconds
    slack = 3 * (told.during.worst + work)

    # What can be known is not waited for.
    most = told.row.deadline if told.row.is_waited_for else told.row.deadline / 2
    assert told.during.slowest < most + slack
    assert told.during.pages["/health/live"].seconds < slack
    assert all(answer.seconds < 0.5 + 0.1 + slack for answer in told.during.pages.values())


def test_breaker_spares_everybody_the_wait(told: Told) -> None:
    """It stands where the row says; open, a request of any mode has nothing at all to wait for."""
    assert told.row.breaker == told.breaker
    assert 0 == told.waited
    # Of a cache that waits only until Redis is known to be ill, this one came later.
    assert (told.later.embeddings[0][1].headers["cache-status"] == DOWN) == (told.row.cache == "aside")


def test_local_holds_the_limit(told: Told) -> None:
    """The quota is admitted and not one more, and nobody is told of trouble."""
    answers = told.during.limited["local"]

    assert {200: QUOTA, 429: len(answers) - QUOTA} == statuses(answers)
    source = "local" if told.row.reason else "redis"
    assert {source} == {answer.headers["x-source"] for answer in answers if answer.status == 200}
    assert all("ratelimit" in answer.headers for answer in answers)
    assert all(int(answer.headers["retry-after"]) > 1 for answer in answers if answer.status == 429)


def test_open_admits_without_fields(told: Told) -> None:
    """Everything is admitted, and no field claims to know anything."""
    answers = told.during.limited["open"]
    if told.row.reason is None:
        assert {200: QUOTA, 429: len(answers) - QUOTA} == statuses(answers)
    else:
        assert {200: len(answers)} == statuses(answers)
        assert not any("ratelimit" in answer.headers for answer in answers)


def test_closed_refuses_with_503(told: Told) -> None:
    """Nobody is told to be over quota: 503, and to come again in a second."""
    answers = told.during.limited["closed"]
    if told.row.reason is None:
        assert {200: QUOTA, 429: len(answers) - QUOTA} == statuses(answers)
    else:
        assert {503: len(answers)} == statuses(answers)
        assert {("1", "no-store")} == {(a.headers["retry-after"], a.headers["cache-control"]) for a in answers}
        assert not any("ratelimit" in answer.headers for answer in answers)
        assert answers[0].json["type"].endswith("#temporary-reduced-capacity")


def test_vectors_are_right(told: Told) -> None:
    """Whatever Redis says, an embedding request is a 200 with its own vectors, and says what the
    cache did.
    """
    phases = (told.before, told.during, told.later, told.after)
    for texts, answer in [embedded for phase in phases for embedded in phase.embeddings]:
        assert 200 == answer.status
        assert_right(answer.body, CREDENTIAL, texts)
    said = {answer.headers["cache-status"] for _, answer in told.during.embeddings}

    assert all(status.startswith("redis-asgi; ") for status in said)
    if told.row.cache != "aside":
        assert DOWN not in said
    elif not told.row.pings and told.row.health != "redis_readonly":
        assert {DOWN} == said  # else Redis reads as ever until the breaker is open
    if told.row.cache == "reads":
        assert "stored" not in told.during.embeddings[-1][1].headers["cache-status"]


def test_health_names_the_reason(told: Told) -> None:
    """One code on every page; 503 where a limit fails closed,
    200 where none needs Redis, and always alive.
    """
    code, pages = told.row.health, told.during.pages
    required = (200, "healthy", None) if code is None else (503, "unhealthy", code)
    optional = (200, "healthy", None) if code is None else (200, "degraded", code)

    assert [required, required, optional] == [
        (pages[path].status, pages[path].json["status"], pages[path].json["error"])
        for path in ("/health/", "/health/ready", "/optional/ready")
    ]
    asked = None if told.row.pings else code
    assert asked == told.checked["error"]
    assert (asked is None) == (told.checked["status"] == "healthy")
    assert (200, {"status": "alive"}) == (pages["/health/live"].status, pages["/health/live"].json)


def test_operators_pages_answer(told: Told) -> None:
    """Metrics, their JSON and the status page are 200;
    the page names the code and the JSON the breaker.
    """
    pages = told.during.pages

    assert {200} == {pages[path].status for path in ("/metrics/", "/metrics/json", "/status/")}
    assert pages["/metrics/json"].json["middleware"]["breaker"] in ("closed", "half_open", "open")
    assert (told.row.health or "Healthy") in pages["/status/"].body.decode()
    assert (pages["/health/"].json["latency_ms"] is not None) == (told.metrics["redis_asgi_redis_up"][()] == 1)


def test_counters_add_up(told: Told) -> None:
    """Each request is counted once, as what its client saw;
    each that Redis did not decide, with mode and reason.
    """
    seen = {(mode, answer.status) for mode in MODES for answer in told.during.limited[mode]}
    counted = told.metrics["redis_asgi_ratelimit_requests_total"]
    asked = told.before.limited, told.during.limited
    answers = [answer for phase in asked for of_mode in phase.values() for answer in of_mode]
    by_status = statuses(answers)
    fallbacks = told.metrics.get("redis_asgi_ratelimit_fallback_total", {})
    reasons = {reason for _, reason in fallbacks}

    assert seen
    for outcome, status in (("allowed", 200), ("refused", 429), ("unavailable", 503)):
        assert by_status.get(status, 0) == sum(value for labels, value in counted.items() if labels[0] == outcome)
    for mode in MODES:
        expected = len(told.during.limited[mode]) if told.row.reason else 0
        assert expected == sum(value for labels, value in fallbacks.items() if labels[0] == mode)
    if told.row.reason:
        assert told.row.reason in reasons
        assert reasons <= {told.row.reason, *told.row.also}
        assert (told.row.breaker == "open") <= (told.transitions("open") > 0)
    else:
        assert not reasons


def test_log_has_one_line_per_transition(told: Told) -> None:
    """Lost with its reason, back when it is back, and nothing else, however many asked."""
    events = told.row.log if told.row.heal is not None else tuple(e for e in told.row.log if e != "redis_back")

    assert list(events) == [event for event, _ in told.log]
    assert {reason for event, reason in told.log if event in ("redis_unavailable", "command_failed")} <= {
        told.row.reason,
        *told.row.also,
    }
    assert [] == told.others


def test_nothing_is_charged_twice(told: Told) -> None:
    """What reached Redis of a request decided without it is counted there once at most."""
    for mode, charged in told.charged.items():
        assert charged <= min(QUOTA, len(told.during.limited[mode]))


def test_redis_is_used_again(told: Told) -> None:
    """Sooner than half a second and a PING after the cure; then all is as before, in full."""
    if told.row.heal is not None:
        assert told.is_in_time, told.recovered
        assert_well(told.after)


def test_no_secret_is_told(told: Told) -> None:
    """Neither the password nor an address of Redis is in any answer,
    and the password in no log record.
    """
    phases = (told.before, told.during, told.after)
    answers: list[Answer] = [answer for phase in phases for answer in phase.pages.values()]
    told_to_clients = " ".join(answer.body.decode() for answer in answers)

    assert SECRET not in told_to_clients + json.dumps(told.records)
    assert "127.0.0.1" not in told_to_clients
    for path in ("/health/", "/health/ready", "/optional/ready"):
        body = told.during.pages[path].body.decode()
        assert re.search(r":\d{4,5}|localhost|Error|Exception|\(", body) is None, body


def test_every_row_is_told() -> None:
    """The table names what the design does."""
    assert len(ROWS) > 35
