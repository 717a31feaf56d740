"""`Verdict`: an engine's answer about one request."""

from asyncio import AbstractEventLoop
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...count_buffer import Noted
from ..limits.charge import Charge, Charges, counters_of
from ..limits.counter import Mode
from ..limits.decision import Decision, Source, policy_state, read_reply, refusal_of
from ..limits.policy import MICROSECONDS
from ..limits.refusal_memory import Known
from ..limits.reply import Reply, fits_at, fits_of, numbers_of, receipt_at, reply_of
from ..transport.check import Check, Outcome
from .settlement import Settlement

if TYPE_CHECKING:
    from .engine import Engine
    from .in_flight import Slot


class Verdict(Check):
    """Whether a request is admitted, and on demand everything else about it.

    It asks for itself: where Redis decides, it is the `Check` that is sent,
    and the answer once its future is done.

    Attributes:
        allowed: Whether the request is admitted.
        engine: Who answers.
        charges: What the answer is about; fewer than were asked when some rules fail open.
        source: Who decided.
        reply: The strategies' numbers; ``None`` when no engine counted,
            or a remembered refusal answered.
        known: The remembered refusals that answered, at the moment *at*.
        uncounted: The counters of what its policies said, which are counted with the request.
        rendered: What `Charges.render` made of the reply;
            ``None`` when that is out of date, or there is nothing.
        more: The other verdicts on the request: of per-route limits and inner middleware.
        loop: Where each change is applied at once,
            as nothing sees the response's end; else ``None``.
        ledger: What the response changes about the request; ``None`` when that is nothing.
        is_counted: Whether the request that it is about was counted.
        is_over: Whether that request's charges are settled.
        needs_end: Whether the end of its response changes what the request is charged.
        slot: Its place among the requests in flight, where one of its policies counts those.
    """

    __slots__ = (
        "_decision",
        "allowed",
        "charges",
        "engine",
        "is_counted",
        "is_over",
        "known",
        "ledger",
        "loop",
        "more",
        "needs_end",
        "rendered",
        "reply",
        "source",
        "uncounted",
    )

    slot: "Slot | None" = None

    def __init__(self, engine: "Engine", charges: Charges, mode: Mode = "consume") -> None:
        self.engine = engine
        self.charges = charges
        self.mode = mode
        self.source: Source = "redis"
        self.allowed = True
        self.is_asked = self.is_counted = self.is_over = False
        self.needs_end = charges.is_conditional
        self.known: Known | None = None
        self.more: Sequence[Verdict] = ()
        self.receipts = ()
        self.reply: Reply | None = None
        self.uncounted: Noted | None = None
        self.rendered: Any = None
        self.loop: AbstractEventLoop | None = None
        self.ledger: Settlement | None = None
        self._decision: Decision | None = None

    def hear(self, outcome: Outcome) -> None:
        if isinstance(outcome, list):
            if not outcome[0] and self.mode == "consume":
                self.engine.refusals.remember(self.charges, outcome, self.at)
            self.decide("redis", outcome)
        else:
            self.engine.go_without(self, outcome)
            self.engine.counts.waited(self.source, self.waited())

    def decide(self, source: Source, reply: Reply) -> None:
        """Be what *source* replied."""
        charges = self.charges
        self.source = source
        self.reply = reply
        self.allowed = allowed = reply[0] == 1
        by_all = allowed and (charges.all_enforcing or all(fits_of(reply)))
        if by_all and charges.admission is not None:
            # Nearly always: counted together with the request.
            self.uncounted = charges.admission
        elif self.engine.counts_policies and self.mode == "consume":
            if by_all:
                self.uncounted = self.engine.counts.admission(charges)
            else:
                self.engine.counts.decided(charges, reply)
        render = charges.render
        if render is not None:
            # Here, for a whole batch in one go: see `Check.hear`.
            self.rendered = render(reply)

    def refuse(self, known: Known, at: float) -> None:
        """Be what is remembered to refuse it at the moment *at* (monotonic seconds)."""
        self.allowed, self.known, self.at = False, known, at

    def conclude(self) -> None:
        """Be from now on only what it says, and over, so that it can be said again and again."""
        self._decision, self.known, self.is_over = self.decision, None, True

    def leave(self, decision: Decision) -> None:
        """Be what is said where no engine decides about any of its charges."""
        self.charges, self.source, self.allowed, self._decision = Charges(), "none", decision.allowed, decision

    def count(self) -> None:
        """Count the request, once: as refused if one of the verdicts on it is, else as this one
        says.
        """
        if self.is_counted:
            return
        self.is_counted = True
        said = self if not self.more else next((verdict for verdict in self.all if not verdict.allowed), self)
        source = said.source
        outcome = "allowed" if said.allowed else "unavailable" if source == "none" else "refused"
        said.engine.counts.request(outcome, source if said.known is None else "refusal_memory", self.uncounted)

    def settle(self, status: int | None) -> None:
        """Settle the request, at the end of its response; see `Settlement.settle`."""
        if not self.is_over:
            self.is_over = True
            if not self.is_counted:
                self.count()
            if self.needs_end:
                self.release()
                self.open_ledger().settle(status)
                # It refers to this: the cycle would leave every request to the collector.
                self.ledger = None

    def release(self) -> None:
        """Let the request be in flight no longer, whatever else is still to be settled."""
        for verdict in self.all:
            if verdict.slot is not None:
                verdict.slot.release()

    @property
    def all(self) -> "Sequence[Verdict]":
        """The decisions on the request, one by one."""
        return (self, *self.more)

    def open_ledger(self) -> Settlement:
        """The request's ledger; begun when it is first asked for."""
        if self.ledger is None:
            self.ledger = Settlement(self)
            self.needs_end = True
        return self.ledger

    @property
    def spent(self) -> Sequence[tuple[int, Charge]]:
        """What was charged at an estimate: see `Charges.spent`."""
        return self.charges.spent if self.allowed else ()

    @property
    def decision(self) -> Decision:
        """The answer in full; read from the numbers when first asked for."""
        if self._decision is None:
            if self.reply is not None:
                self._decision = read_reply(self.charges, self.reply, self.source)
            else:
                states = tuple(
                    policy_state(refusal.policy, *refusal.numbers(charge.cost, self.at))
                    for charge, refusal in self.known or ()
                )
                self._decision = refusal_of(states, states, self.source)
        return self._decision

    @property
    def taken(self) -> list[int]:
        """The units that were charged, one per policy of the charges."""
        return [self.taken_by(at, charge) for at, (charge, _) in enumerate(counters_of(self.charges))]

    def taken_by(self, at: int, charge: Charge) -> int:
        """The units that the counter number *at* was charged, one of those of *charge*."""
        return charge.taken(self.reply[fits_at(at)]) if self.reply is not None and self.allowed else 0

    def receipt(self, at: int) -> int:
        """The receipt of the counter number *at*, for giving back;
        negative where nothing was charged.
        """
        reply = self.reply
        return reply[receipt_at(at)] if reply is not None and self.allowed and reply[fits_at(at)] else -1

    def show(self, back: Sequence[int]) -> None:
        """Say from now on that *back* (units per policy of the charges),
        which is about to be given back, remains.
        """
        shown = []
        for (_, policy), each, units in zip(counters_of(self.charges), numbers_of(self.reply or []), back, strict=True):
            reset = each.reset
            if units and policy.strategy == "gcra":
                reset = max(0, reset - units * policy.window * MICROSECONDS // policy.quota)
            remaining = min(policy.quota, each.remaining + units)
            shown.append(each._replace(remaining=remaining, reset=reset, retry=0) if units else each)
        self.reply, self._decision, self.rendered = reply_of(self.allowed, shown), None, None
