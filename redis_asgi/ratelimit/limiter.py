"""`RateLimiter`: consume, peek and reset, for any identity and from anywhere in a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import get_args

from ..connection.redis_argument import RedisArgument, resolve_manager
from ..errors import ConfigurationError
from ..event_loop import running_loop
from ..misuse import constructor_says_what_was_meant, says_what_was_meant
from ..settings import OnRedisError, Settings, StrategyName
from .counting.engine import Engine
from .counting.in_flight import SLOTS
from .limits.charge import Charge, Charges
from .limits.counter import Mode
from .limits.decision import Decision
from .limits.policy import Partition, make_partition
from .rules.checks import check_choice, check_concurrency, check_cost, check_name
from .rules.policies import make_concurrency, make_policies, warns_of_cost, warns_of_small_quotas


@constructor_says_what_was_meant("RateLimiter(redis, strategy='gcra')")
class RateLimiter:
    """Limits by any identity you name, from anywhere in a service:
    handlers, workers, WebSocket loops.

    Most callers want `check_rate_limit`, or `consume` for its `Decision`.

    Args:
        redis: A ``RedisManager``, a URL or a ``redis.asyncio`` client;
            ``None`` = the shared default.
        strategy: How limits are counted unless a call says otherwise.
        on_redis_error: What happens when Redis does not answer: ``local`` (same limits, counted in
            this process), ``open`` (admitted) or ``closed`` (refused).
        timeout: The most a call waits for Redis, in seconds.
        settings: ``None`` = from the environment.

    Redis trouble never escapes from a method.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """

    def __init__(
        self,
        redis: RedisArgument = None,
        *,
        strategy: StrategyName = "fixed-window",
        on_redis_error: OnRedisError = "local",
        timeout: float = 0.25,
        settings: Settings | None = None,
    ) -> None:
        check_choice("strategy", strategy, get_args(StrategyName))
        check_choice("on_redis_error", on_redis_error, get_args(OnRedisError))
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= 60:
            raise ConfigurationError(f"timeout={timeout!r} is not a number of seconds up to 60. Try 0.25.")
        manager, _ = resolve_manager(redis, settings)
        self._settings = settings if settings is not None else manager.settings
        self._engine = Engine(manager, timeout=timeout, names_are_fixed=False)
        self._strategy: StrategyName = strategy
        self._on_redis_error: OnRedisError = on_redis_error
        self._has_warned = False
        self._has_warned_of_cost = False
        if on_redis_error == "closed":
            manager.fails_closed = True

    async def check_rate_limit(self, client_id: str, limit: int = 100, window: int = 60) -> bool:
        """Count one request of *client_id* against *limit* per *window* seconds; whether it is
        admitted.

        Always a fixed window, which opens at the client's first request.

        Raises:
            ConfigurationError: If *limit* or *window* is not a whole number in range.
        """
        for name, value in (("limit", limit), ("window", window)):
            if not isinstance(value, int) or isinstance(value, bool):
                example = "limit=100, window=60, or consume(client_id, '100/minute')"
                raise ConfigurationError(f"{name}={value!r} is not a whole number. Try {example}.")
        decision = await self.consume(client_id, f"{limit}/{window} seconds", strategy="fixed-window")
        return decision.allowed

    async def consume(
        self,
        client_id: str | Partition,
        limits: str = "100/minute",
        *,
        cost: int = 1,
        name: str = "default",
        strategy: StrategyName | None = None,
    ) -> Decision:
        """Charge *cost* units to *client_id* under every limit,
        or under none if one of them refuses.

        Args:
            client_id: Whom to count; any string, hashed before it reaches Redis.
            limits: Notation such as ``"20/second; 1000/hour"``.
            cost: Units, 0 or more. 0 charges nothing and is admitted;
                more than a quota is refused for good.
            name: The counters' name: equal names share, whatever the limits' quotas.
            strategy: ``None`` = the limiter's.

        Raises:
            ConfigurationError: For bad notation, name or strategy.
            ValueError: If *cost* is not a whole number, 0 or more.
            TypeError: If *client_id* is not a string.
        """
        return await self._decide("consume", client_id, limits, cost, name, strategy)

    async def peek(
        self,
        client_id: str | Partition,
        limits: str = "100/minute",
        *,
        cost: int = 1,
        name: str = "default",
        strategy: StrategyName | None = None,
        concurrency: int | None = None,
    ) -> Decision:
        """The answer that `consume` would give to the same arguments;
        charges nothing and writes nothing.

        Args:
            concurrency: Instead of the other arguments but *name*:
                the answer that `slot` would give, without a place.

        Raises:
            ConfigurationError: As `consume` and `slot`.
        """
        if concurrency is None:
            return await self._decide("peek", client_id, limits, cost, name, strategy)
        if (limits, cost, strategy) != ("100/minute", 1, None):
            raise ConfigurationError(
                "concurrency= stands beside arguments of limits. Look at each by itself: "
                "peek(client_id, '100/minute'), peek(client_id, concurrency=4)."
            )
        running_loop()
        return (await self._engine.decide(self._in_flight(client_id, concurrency, name), "peek")).decision

    @says_what_was_meant("limiter.slot(client_id, 4, name='stream')")
    @asynccontextmanager
    async def slot(
        self, client_id: str | Partition, concurrency: int, *, name: str = "default"
    ) -> AsyncIterator[Decision]:
        """Let *client_id* have at most *concurrency* such blocks under way at once, over all
        processes.

        ::

            async with limiter.slot(user_id, 4) as decision:
                if not decision.allowed:
                    raise RateLimitExceeded(...)  # the block runs all the same: it is yours to leave it
                ...

        A process that is killed keeps its places for up to 30 s.
        What is under way is never cut, whatever happens to Redis.

        Args:
            client_id: Whom to count; any string, hashed before it reaches Redis.
            concurrency: How many, 1 to 10^9.
            name: What is counted: equal names share, whatever their numbers.

        Raises:
            ConfigurationError: For a bad number or name.
            TypeError: If *client_id* is not a string.
        """
        running_loop()
        verdict = await self._engine.decide(self._in_flight(client_id, concurrency, name))
        try:
            yield verdict.decision
        finally:
            verdict.release()

    async def reset(self, client_id: str | Partition, *, name: str | None = None) -> bool:
        """Give *client_id* its full quota back under *name*, or under every name.

        Returns:
            Whether there was a counter to forget; ``False`` also when Redis does not answer.
        """
        running_loop()
        if name is not None:
            check_name(name)
        return await self._engine.reset(self._partition(client_id), name)

    async def _decide(
        self,
        mode: Mode,
        client_id: str | Partition,
        limits: str,
        cost: int,
        name: str,
        strategy: StrategyName | None,
    ) -> Decision:
        running_loop()
        if strategy is not None:
            check_choice("strategy", strategy, get_args(StrategyName))
        if not isinstance(limits, str):
            raise ConfigurationError(f"limits={limits!r} is not notation. Try '100/minute' or '20/second; 1000/hour'.")
        strategy = strategy or self._strategy
        policies = make_policies(check_name(name), limits, strategy)
        # Its limits are known from the first call on; names may be many,
        # so that it warns of one call's only.
        if strategy == "sliding-window-counter" and not self._has_warned:
            self._has_warned = warns_of_small_quotas(policies)
        if check_cost(cost) > 1 and mode == "consume" and not self._has_warned_of_cost:
            self._has_warned_of_cost = warns_of_cost(name, policies, cost)
        charge = Charge(policies, self._partition(client_id), cost, self._on_redis_error)
        return (await self._engine.decide(Charges((charge,)), mode)).decision

    def _in_flight(self, client_id: str | Partition, concurrency: int, name: str) -> Charges:
        """The charge of one that is in flight."""
        try:
            policies = make_concurrency(check_name(name), check_concurrency(concurrency, least=1))
        except ConfigurationError:
            raise
        except ValueError as error:
            raise ConfigurationError(f"{error} Try 4.") from None
        # Names may be many, and are no labels.
        return Charges((Charge(policies, self._partition(client_id), 1, self._on_redis_error, label=SLOTS),))

    def _partition(self, client_id: str | Partition) -> Partition:
        if isinstance(client_id, Partition):
            return client_id
        if not isinstance(client_id, str):
            raise TypeError(f"client_id must be a string, not {type(client_id).__name__}.")
        return make_partition(
            "custom", client_id, prefix=self._settings.REDIS_KEY_PREFIX, secret=self._settings.key_secret
        )
