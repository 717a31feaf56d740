"""A client's quota as an operator looks at it: what is stored of it, what is left,
when it is back; and resetting it.

Reads with the commands that the limiter itself needs, and decides with its script,
so that an app's own user will do.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import orjson

from ..asgi.scope import Addressing, parse_address
from ..connection.manager import RedisManager
from ..errors import ConfigurationError, Failure
from ..maintenance import MaintenanceError
from ..ratelimit.counting.reset import reset_in_redis
from ..ratelimit.limits.charge import Charge, Charges
from ..ratelimit.limits.counter import Mode
from ..ratelimit.limits.decision import PolicyState, read_reply
from ..ratelimit.limits.policy import Partition, Policy, PolicySet, Strategy, make_partition
from ..ratelimit.rules.checks import check_name
from ..ratelimit.rules.joined import joined
from ..ratelimit.rules.partition import UNKNOWN, Partitioner, by_header, client_ip
from ..ratelimit.rules.policies import MOVING_WINDOW_MAX, make_policies
from ..ratelimit.rules.rule import DEFAULT_NAME
from ..ratelimit.transport.check import HoldingCheck, Outcome
from ..ratelimit.transport.cluster_batcher import make_batcher
from ..settings import Settings, StrategyName

_STRATEGIES: dict[str, Strategy] = {
    "c": "concurrency",
    "f": "fixed-window",
    "s": "sliding-window-counter",
    "m": "moving-window",
    "g": "gcra",
}
# A rule's name, with its window where the rule has several limits; what else is there is not ours.
_FIELD = re.compile(rb"([A-Za-z0-9_.-]{1,60}):(?:([fsmg])([1-9]\d{0,8})|(c)0):1")
# Stand-ins where the quota is in the app's code only: what is used is what is missing from them.
_ANY_QUOTA = 10**9


class QuotaError(MaintenanceError):
    """Redis did not tell, or did not reset, a client's quota."""

    def __init__(self, what: str, failure: Failure) -> None:
        super().__init__(f"Redis did not {what} ({failure.value}). `redis-asgi check` says more.", failure)


@dataclass(frozen=True, slots=True)
class QuotaRow:
    """One policy as one client stands to it.

    Attributes:
        policy: Its name.
        strategy: How it is counted.
        window: Seconds; 0 of requests in flight.
        quota: Units per window, or requests in flight; ``None`` when nothing here says.
        used: Units that count now, or requests in flight; of a ``gcra`` policy of unknown quota
            those that did at the last request.
        remaining: The largest cost admitted now; ``None`` when the quota is unknown.
        retry_after: Seconds until a request of one unit is admitted: 0.0 = now;
            ``None`` when the quota is unknown.
        reset: Seconds until the full quota is back: 0.0 = it is; ``None`` for ``gcra`` of unknown
            quota, and while requests are in flight.
        stored: Whether Redis has a counter of it.
    """

    policy: str
    strategy: str
    window: int
    quota: int | None
    used: int
    remaining: int | None
    retry_after: float | None
    reset: float | None
    stored: bool


async def partition_of(client: str, by: str | None, settings: Settings) -> Partition:
    """The partition that a middleware of these settings puts *client* into.

    Args:
        client: An address or network, a header's value, a user's identity, a bucket of `by_json` or
            `by_mcp_tool`, or what ``partition_by`` returns or a `RateLimiter` is called with; of
            several a list in JSON.
        by: ``ip``, ``header:NAME``, ``user``, ``json:NAME``, ``mcp_tool`` or ``custom``, or several
            with a comma between them; ``None`` = ``RATE_LIMIT_PARTITION``.

    Raises:
        ConfigurationError: For another *by*,
            or a *client* that is no address where one is asked for.
    """
    by = settings.RATE_LIMIT_PARTITION if by is None else by
    if "," in by:
        kinds = by.split(",")
        parts = [
            await partition_of(each, kind, settings) for each, kind in zip(_listed(client, by), kinds, strict=True)
        ]
        by = ",".join(part.kind for part in parts)
        value = joined(part.value for part in parts)
        return make_partition(by, value, prefix=settings.REDIS_KEY_PREFIX, secret=settings.key_secret)
    kind, _, name = by.partition(":")
    if by == "ip":
        return await _partition_of_address(client, settings)
    if kind == "header" and name:
        header = by_header(name)
        by = f"header:{header.name}"
        # As it comes in a field: bytes as Latin-1.
        client = header.fold(os.fsencode(client).decode("latin-1"))
    elif by not in ("user", "custom", "mcp_tool") and not (kind == "json" and name):
        raise ConfigurationError(
            f"--by={by!r} is not ip, header:NAME, user, json:NAME, mcp_tool or custom. Try --by header:x-api-key."
        )
    return make_partition(by, client, prefix=settings.REDIS_KEY_PREFIX, secret=settings.key_secret)


def _listed(client: str, by: str) -> list[str]:
    try:
        names = orjson.loads(client)
    except orjson.JSONDecodeError:
        names = None
    if not isinstance(names, list) or len(names) != by.count(",") + 1 or not all(isinstance(n, str) for n in names):
        # Not shown: it may be a credential.
        example = "[" + ", ".join('"..."' for _ in by.split(",")) + "]"
        raise ConfigurationError(f"CLIENT is no list in JSON of as many texts as --by={by} has parts. Try '{example}'.")
    return names


async def _partition_of_address(client: str, settings: Settings) -> Partition:
    text = client.strip()
    if text != UNKNOWN:
        # A label of ours, such as 2001:db8::/64, is an address too.
        address = parse_address(text.partition("/")[0])
        if address is None or ("/" in text and not _is_network(text)):
            # Not shown: it may be a credential, looked up in the wrong place.
            raise ConfigurationError("CLIENT is not an address. Try --by header:NAME, --by user or --by custom.")
        text = str(address)
    partitioner = Partitioner(client_ip, settings, Addressing(settings))
    return partitioner.of_address(Addressing(settings).client({"client": (text, 0), "headers": []}))


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def known_policies(
    name: str | None, limits: str | None, strategy: StrategyName | None, settings: Settings
) -> PolicySet:
    """The policies of the rule *name* under *limits*; what is ``None`` comes from the settings.

    Raises:
        ConfigurationError: For what no rule can be.
    """
    return make_policies(
        check_name(name or DEFAULT_NAME),
        limits or settings.default_limits,
        strategy or settings.RATE_LIMIT_STRATEGY,
    )


async def ask(
    manager: RedisManager, mode: Mode, charges: Charges, within: float, holders: Sequence[bytes] = ()
) -> Outcome:
    """Put *charges* to the script, as a limiter does, and wait *within* seconds;
    the numbers, or why there are none.
    """
    batcher = manager.per_client(make_batcher)
    check = HoldingCheck(batcher.loop, mode, charges, within, holders=holders)
    batcher.submit(check)
    return cast("Outcome", await check.future)


async def look(
    manager: RedisManager, partition: Partition, known: Sequence[Policy], *, name: str | None = None
) -> list[QuotaRow]:
    """A client's quotas: every stored policy (of the rule *name*),
    then the *known* ones it has not used.

    Charges and writes nothing.

    Raises:
        QuotaError: When the script gives no answer.
        redis.exceptions.RedisError: When Redis does not.
    """
    client = await manager.get_connection()
    stored = [_bytes(field) for field in await client.execute_command("HKEYS", partition.key)]
    by_field = {policy.field: policy for policy in known}
    policies: list[Policy] = []
    for field in sorted(stored):
        policy = by_field.get(field) or _stand_in(field)
        if policy is not None and (name is None or field in by_field or _belongs(policy, name)):
            policies.append(policy)
    policies += [policy for policy in known if policy.field not in stored]
    if not policies:
        return []
    charges = Charges((Charge(PolicySet(tuple(policies)), partition),))
    reply = await ask(manager, "peek", charges, manager.settings.REDIS_TIMEOUT)
    if isinstance(reply, Failure):
        raise QuotaError("answer", reply)
    states = read_reply(charges, reply, "redis").policies
    standings = []
    for policy, state in zip(policies, states, strict=True):
        if policy.field in by_field:
            standings.append(_known(state, stored=policy.field in stored))
        elif policy.strategy == "gcra":
            # It drains at a speed that only the quota gives.
            raw = await client.execute_command("HGET", partition.key, policy.field)
            standings.append(_unknown(state, used=_owed(raw), reset=None))
        else:
            standings.append(_unknown(state, used=policy.quota - state.remaining, reset=_full_again(state)))
    return standings


async def reset(manager: RedisManager, partition: Partition, *, name: str | None = None) -> bool:
    """Give a client its full quota back,
    under one rule's *name* or under all; whether anything was counted.

    Other processes may refuse it from memory for up to a second more.

    Raises:
        ConfigurationError: If *name* is no rule's name.
        redis.exceptions.RedisError: When Redis does not take it.
    """
    if name is not None:
        check_name(name)
    return await reset_in_redis(manager, partition, name)


def _bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _stand_in(field: bytes) -> Policy | None:
    """The policy that a stored field belongs to,
    with a quota that nothing reaches; ``None`` for another layout.
    """
    match = _FIELD.fullmatch(field)
    if match is None:
        return None
    strategy = _STRATEGIES[(match[2] or match[4]).decode()]
    quota = MOVING_WINDOW_MAX * 10 if strategy == "moving-window" else _ANY_QUOTA
    return Policy(match[1].decode(), quota, int(match[3] or 0), strategy)


def _belongs(policy: Policy, name: str) -> bool:
    return policy.name in (name, f"{name}-{policy.window}s")


def _known(state: PolicyState, *, stored: bool) -> QuotaRow:
    used = state.quota - state.remaining
    return QuotaRow(
        state.name,
        state.strategy,
        state.window,
        state.quota,
        used,
        state.remaining,
        state.retry_after,
        _full_again(state),
        stored,
    )


def _full_again(state: PolicyState) -> float | None:
    """The end of requests in flight is not known."""
    return None if state.reset and state.strategy == "concurrency" else state.reset


def _unknown(state: PolicyState, *, used: int, reset: float | None) -> QuotaRow:
    return QuotaRow(state.name, state.strategy, state.window, None, used, None, None, reset, stored=True)


def _owed(raw: bytes | str | None) -> int:
    parts = _bytes(raw or b"").split()
    return -int(-float(parts[1]) // 1) if len(parts) == 3 else 0
