"""What every part of the package decides through: the refusal memory, then one shared trip to Redis, then the process.

When Redis gives no answer in time, ``on_redis_error`` says who decides. A check is sent once at most, and what was
charged locally is never copied back.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, cast

from ...connection.manager import RedisManager
from ...connection.open_client import PROCESS
from ...errors import Failure, OddReply, classify
from ...events import say, words_for
from ...settings import OnRedisError, Settings
from ...telemetry import telemetry
from ..limits.clock import CLOCK
from ..limits.decision import Decision, Source
from ..limits.policy import Charge, Charges, Partition, PolicySet, counters_of, log_key
from ..limits.refusal_memory import RefusalMemory
from ..limits.reply import Reply
from ..limits.strategies import Mode
from ..transport.batcher import Batcher
from ..transport.check import Check, HoldingCheck, Outcome
from ..transport.cluster_batcher import ClusterBatcher, make_batcher
from ..transport.script import NOTHING_ASKED
from .in_flight import InFlight, Slot
from .local_engine import LocalEngine
from .metrics import Counts
from .verdict import Verdict

logger = logging.getLogger("redis_asgi.ratelimit")

# What a client is told when Redis is needed and gone.
CLOSED_RETRY_AFTER = 1.0


class Engine:
    """Decides charges for every limiter, middleware and route of one manager.

    Args:
        timeout: The most a check waits for Redis, in seconds.
        settings: What its limits are configured by; ``None`` = the manager's.
        names_are_fixed: Whether the names of its policies are known before the first request; only then each policy's
            decisions are counted.

    Attributes:
        plans: What its owner keeps with it.
    """

    def __init__(
        self, manager: RedisManager, *, timeout: float, settings: Settings | None = None, names_are_fixed: bool = True
    ) -> None:
        self.manager = manager
        manager.needs = NOTHING_ASKED
        self.counts = Counts()
        self._names_are_fixed = names_are_fixed
        self.settings = settings if settings is not None else manager.settings
        self.plans: Any = None
        self._timeout = timeout
        self._has_redis = manager.has_redis
        self._divisor = self.settings.RATE_LIMIT_FALLBACK_DIVISOR
        self._local = manager.per_process(LocalEngine.from_settings)
        self._refusals = manager.per_process(RefusalMemory.from_settings)
        self._in_flight = manager.per_process(InFlight.from_settings)
        self._last_batcher: Batcher | ClusterBatcher | None = None
        self._forks = PROCESS.forks

    def remembered(self, charges: Charges) -> Verdict | None:
        """The refusal of *charges* that this process knows already."""
        now = CLOCK.monotonic()
        known = self._refusals.find(charges, now)
        if not known:
            return None
        verdict = Verdict(self, charges, "redis", known=known, at=now)
        if self._names_are_fixed:
            verdict.uncounted = [self.counts.refusal(charge, refusal.policy.name) for charge, refusal in known]
        return verdict

    async def decide(self, charges: Charges, mode: Mode = "consume") -> Verdict:
        """Decide *charges* together: all are charged, or none."""
        asked = self.ask(charges, mode)
        if isinstance(asked, Verdict):
            return asked
        try:
            return cast("Verdict", await asked.future)
        except BaseException:
            # Also where the answer has come, and nobody takes it.
            if isinstance(asked, HoldingCheck) and asked.slot is not None:
                asked.slot.abandon(asked)
            raise

    def ask(self, charges: Charges, mode: Mode = "consume") -> Check | Verdict:
        """The verdict, where Redis need not be asked, else the check that is on its way, whose future it becomes."""
        if mode == "consume" and self._refusals.partitions:
            known = self.remembered(charges)
            if known is not None:
                return known
        slot = self._in_flight.begin(self.manager, charges) if charges.holds and mode == "consume" else None
        if not self._has_redis:
            return self._decided_here(charges, mode, "memory", slot)
        batcher = self._last_batcher
        if (
            batcher is None
            or batcher.closed
            or batcher.loop is not asyncio.get_running_loop()
            or self._forks != PROCESS.forks
        ):
            try:
                batcher = self._batcher()
            except Exception as error:
                # The client cannot even be built, such as for a host without an address.
                return self._without_redis(charges, mode, classify(error), slot)
        breaker = batcher.breaker
        if breaker is not None and breaker.state == "open":
            return self._without_redis(charges, mode, breaker.reason, slot)
        if slot is None:
            check = Check(batcher.loop, mode, charges, self._timeout, (), self._read)
        else:
            check = HoldingCheck(batcher.loop, mode, charges, self._timeout, (), self._read_holding)
            check.slot, check.holders = slot, slot.holders
        batcher.submit(check)
        return check

    def _read(self, check: Check, outcome: Outcome) -> Verdict:
        """The verdict in what came of *check*."""
        if isinstance(outcome, Failure):
            verdict = self._without_redis(check.charges, check.mode, outcome)
            self.counts.waited(verdict.source, check.waited())
            return verdict
        if not outcome[0] and check.mode == "consume":
            self._refusals.remember(check.charges, outcome, check.at)
        return self._decided(check.charges, check.mode, "redis", outcome)

    def _read_holding(self, check: Check, outcome: Outcome) -> Verdict:
        """`_read`, of a check that may have put a request in flight."""
        slot = cast("Slot", check.slot)
        if isinstance(outcome, Failure):
            slot.is_doubtful = cast("HoldingCheck", check).may_have_run and outcome is not Failure.PERMISSION
            verdict = self._without_redis(check.charges, check.mode, outcome, slot)
            self.counts.waited(verdict.source, check.waited())
            return verdict
        # Of a refusal in parts one may have been admitted.
        slot.is_doubtful = check.charges.is_spread and not outcome[0]
        return slot.answered(self._read(check, outcome))

    def _decided_here(
        self, charges: Charges, mode: Mode, source: Source, slot: Slot | None, *, divisor: int = 1
    ) -> Verdict:
        """What this process's own counters say."""
        if slot is None:
            return self._decided(charges, mode, source, self._local.decide(mode, charges, divisor=divisor))
        reply = self._local.decide(mode, charges, holders=slot.holders, divisor=divisor)
        return slot.answered(self._decided(charges, mode, source, reply))

    def _decided(self, charges: Charges, mode: Mode, source: Source, reply: Reply) -> Verdict:
        verdict = Verdict(self, charges, source, reply)
        if self._names_are_fixed and mode == "consume":
            if reply[0] and charges.enforce:
                # Nearly always: counted together with the request.
                verdict.uncounted = charges.admission or self.counts.admission(charges)
            else:
                self.counts.decided(charges, reply)
        if charges.render is not None:
            # Here, for a whole batch in one go, the same few lines stay in the processor's caches.
            verdict.rendered = charges.render(reply)
        return verdict

    def settle(self, verdict: Verdict, deltas: Sequence[int]) -> None:
        """Change what *verdict* charged, off the response path: in the next shared batch, unawaited.

        Args:
            deltas: Units to add (or, negative, to give back) per policy of the verdict's charges. What is given back
                goes to the window it was taken from, by receipt, or nowhere once that has passed.
        """
        kept = verdict.receipts or [-1] * len(deltas)
        changes = [
            (Charge(PolicySet((policy,)), charge.partition, abs(delta)), delta, receipt)
            for (charge, policy), delta, receipt in zip(counters_of(verdict.charges), deltas, kept, strict=True)
        ]
        more = [charge for charge, delta, _ in changes if delta > 0]
        back = [charge for charge, delta, _ in changes if delta < 0]
        if more:
            self._apply("charge", Charges(more), (), verdict)
        if back:
            self._apply("refund", Charges(back), [receipt for _, delta, receipt in changes if delta < 0], verdict)

    def _apply(
        self, mode: Literal["charge", "refund"], charges: Charges, receipts: Sequence[int], verdict: Verdict
    ) -> None:
        def done(_: object = None) -> None:
            for charge in charges:
                self._refusals.forget(charge.partition.key, CLOCK.monotonic())

        if mode == "refund":
            done()
        if verdict.source != "redis":
            self._apply_here(mode, charges, receipts)
        else:
            # On a cluster each charge may live on another node.
            for _, same in groupby(charges, lambda charge: charge.partition.key):
                mine = Charges(same)
                theirs, receipts = receipts[: len(mine)], receipts[len(mine) :]
                try:
                    batcher = self._batcher()
                except Exception as error:
                    self._settled(mode, mine, classify(error))
                    continue
                check = Check(batcher.loop, mode, mine, self._timeout, theirs, self._read_settled)
                if mode == "refund":
                    check.future.add_done_callback(done)
                batcher.submit(check)

    def _read_settled(self, check: Check, outcome: Outcome) -> Outcome:
        self._settled(check.mode, check.charges, outcome)
        return outcome

    def _settled(self, mode: Mode, charges: Charges, outcome: Outcome) -> None:
        """Count what came of a charge or a refund; one that Redis did not take is made here, or dropped."""
        failure = outcome.value if isinstance(outcome, Failure) else ""
        telemetry().redis_commands.labels("settle", failure or "ok").inc()
        if failure and mode == "charge":
            self._apply_here("charge", charges, ())

    def _apply_here(self, mode: Mode, charges: Charges, receipts: Sequence[int]) -> None:
        divisor = self._divisor if self.manager.has_redis else 1
        self._local.decide(mode, charges, receipts=receipts, divisor=divisor)

    def _batcher(self) -> Batcher | ClusterBatcher:
        """The running loop's batcher; another when the loop is another, the manager was closed, or after a fork."""
        # Not read back: a loop in another thread may have put its own there meanwhile.
        batcher = self._last_batcher = self.manager.per_client(make_batcher)
        self._forks = PROCESS.forks
        return batcher

    async def reset(self, partition: Partition, name: str | None, *, on_request: bool = False) -> bool:
        """Forget a partition's counters, or those of one rule; whether there were any.

        Args:
            on_request: Wait for Redis no longer than a check does.
        """
        here = self._local.fields(partition.key)
        found = self._local.forget(partition.key, None if name is None else _of_rule(here, name))
        if not self.manager.has_redis:
            return found
        try:
            breaker = self.manager.breaker()
            if breaker.state == "open":
                return False
            async with asyncio.timeout(self._timeout if on_request else self.manager.settings.REDIS_TIMEOUT):
                return await self.reset_in_redis(partition, name)
        except Exception as error:
            # Redis trouble never escapes; the caller learns that nothing was reset.
            say(logger, "reset_failed", **words_for(classify(error)), address=self.manager.address)
            return False
        finally:
            # A reply that is older than the reset says nothing any more.
            self._refusals.forget(partition.key, CLOCK.monotonic())

    async def reset_in_redis(self, partition: Partition, name: str | None) -> bool:
        """`reset`, in Redis only.

        Raises:
            redis.exceptions.RedisError: When Redis does not take it.
        """
        key = partition.key
        client = await self.manager.get_connection()
        reply = await client.execute_command("HKEYS", key)
        if not isinstance(reply, list):
            raise OddReply(f"HKEYS was answered by {type(reply).__name__}")
        fields = [f if isinstance(f, bytes) else f.encode() for f in reply]
        chosen = fields if name is None else _of_rule(fields, name)
        if not chosen:
            return False
        # A log without its field is not read, and gone with the next charge: the order is safe.
        if name is None:
            gone = await client.execute_command("UNLINK", key)
        else:
            gone = await client.execute_command("HDEL", key, *chosen)
        logs = [log_key(key, field) for field in chosen if _is_log(field)]
        if logs:
            await client.execute_command("UNLINK", *logs)
        return bool(gone)

    def _without_redis(self, charges: Charges, mode: Mode, reason: Failure, slot: Slot | None = None) -> Verdict:
        # A rule that is all shadow never refuses, whatever it says.
        answers = {charge.on_redis_error for charge in charges if charge.policies.enforces}
        local = charges
        if any(charge.on_redis_error != "local" for charge in charges):
            local = Charges(charge for charge in charges if charge.on_redis_error == "local")
        chosen: OnRedisError = "closed" if "closed" in answers else "local" if local else "open"
        if mode == "consume":
            self.counts.fell_back(chosen, reason)
        if chosen == "local":
            return self._decided_here(local, mode, "local", slot, divisor=self._divisor)
        decision = Decision(True, "none") if chosen == "open" else Decision(False, "none", CLOSED_RETRY_AFTER)
        verdict = Verdict(self, Charges(), "none", decision=decision)
        return verdict if slot is None else slot.answered(verdict)


def _of_rule(fields: Sequence[bytes], name: str) -> list[bytes]:
    """Those of *fields* that hold a policy of the rule *name*."""
    belongs = re.compile(rb"%s(?:-\d+s)?:" % re.escape(name.encode()))
    return [field for field in fields if belongs.match(field)]


def _is_log(field: bytes) -> bool:
    return field.split(b":")[1][:1] in b"mc"
