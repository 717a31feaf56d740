"""What every part of the package decides through: the refusal memory, then one shared trip to Redis, then the process.

When Redis gives no answer in time, ``on_redis_error`` says who decides. A check is sent once at most, and what was
charged locally is never copied back.
"""

import asyncio
import logging
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, cast

from ..connection import PROCESS, RedisManager
from ..errors import Failure, OddReply, classify
from ..events import say, words_for
from ..settings import HeaderStyle, OnRedisError, Settings
from ..telemetry import telemetry
from .batch import Batcher, Check, Outcome
from .clock import CLOCK
from .cluster import ClusterBatcher, make_batcher
from .counts import Counts
from .decision import Decision, Source, policy_state, read_reply, refusal_of
from .headers import Fields, limit_fields, reply_fields
from .local import LocalEngine
from .policy import MICROSECONDS, Charge, Charges, Partition, PolicySet, log_key
from .refusals import Refusal, RefusalMemory
from .strategies import VALUES_PER_COUNTER, Mode, Reply, charged_receipts
from .wires import NOTHING_ASKED

logger = logging.getLogger("redis_asgi.ratelimit")

# What a client is told when Redis is needed and gone.
CLOSED_RETRY_AFTER = 1.0


class Verdict:
    """An engine's answer: whether the request is admitted, and on demand everything else about it.

    Attributes:
        allowed: Whether the request is admitted.
        engine: Who answered.
        charges: What the answer is about; fewer than were asked when some rules fail open.
        source: Who decided.
        reply: The strategies' numbers; ``None`` when nobody counted, or a remembered refusal answered.
        known: The remembered refusals that answered, and when (monotonic seconds).
        is_counted: Whether the request that it is about was counted.
        is_over: Whether that request's charges are settled.
    """

    __slots__ = (
        "_decision",
        "_fields",
        "allowed",
        "at",
        "charges",
        "engine",
        "is_counted",
        "is_over",
        "known",
        "reply",
        "source",
    )

    def __init__(
        self,
        engine: "Engine",
        charges: Charges,
        source: Source,
        reply: Reply | None = None,
        *,
        decision: Decision | None = None,
        known: Sequence[tuple[Charge, Refusal]] = (),
        at: float = 0.0,
    ) -> None:
        self.engine = engine
        self.charges = charges
        self.source: Source = source
        self.reply = reply
        self.known = known
        self.at = at
        self.is_counted = self.is_over = False
        self._decision = decision
        self._fields: Fields | None = None
        if reply is not None:
            self.allowed = reply[0] == 1
            if engine.style == "ietf" and len(charges.each) == 1:
                self._fields = reply_fields(charges.each[0].policies, reply)
        else:
            self.allowed = not known and (decision is None or decision.allowed)

    def fields(self, style: HeaderStyle) -> Fields:
        """The header fields of the answer. Do not change the list."""
        if style == "ietf" and self._fields is not None:
            return self._fields
        return limit_fields(self.decision, style) if style != "none" else []

    def count(self) -> None:
        """Count the request, once, as what it says of it."""
        if not self.is_counted:
            self.is_counted = True
            outcome = "allowed" if self.allowed else "unavailable" if self.source == "none" else "refused"
            self.engine.counts.request(outcome, "refusal_memory" if self.known else self.source)

    @property
    def decision(self) -> Decision:
        """The answer in full; read from the numbers when first asked for."""
        if self._decision is None:
            if self.reply is not None:
                self._decision = read_reply(self.charges, self.reply, self.source)
            else:
                states = tuple(
                    policy_state(refusal.policy, *refusal.numbers(charge.cost, self.at))
                    for charge, refusal in self.known
                )
                self._decision = refusal_of(states, states, self.source)
        return self._decision

    @property
    def taken(self) -> list[int]:
        """The units that were charged, one per policy of the charges."""
        if self.reply is None or not self.allowed:
            return [0] * self.charges.counters
        fits = iter(self.reply[1::VALUES_PER_COUNTER])
        return [charge.taken(next(fits)) for charge in self.charges for _ in charge.policies]

    def show(self, back: Sequence[int]) -> None:
        """Say from now on that *back* (units per policy of the charges), which is about to be given back, remains."""
        reply = list(self.reply or ())
        policies = [policy for charge in self.charges for policy in charge.policies]
        for i, (policy, units) in enumerate(zip(policies, back, strict=True)):
            remaining, reset, retry = (1 + VALUES_PER_COUNTER * i + n for n in (1, 2, 3))
            if units:
                reply[remaining] = min(policy.quota, reply[remaining] + units)
                reply[retry] = 0
                if policy.strategy == "gcra":
                    reply[reset] = max(0, reply[reset] - units * policy.window * MICROSECONDS // policy.quota)
        self.reply, self._decision, self._fields = reply, None, None

    @property
    def receipts(self) -> list[int]:
        """One per policy of the charges, for giving back: negative where nothing was charged."""
        return charged_receipts(self.reply) if self.reply is not None and self.allowed else []


class Engine:
    """Decides charges for every limiter, middleware and route of one manager.

    Args:
        timeout: The most a check waits for Redis, in seconds.
        settings: What its limits are configured by; ``None`` = the manager's.
        style: How what it decides is put into header fields; ``None`` = the settings'.
        names_are_fixed: Whether the names of its policies are known before the first request; only then each policy's
            decisions are counted.
    """

    def __init__(
        self,
        manager: RedisManager,
        *,
        timeout: float,
        settings: Settings | None = None,
        style: HeaderStyle | None = None,
        names_are_fixed: bool = True,
    ) -> None:
        self.manager = manager
        manager.needs = NOTHING_ASKED
        self.counts = Counts()
        self._names_are_fixed = names_are_fixed
        self.settings = settings if settings is not None else manager.settings
        self.style: HeaderStyle = style or self.settings.RATE_LIMIT_HEADERS
        self._timeout = timeout
        self._has_redis = manager.has_redis
        self._divisor = self.settings.RATE_LIMIT_FALLBACK_DIVISOR
        self._local = manager.shared(LocalEngine.from_settings)
        self._refusals = manager.shared(RefusalMemory.from_settings)
        self._last_batcher: Batcher | ClusterBatcher | None = None
        self._forks = PROCESS.forks

    def remembered(self, charges: Charges) -> Verdict | None:
        """The refusal of *charges* that this process knows already."""
        now = CLOCK.monotonic()
        known = self._refusals.find(charges, now)
        if not known:
            return None
        if self._names_are_fixed:
            for charge, refusal in known:
                self.counts.known(charge, refusal.policy.name)
        return Verdict(self, charges, "redis", known=known, at=now)

    async def decide(self, charges: Charges, mode: Mode = "consume") -> Verdict:
        """Decide *charges* together: all are charged, or none."""
        asked = self.ask(charges, mode)
        return asked if isinstance(asked, Verdict) else cast("Verdict", await asked.future)

    def ask(self, charges: Charges, mode: Mode = "consume") -> Check | Verdict:
        """The verdict, where Redis need not be asked, else the check that is on its way, whose future it becomes."""
        if not self._has_redis:
            return self._decided(charges, mode, "memory", self._local.decide(mode, charges))
        if mode == "consume" and self._refusals.partitions:
            known = self.remembered(charges)
            if known is not None:
                return known
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
                return self._without_redis(charges, mode, classify(error))
        breaker = batcher.breaker
        if breaker is not None and breaker.state == "open":
            return self._without_redis(charges, mode, breaker.reason)
        check = Check(batcher.loop, mode, charges, self._timeout, (), self._read)
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

    def _decided(self, charges: Charges, mode: Mode, source: Source, reply: Reply) -> Verdict:
        if self._names_are_fixed and mode == "consume":
            self.counts.decided(charges, reply)
        return Verdict(self, charges, source, reply)

    def settle(self, verdict: Verdict, deltas: Sequence[int]) -> None:
        """Change what *verdict* charged, off the response path: in the next shared batch, unawaited.

        Args:
            deltas: Units to add (or, negative, to give back) per policy of the verdict's charges. What is given back
                goes to the window it was taken from, by receipt, or nowhere once that has passed.
        """
        more: list[Charge] = []
        back: list[Charge] = []
        receipts: list[int] = []
        kept = verdict.receipts
        at = 0
        for charge in verdict.charges:
            for policy in charge.policies:
                delta = deltas[at]
                if delta > 0:
                    more.append(Charge(PolicySet((policy,)), charge.partition, delta))
                elif delta < 0:
                    back.append(Charge(PolicySet((policy,)), charge.partition, -delta))
                    receipts.append(kept[at])
                at += 1
        if more:
            self._apply("charge", Charges(more), (), verdict)
        if back:
            self._apply("refund", Charges(back), receipts, verdict)

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
        batcher = self._last_batcher = self.manager.part(make_batcher)
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

    def _without_redis(self, charges: Charges, mode: Mode, reason: Failure) -> Verdict:
        # A rule that is all shadow never refuses, whatever it says.
        answers = {charge.on_redis_error for charge in charges if charge.policies.shown}
        local = charges
        if any(charge.on_redis_error != "local" for charge in charges):
            local = Charges(charge for charge in charges if charge.on_redis_error == "local")
        chosen: OnRedisError = "closed" if "closed" in answers else "local" if local else "open"
        if mode == "consume":
            self.counts.fell_back(chosen, reason)
        if chosen == "local":
            return self._decided(local, mode, "local", self._local.decide(mode, local, divisor=self._divisor))
        decision = Decision(True, "none") if chosen == "open" else Decision(False, "none", CLOSED_RETRY_AFTER)
        return Verdict(self, Charges(), "none", decision=decision)


def _of_rule(fields: Sequence[bytes], name: str) -> list[bytes]:
    """Those of *fields* that hold a policy of the rule *name*."""
    belongs = re.compile(rb"%s(?:-\d+s)?:" % re.escape(name.encode()))
    return [field for field in fields if belongs.match(field)]


def _is_log(field: bytes) -> bool:
    return field.split(b":")[1][:1] == b"m"
