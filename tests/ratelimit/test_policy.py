"""The nouns: policies, partitions, charges, and how they are named in Redis."""

import pytest

from redis_asgi.ratelimit.limits.charge import Charge
from redis_asgi.ratelimit.limits.policy import STRATEGIES, Policy, PolicySet, bulk, log_key, make_partition
from redis_asgi.ratelimit.limits.reply import charged_receipts
from redis_asgi.ratelimit.limits.strategies import COUNTERS
from redis_asgi.settings import StrategyName

from .histories import policy

EVERY = tuple(policy(strategy, 5, 60, name="api") for strategy in STRATEGIES)


def test_every_strategy_has_a_twin() -> None:
    """What can be asked for can be counted in this process too."""
    assert {*STRATEGIES, "concurrency"} == set(COUNTERS)


@pytest.mark.parametrize(
    ("strategy", "field"),
    [
        ("fixed-window", b"api:f60:1"),
        ("sliding-window-counter", b"api:s60:1"),
        ("moving-window", b"api:m60:1"),
        ("gcra", b"api:g60:1"),
    ],
)
def test_field_names_policy_strategy_window_and_layout(strategy: StrategyName, field: bytes) -> None:
    """What counts differently never reads the other's numbers."""
    assert field == Policy("api", 5, 60, strategy).field


def test_quota_is_not_in_the_field() -> None:
    """A changed quota keeps the count."""
    assert policy("gcra", 5).field == policy("gcra", 50).field


def test_equal_policies_are_equal() -> None:
    """They may be keys of a dictionary."""
    one, same = policy("gcra"), policy("gcra")

    assert (one, hash(one)) == (same, hash(same))
    assert 1 == len({one, same})
    assert one != policy("gcra", shadow=True)


def test_set_tells_the_script_about_each_policy() -> None:
    """One line each: letter, quota, window in microseconds, shadow, field."""
    made = PolicySet((policy("fixed-window", 5, 60, name="a"), policy("moving-window", 7, 1, name="b", shadow=True)))

    assert b"f 5 60000000 0 a:f60:1\nm 7 1000000 1 b:m1:1" == made.spec
    assert bulk(made.spec) == made.resp
    assert (b"b:m1:1",) == made.logs
    assert (2, ["a", "b"]) == (len(made), [p.name for p in made])


def test_address_stands_in_its_key() -> None:
    """Plain, so that an operator finds it."""
    made = make_partition("ip", "203.0.113.7", plain=True)

    assert (b"rate_limit:{203.0.113.7}", "203.0.113.7") == (made.key, made.label)


def test_anything_else_is_hashed() -> None:
    """22 base64url characters in the key;
    the label is kind and 8 hex digits; neither holds the value.
    """
    made = make_partition("header:x-api-key", "hunter2", prefix="shop:")
    tag = made.key.removeprefix(b"shop:rate_limit:{").removesuffix(b"}")
    kind, _, digits = made.label.rpartition(":")

    assert 22 == len(tag)
    assert tag.replace(b"-", b"").replace(b"_", b"").isalnum()
    assert ("header:x-api-key", 8) == (kind, len(digits))
    assert int(digits, 16) >= 0
    assert "hunter2" not in f"{made!r}{made.key!r}{made.label}"


def test_secret_hides_addresses() -> None:
    """With a secret no key can be guessed, and another secret gives other keys."""
    keys = [make_partition("ip", "203.0.113.7", plain=True, secret=secret).key for secret in (None, "a", "b")]

    assert 3 == len(set(keys))
    assert b"203.0.113.7" not in keys[1] + keys[2]


def test_kind_is_part_of_who_it_is() -> None:
    """An API key that looks like an address, a user called like a key: all strangers to each other."""
    value = "203.0.113.7"
    made = [make_partition(kind, value) for kind in ("ip", "user", "custom", "header:x-api-key", "header:x-other")]
    made.append(make_partition("ip", value, plain=True))

    assert 6 == len({partition.key for partition in made})


@pytest.mark.parametrize("value", ["{", "}", "{}", "a}b{c", ":", "", "\0", "\ud800"])
def test_value_cannot_leave_its_slot_or_forge_a_key(value: str) -> None:
    """There is one pair of braces in a key, and it is ours."""
    key = make_partition("custom", value).key

    assert (1, 1, 1) == (key.count(b"{"), key.count(b"}"), key.count(b":"))


def test_log_stands_beside_its_hash() -> None:
    """In the same slot: the tag is the partition's."""
    partition = make_partition("ip", "203.0.113.7", plain=True)

    assert b"rate_limit:{203.0.113.7}:api:m60:1" == log_key(partition.key, EVERY[2].field)


def test_charge_costs_one_and_fails_over_to_this_process() -> None:
    """The defaults of a rule."""
    made = Charge(PolicySet(EVERY), make_partition("custom", "a"))

    assert (1, "local", None) == (made.cost, made.on_redis_error, made.count_if)


def test_receipts_are_of_what_was_charged() -> None:
    """A shadow that would have refused was not charged, and has none."""
    assert [11, -1, 33] == charged_receipts([1, 1, 0, 0, 0, 11, 0, 0, 0, 0, 22, 1, 0, 0, 0, 33])
