"""The engine of every decision: the refusal memory,
then one shared trip to Redis, then the process.

When Redis gives no answer in time, ``on_redis_error`` says who decides. A check is sent once at
most, and what was charged locally is never copied back.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from ...connection.manager import RedisManager
from ...connection.open_client import PROCESS
from ...errors import Failure, classify
from ...events import say, words_for
from ...settings import OnRedisError, Settings
from ..budgets.spending import InFlight
from ..limits.charge import Charge, Charges
from ..limits.clock import CLOCK
from ..limits.counter import Mode
from ..limits.decision import Decision
from ..limits.policy import Partition, Policy, PolicySet
from ..limits.refusal_memory import Known, RefusalMemory, Said
from ..transport.batcher import Batcher
from ..transport.check import Check, Outcome
from ..transport.cluster_batcher import ClusterBatcher, make_batcher
from ..transport.script import NOTHING_ASKED
from .heartbeat import Hearts
from .in_flight import HeldVerdict
from .local_engine import LocalEngine
from .metrics import LimitMetrics
from .reset import fields_of_rule, reset_in_redis
from .settlement import Change
from .settling_check import SettlingCheck
from .verdict import Verdict

logger = logging.getLogger("redis_asgi.ratelimit")

# What a client is told when Redis is needed and gone.
CLOSED_RETRY_AFTER = 1.0
_LOOK_AGAIN = 0.01  # seconds


class Engine:
    """Decides charges for every limiter, middleware and route of one manager.

    Args:
        timeout: The most a check waits for Redis, in seconds.
        settings: What its limits are configured by; ``None`` = the manager's.
        names_are_fixed: Whether the names of its policies are known before the first request; only
            then each policy's decisions are counted.

    Attributes:
        plans: What its owner keeps with it.
        in_flight: What requests hold whose cost is known after their answers.
        refusals: Those that this process remembers.
    """

    def __init__(
        self, manager: RedisManager, *, timeout: float, settings: Settings | None = None, names_are_fixed: bool = True
    ) -> None:
        self.manager = manager
        manager.needs = NOTHING_ASKED
        self.counts = LimitMetrics()
        self.counts_policies = names_are_fixed
        self.settings = settings if settings is not None else manager.settings
        self.plans: Any = None
        self._timeout = timeout
        self._has_redis = manager.has_redis
        self._divisor = self.settings.RATE_LIMIT_FALLBACK_DIVISOR
        self._local = manager.per_process(LocalEngine.from_settings)
        self.refusals = manager.per_process(RefusalMemory.from_settings)
        self.in_flight = manager.per_process(InFlight.from_settings)
        self._hearts = manager.per_process(Hearts.from_settings)
        self._last_batcher: Batcher | ClusterBatcher | None = None
        self._settling: dict[Mode, SettlingCheck] = {}  # the last one of each
        self._forks = PROCESS.forks

    def remembered(self, charges: Charges) -> Verdict | None:
        """The refusal of *charges* that this process knows already."""
        now = CLOCK.monotonic()
        known = self.refusals.find(charges, now)
        if not known:
            return None
        verdict = Verdict(self, charges)
        verdict.refuse(known, now)
        if self.counts_policies:
            verdict.uncounted = known.counters or self.counts.refusals(known)
        return verdict

    def again(self, known: Known, style: object) -> Said | None:
        """The last answer to what is *known*, if that is said again in that *style*."""
        said = known.said
        if said is None or said.style is not style:
            return None
        now = CLOCK.monotonic()
        return said if now < said.until and known.holds(now) else None

    async def decide(self, charges: Charges, mode: Mode = "consume") -> Verdict:
        """Decide *charges* together: all are charged, or none."""
        verdict = self.ask(charges, mode)
        if verdict.is_asked:
            try:
                await verdict.future
            except BaseException:
                # Also where the answer has come, and is not taken.
                if verdict.slot is not None:
                    verdict.slot.abandon(verdict)
                raise
        return verdict

    def ask(self, charges: Charges, mode: Mode = "consume") -> Verdict:
        """The verdict, ready at once, or where it *is_asked* when its future is done."""
        if mode == "consume" and self.refusals.partitions and self._has_redis:
            known = self.remembered(charges)
            if known is not None:
                return known
        if charges.holds and mode == "consume":
            verdict: Verdict = HeldVerdict(self, charges, self._hearts.begin(self.manager, charges))
        else:
            verdict = Verdict(self, charges, mode)
        if not self._has_redis:
            verdict.decide("memory", self._local.decide(mode, charges, holders=verdict.holders))
            return verdict
        try:
            batcher = self._batcher()
        except Exception as error:
            # The client cannot even be built, such as for a host without an address.
            self.go_without(verdict, classify(error))
            return verdict
        breaker = batcher.breaker
        if breaker is not None and breaker.state == "open":
            self.go_without(verdict, breaker.reason)
        else:
            verdict.begin(batcher.loop, charges, self._timeout)
            batcher.submit(verdict)
        return verdict

    def settle(self, verdict: Verdict, changes: Iterable[Change]) -> None:
        """Make *changes* to what *verdict* charged, off the response path:
        in the next shared batch, unawaited.

        What is given back goes to the window it was taken from, by receipt,
        or nowhere once that has passed.
        """
        for at, charge, policy, units in changes:
            policies = charge.policies
            alone = policies if len(policies.policies) == 1 else _alone(policy)
            change = Charge(alone, charge.partition, abs(units))
            # What was refused before may be admitted now, or wait for longer; of a fixed window
            # the end is the same.
            if self.refusals.partitions and (units < 0 or policy.strategy != "fixed-window"):
                self._forget((change,))
            if units > 0:
                self._apply("charge", change, (), verdict)
            else:
                self._apply("refund", change, (verdict.receipt(at),), verdict)

    def _apply(
        self, mode: Literal["charge", "refund"], charge: Charge, receipts: tuple[int, ...], verdict: Verdict
    ) -> None:
        if verdict.source != "redis":
            self._apply_here(mode, Charges.plain((charge,)), receipts)
            return
        try:
            batcher = self._batcher()
        except Exception as error:
            self.settled(mode, Charges.plain((charge,)), classify(error))
            return
        waiting = self._settling.get(mode)
        if (
            waiting is not None
            and waiting.future.get_loop() is batcher.loop
            and batcher.gathers
            and waiting.takes(charge, receipts)
        ):
            batcher.grown(len(charge.policies.policies))
        else:
            waiting = self._settling[mode] = SettlingCheck(self, batcher.loop, mode, self._timeout)
            waiting.takes(charge, receipts)
            batcher.submit(waiting)

    def settle_again(self, checks: Iterable[Check]) -> None:
        """Send *checks*, of what was sent together and did not run."""
        batcher = self._batcher()
        for check in checks:
            batcher.submit(check)

    def settled(self, mode: Mode, charges: Charges, outcome: Outcome) -> None:
        """Count what came of a charge or a refund;
        one that Redis did not take is made here, or dropped.
        """
        failure = outcome if isinstance(outcome, Failure) else None
        self.counts.settled(failure, len(charges))
        if mode == "refund":
            # What was refused meanwhile may be admitted now.
            self._forget(charges)
        elif failure is not None:
            self._apply_here("charge", charges, ())

    async def until_ended(self) -> None:
        """Wait until what is held here has ended, for as long as a check at most: a server that
        stops may have just cancelled it, and Redis is still to be told.
        """
        for _ in range(round(self._timeout / _LOOK_AGAIN)):
            if not (self._has_redis and (self.in_flight or self._hearts.heart(self.manager))):
                break
            await asyncio.sleep(_LOOK_AGAIN)

    def _forget(self, charges: Iterable[Charge]) -> None:
        """Forget every refusal of those whom *charges* are about."""
        now = CLOCK.monotonic()
        for charge in charges:
            self.refusals.forget(charge.partition.key, now)

    def _apply_here(self, mode: Mode, charges: Charges, receipts: Sequence[int]) -> None:
        divisor = self._divisor if self.manager.has_redis else 1
        self._local.decide(mode, charges, receipts=receipts, divisor=divisor)

    def _batcher(self) -> Batcher | ClusterBatcher:
        """The running loop's batcher; another when the loop is another,
        the manager was closed, or after a fork.
        """
        batcher = self._last_batcher
        if (
            batcher is not None
            and not batcher.closed
            and batcher.loop is asyncio.get_running_loop()
            and self._forks == PROCESS.forks
        ):
            return batcher
        # Not read back: a loop in another thread may have put its own there meanwhile.
        batcher = self._last_batcher = self.manager.per_client(make_batcher)
        self._settling = {}  # what waits elsewhere, in the parent of a fork perhaps
        self._forks = PROCESS.forks
        return batcher

    async def reset(self, partition: Partition, name: str | None, *, on_request: bool = False) -> bool:
        """Forget a partition's counters, or those of one rule; whether there were any.

        Args:
            on_request: Wait for Redis no longer than a check does.
        """
        here = self._local.fields(partition.key)
        found = self._local.forget(partition.key, None if name is None else fields_of_rule(here, name))
        if not self.manager.has_redis:
            return found
        try:
            breaker = self.manager.breaker()
            if breaker.state == "open":
                return False
            async with asyncio.timeout(self._timeout if on_request else self.manager.settings.REDIS_TIMEOUT):
                return await reset_in_redis(self.manager, partition, name)
        except Exception as error:
            # Redis trouble never escapes; the caller learns that nothing was reset.
            say(logger, "reset_failed", **words_for(classify(error)), address=self.manager.address)
            return False
        finally:
            # A reply that is older than the reset says nothing any more.
            self.refusals.forget(partition.key, CLOCK.monotonic())

    def go_without(self, verdict: Verdict, reason: Failure) -> None:
        """Decide *verdict* where Redis gives no answer."""
        charges, mode = verdict.charges, verdict.mode
        # A rule that is all shadow never refuses, whatever it says.
        answers = {charge.on_redis_error for charge in charges if charge.policies.enforces}
        local = charges
        if any(charge.on_redis_error != "local" for charge in charges):
            local = Charges(charge for charge in charges if charge.on_redis_error == "local")
        chosen: OnRedisError = "closed" if "closed" in answers else "local" if local else "open"
        if mode == "consume":
            self.counts.fell_back(chosen, reason)
        if chosen == "local":
            verdict.charges = local
            verdict.decide("local", self._local.decide(mode, local, holders=verdict.holders, divisor=self._divisor))
        else:
            closed = chosen == "closed"
            verdict.leave(Decision(not closed, "none", CLOSED_RETRY_AFTER if closed else None))


@lru_cache(maxsize=1024)
def _alone(policy: Policy) -> PolicySet:
    return PolicySet((policy,))
