"""Answers of the cache's own making: of what is kept alone,
or put together with what the app has just said.
"""

import os
from collections.abc import Sequence
from typing import Any

from ..time_slice import TimeSlice
from .answers.outcome import Outcome
from .answers.output import send_joined
from .answers.rendering import rendered
from .calls import AppCalls
from .origin.single_flight import Flight, FlightResult
from .origin.tokens import count_all, reported
from .records.lease import Lease
from .records.metrics import CacheResult
from .records.vectors import Encoding
from .requests import http_caching as http
from .requests.http_caching import RequestDirectives
from .requests.question import Question
from .shared import Shared
from .storage.lookup import Stored
from .wire import FreshFields, Usage


class Answers:
    """To one request. Each method that answers says whether it has:
    not where the wire format fails.

    Args:
        shared: Of the middleware.
        wanted: What the request's ``Cache-Control`` asks for.
        question: What the request asks.
        found: What is at hand.
        outcome: Where it is said.
        time_slice: Of the request.
    """

    def __init__(
        self,
        shared: Shared,
        wanted: RequestDirectives,
        question: Question,
        found: Stored,
        outcome: Outcome,
        time_slice: TimeSlice,
    ) -> None:
        self._shared = shared
        self._wanted = wanted
        self._question = question
        self._found = found
        self._outcome = outcome
        self._time_slice = time_slice

    async def hit(self, lease: Lease) -> bool:
        """Answer with what was found."""
        now = self._shared.clock.wall()
        end = self._shared.vectors.first_end(self._found.values, now)
        ttl = (f"ttl={max(0, int(end - now))}",) if end is not None else ()
        self._outcome.hits, self._outcome.misses = len(self._question.inputs), 0
        return await self.kept(lease, "hit", http.status("hit", *ttl))

    async def collapsed(self, lease: Lease) -> bool:
        """Answer with what was found, as another request has just brought the lease."""
        self._outcome.hits, self._outcome.misses = len(self._question.inputs), 0
        return await self.kept(lease, "stale", http.status("fwd=stale", "detail=lease", "collapsed"))

    async def kept(self, lease: Lease, result: CacheResult, member: str) -> bool:
        """Answer without a call of our own: with what the app said last to this caller."""
        shared, question, outcome = self._shared, self._question, self._outcome
        fresh = FreshFields(int(shared.clock.wall()), os.urandom(16).hex())
        tokens, counted = count_all(question.slots, self._found.values, question.inputs)
        usage = reported(tokens, outcome.billed, shared.settings.EMBEDDING_CACHE_USAGE)
        encodings = question.batch.encodings
        pieces = await self._rendered(lease.frame, encodings, usage, fresh)
        if pieces is None:
            return False
        outcome.tokens = tokens
        send = outcome.says(result, member)
        outcome.served(self._found.size, counted)
        await send_joined(send, lease.status, lease.headers, pieces, self._time_slice)
        return True

    async def merged(self, calls: AppCalls, flight: Flight, landing: FlightResult) -> bool:
        """Answer with what *flight*, the request's own, has brought, and with what was at hand."""
        outcome, question, values = self._outcome, self._question, self._found.values
        settings, refusal, shrunken = self._shared.settings, landing.rule.refusal, calls.is_shrunken(flight)
        if outcome.hits and refusal == "integers":
            # What was found is of another time: of the one kind nothing is stored.
            return False
        tokens, _ = count_all(question.slots, values, question.inputs)
        pieces: list[bytes] | None = None
        if shrunken or settings.EMBEDDING_CACHE_DTYPE == "float16":
            usage = Usage()
            if shrunken:
                usage = reported(tokens, outcome.billed, settings.EMBEDDING_CACHE_USAGE, counted=landing.tokens)
            pieces = await self._rendered(landing.lease.frame, landing.encodings, usage, None)
            if shrunken and pieces is None:
                return False
            if shrunken:
                calls.fitted()
        outcome.hits = len(question.inputs) - outcome.misses - outcome.collapsed
        outcome.tokens = tokens
        member = self.member(calls, landing)
        if self._wanted.lookup and not outcome.hits and refusal is not None:
            send = outcome.says("bypass", member, reason=refusal)
        else:
            send = outcome.says("stale" if calls.forced else "partial" if outcome.hits else "miss", member)
            saved = sum(values[name].tokens for name in question.slots if name not in landing.values)
            outcome.served(self._found.size, saved)
        if pieces is None:
            # Nothing was added, so the app's own words will do.
            await flight.call.relay(send)
        else:
            headers = http.less_body(landing.reply.headers)
            await send_joined(send, landing.reply.status, headers, pieces, self._time_slice)
        return True

    async def _rendered(
        self, frame: dict[str, Any], encodings: Sequence[Encoding], usage: Usage, fresh: FreshFields | None
    ) -> list[bytes] | None:
        vectors, warnings = self._shared.vectors, self._shared.warnings
        values = self._found.values
        return await rendered(
            vectors.local, warnings, self._question, values, frame, encodings, usage, fresh, self._time_slice
        )

    def member(self, calls: AppCalls, landing: FlightResult | None) -> str:
        """Our member of ``Cache-Status``; *landing*: our own sub-request's, if understood."""
        refusal = landing.rule.refusal if landing is not None else None
        stored = landing is not None and refusal is None and not landing.is_stray
        return self._outcome.member(
            stored=stored and self._shared.vectors.may_store(self._found.epoch),
            refusal=refusal,
            forced=calls.forced,
            anew=not self._wanted.lookup,
        )
