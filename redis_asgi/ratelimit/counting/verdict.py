"""`Verdict`: an engine's answer about one request."""

from asyncio import AbstractEventLoop
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..limits.decision import Decision, Source, policy_state, read_reply, refusal_of
from ..limits.policy import MICROSECONDS, Charge, Charges, counters_of
from ..limits.refusal_memory import Refusal
from ..limits.reply import Reply, charged_receipts, numbers_of, reply_of
from .settlement import Ledger

if TYPE_CHECKING:
    from .engine import Engine
    from .in_flight import Slot


class Verdict:
    """Whether a request is admitted, and on demand everything else about it.

    Attributes:
        allowed: Whether the request is admitted.
        engine: Who answered.
        charges: What the answer is about; fewer than were asked when some rules fail open.
        source: Who decided.
        reply: The strategies' numbers; ``None`` when nobody counted, or a remembered refusal answered.
        known: The remembered refusals that answered, and when (monotonic seconds).
        uncounted: The counters of what its policies said, which are counted with the request.
        rendered: What `Charges.render` made of the reply; ``None`` when that is out of date, or there is nothing.
        more: The other verdicts on the request: of per-route limits and inner middleware.
        loop: Where each change is applied at once, as nothing sees the response's end; else ``None``.
        ledger: What the response changes about the request; ``None`` when that is nothing.
        is_counted: Whether the request that it is about was counted.
        is_over: Whether that request's charges are settled.
        slot: Its place among the requests in flight, where one of its policies counts those.
    """

    more: "Sequence[Verdict]" = ()
    loop: AbstractEventLoop | None = None
    ledger: Ledger | None = None
    slot: "Slot | None" = None

    def __init__(
        self,
        engine: "Engine",
        charges: Charges,
        source: Source,
        reply: Reply | None = None,
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
        self.rendered: Any = None
        self.uncounted: Sequence[Any] = ()
        self._decision = decision
        if reply is not None:
            self.allowed = reply[0] == 1
        else:
            self.allowed = not known and (decision is None or decision.allowed)

    def count(self) -> None:
        """Count the request, once: as refused if one of the verdicts on it is, else as this one says."""
        if self.is_counted:
            return
        self.is_counted = True
        said = self
        if self.more:
            said = next((verdict for verdict in self.all if not verdict.allowed), self)
        outcome = "allowed" if said.allowed else "unavailable" if said.source == "none" else "refused"
        said.engine.counts.request(outcome, "refusal_memory" if said.known else said.source, self.uncounted)

    def settle(self, status: int | None) -> None:
        """Settle the request, at the end of its response; see `Ledger.settle`."""
        if not self.is_over:
            self.is_over = True
            self.count()
            if (
                self.ledger is not None
                or self.charges.wait_and_see
                or (self.more and any(verdict.charges.wait_and_see for verdict in self.more))
            ):
                self.release()
                self.open_ledger().settle(status)

    def hold(self, slot: "Slot") -> None:
        """Let the request be in flight in *slot*, until it ends."""
        self.slot = slot
        self.open_ledger()  # by which its end is looked at

    def release(self) -> None:
        """Let the request be in flight no longer, whatever else is still to be settled."""
        for verdict in self.all:
            if verdict.slot is not None:
                verdict.slot.release()

    @property
    def all(self) -> "Sequence[Verdict]":
        """What was decided about the request, one by one."""
        return (self, *self.more)

    def open_ledger(self) -> Ledger:
        """The request's ledger; begun when it is first asked for."""
        if self.ledger is None:
            self.ledger = Ledger(self)
        return self.ledger

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
        both = zip(counters_of(self.charges), numbers_of(self.reply), strict=True)
        return [charge.taken(each.fits) for (charge, _), each in both]

    def show(self, back: Sequence[int]) -> None:
        """Say from now on that *back* (units per policy of the charges), which is about to be given back, remains."""
        shown = []
        for (_, policy), each, units in zip(counters_of(self.charges), numbers_of(self.reply or []), back, strict=True):
            reset = each.reset
            if units and policy.strategy == "gcra":
                reset = max(0, reset - units * policy.window * MICROSECONDS // policy.quota)
            remaining = min(policy.quota, each.remaining + units)
            shown.append(each._replace(remaining=remaining, reset=reset, retry=0) if units else each)
        self.reply, self._decision, self.rendered = reply_of(self.allowed, shown), None, None

    @property
    def receipts(self) -> list[int]:
        """One per policy of the charges, for giving back: negative where nothing was charged."""
        return charged_receipts(self.reply) if self.reply is not None and self.allowed else []
