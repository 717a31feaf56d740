"""One request to an embedding endpoint, from its body to its last byte.

Read, look up, join, forward, merge, send: `Exchange.run` is the story, in that order. Whatever goes wrong
before the app has been asked ends in `_bypass`: the app gets the original bytes.
"""

import asyncio
import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..errors import Failure
from . import http_caching as http
from .body import Body, read_body
from .codec import NO_EPOCH, Value
from .core import Core, Identity
from .counts import Counted, Result
from .landing import Asked, read_reply
from .lease import Lease, shortest
from .lookup import Found, look_up
from .pace import Pace
from .reading import head_refusal, partition_of, split
from .result import EmbeddingCacheResult
from .routes import Matched
from .sending import send_joined, send_not_cached, with_status
from .single_flight import Flight, Landing
from .sub_call import Reply, SubCall
from .tokens import count_all, reported
from .vectors import Encoding, text_of
from .waiting import Waiting
from .wire import WIRE_FORMATS, Batch, Fresh, Input, Uncacheable, Usage

_OF_THE_WHOLE_REQUEST = (400, 413, 422)  # may be about the request we made smaller, not about the client's
_SUCCESS = 2  # hundred and something
_NAMES_AT_ONCE = 64  # keys made between two looks at the clock


class Exchange:
    """See the module; everything of one request lives here and ends with it."""

    def __init__(self, core: Core, matched: Matched, scope: Scope, receive: Receive, send: Send) -> None:
        self._core = core
        self._wire = matched.wire
        self._matched = matched
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers: http.RawHeaders = scope["headers"]
        self._fields = http.by_name(self._headers)
        self._wanted = http.wanted(self._fields)
        self._body = Body((), None)
        self._batch: Batch
        self._identity: Identity | None = None
        self._found = Found()
        self._slots: list[bytes] = []  # one key per input sent
        self._inputs: dict[bytes, Input] = {}  # different inputs by key, in the order sent
        self._values: dict[bytes, Value] = {}
        self._hits = 0
        self._collapsed = 0
        self._billed = 0  # tokens the app counted for this request
        self._forced = False  # something is forwarded only because there is no lease
        self._waiting = Waiting()
        self._pace = Pace()
        self._own: list[Flight] = []
        self._replayed: Flight | None = None
        self._counted = Counted(core.counts)
        self._looked_up = False  # and the request is answered with what was found
        self._found_bytes = 0

    async def run(self) -> None:
        """Answer the request, and count it."""
        try:
            await self._run()
        finally:
            if self._looked_up:
                misses = len(self._inputs) - self._hits - self._collapsed
                self._core.counts.items.add(self._hits, misses, self._collapsed)
            self._counted.end()

    async def _run(self) -> None:
        core = self._core
        detail = head_refusal(self._fields, self._matched, core.settings)
        if detail is not None:
            await self._bypass(detail)
            return
        partition_by, partition = core.options.partition_by, None
        if partition_by is not None:
            partition = await partition_of(self._scope, partition_by)
            if partition is None:
                self._counted.turns_out("bypass", "partition")
                await core.app(self._scope, self._receive, self._send)
                return
        limit = core.settings.EMBEDDING_CACHE_MAX_REQUEST_BYTES
        self._body, held = await read_body(self._receive, limit, core.budget)
        try:
            await self._run_with_body(partition)
        finally:
            core.budget.give(held)

    async def _run_with_body(self, partition: str | None) -> None:
        self._pace.begin()
        batch = await split(self._core, self._matched, self._body, self._pace)
        if isinstance(batch, Uncacheable):
            await self._bypass(batch.detail)
            return
        self._batch = batch
        try:
            self._identity = self._core.identify(self._scope, self._fields, self._wire, batch, partition)
            await self._name_inputs(self._identity)
        except Exception as error:
            self._say_broken("split", error)
            await self._bypass("not-understood")
            return
        if not self._wanted.store:
            await self._bypass("no-store")
            return
        found = await look_up(self._core, self._identity, self._inputs, self._wanted, batch.encodings, self._pace)
        if isinstance(found, Failure):
            await self._bypass("redis-down")
            return
        self._found, self._values = found, found.values
        self._looked_up = True
        self._found_bytes = sum([len(value.raw) for value in found.values.values()])
        some_missing = len(self._values) < len(self._inputs)
        missing = [name for name in self._inputs if name not in self._values] if some_missing else []
        self._hits = len(self._inputs) - len(missing)
        if not self._fits():
            await self._start_over(self._identity)
        elif not missing and self._core.lease_left(self._found.lease) > 0:
            await self._answer_hit()
        elif self._wanted.only_if_cached:
            self._looked_up = False
            self._counted.turns_out("miss")
            await send_not_cached(self._send)
        else:
            await self._forward(self._identity, missing)

    async def _name_inputs(self, identity: Identity) -> None:
        pace = self._pace
        for start in range(0, len(self._batch.inputs), _NAMES_AT_ONCE):
            items = self._batch.inputs[start : start + _NAMES_AT_ONCE]
            names = self._core.input_names(identity, items)
            self._slots += names
            self._inputs.update(zip(names, items, strict=True))
            if pace.due:
                await pace.rest()

    def _fits(self) -> bool:
        """Whether all vectors at hand are of one length."""
        return len({value.dims for value in self._values.values()}) <= 1

    # Asking the app.

    async def _forward(self, identity: Identity, missing: list[bytes]) -> None:
        """Join what is under way, forward the rest, and answer with all of it."""
        joined = self._join(missing)
        own = [name for name in missing if name not in joined]
        # With another max-age, or without no-cache, they may be stored after all.
        filling = self._wanted.lookup and self._wanted.max_age is None and bool(own)
        if not own and self._must_ask(identity, joined):
            names = list(self._inputs)
            own = [names[shortest([len(self._inputs[name].canonical) for name in names])]]
            joined.pop(own[0], None)
            self._forced = not missing
        self._collapsed = len(joined)
        self._note("partial" if self._hits else "miss", misses=len(own))
        self._counted.turns_out("stale" if self._forced else "partial" if self._hits else "miss")
        flight = self._begin(identity, own, shared=True, filling=filling) if own else None
        if own and flight is None:
            await self._bypass("not-understood")
            return
        for other in set(joined.values()):
            self._waiting.wait_for(other)
        self._waiting.watch(self._receive)
        cancelled = True
        try:
            await self._answer_with(identity, flight, joined)
            cancelled = False
        finally:
            for flown in self._own:
                flown.call.discard()
            self._waiting.end(cancelled=cancelled)
        for mine in self._own:
            if mine.task is not None:
                await asyncio.shield(mine.task)
            if mine.call.error is not None and mine is not self._replayed and not mine.call.cancelled:
                self._counted.turns_out("error")
                raise mine.call.error

    def _join(self, missing: Sequence[bytes]) -> dict[bytes, Flight]:
        if not self._wanted.lookup:
            return {}
        joined: dict[bytes, Flight] = {}
        flights, asked_at = self._core.flights, self._found.asked_at
        for name in missing:
            flight = self._found.flights.get(name) or flights.find(name, asked_at)
            if flight is not None and flight.joinable(self._found.epoch, len(self._inputs)):
                joined[name] = flight
        return joined

    def _must_ask(self, identity: Identity, joined: dict[bytes, Flight]) -> bool:
        """Whether the app itself has to see this caller although others bring all that is missing."""
        if not joined or self._core.options.lease == 0:
            return True
        # Whom the app has refused since then, it has to see again.
        name, denials = identity.lease_name, self._core.denials
        same_caller = any(f.lease_name == name and not denials.since(name, f.asked_at) for f in joined.values())
        return not same_caller and self._core.lease_left(self._found.lease) <= 0

    def _begin(
        self, identity: Identity, names: Sequence[bytes], *, shared: bool, filling: bool = False
    ) -> Flight | None:
        core = self._core
        inputs = {name: self._inputs[name] for name in names}
        body: object
        try:
            body = self._wire.shrink(self._batch, list(inputs.values()))
        except Exception as error:
            body = error
        if not isinstance(body, bytes):
            self._say_broken("shrink", body)
            return None
        scope = {**self._scope, "headers": http.for_sub_request(self._headers, len(body))}
        limit = core.settings.EMBEDDING_CACHE_MAX_RESPONSE_BYTES
        call = SubCall(core.app, scope, body, limit=limit, budget=core.budget)
        asked_at, began = core.wall(), perf_counter()
        flight = Flight(names, identity.lease_name, self._found.epoch, call, asked_at, filling=filling)
        half = core.settings.EMBEDDING_CACHE_DTYPE == "float16"
        asked = Asked(self._wire, self._batch, inputs, self._found.epoch, half, core.keyed)
        call.reply.add_done_callback(lambda _: core.counts.origin_seconds.observe(perf_counter() - began))

        async def read(reply: Reply) -> Landing | None:
            return await read_reply(asked, reply, core.wall())

        async def write(landing: Landing) -> None:
            await core.keep(identity, landing, asked_at, flight.epoch)

        self._own.append(flight)
        self._waiting.wait_for(flight)
        core.flights.begin(flight, read, write, shared=shared)
        return flight

    # Answering.

    async def _answer_with(self, identity: Identity, flight: Flight | None, joined: dict[bytes, Flight]) -> None:
        landing: Landing | None = None
        lease = self._found.lease
        if flight is not None:
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(identity, flight)
                return
        leftover: list[bytes] = []
        for name, other in joined.items():
            brought = await asyncio.shield(other.landed)
            if brought is None:
                leftover.append(name)
                continue
            self._values[name] = brought.values[name]
            if other.lease_name == identity.lease_name:
                lease = brought.lease
        if leftover:
            if self._waiting.gone:
                return
            # An error is always the app's answer to the request that gets it: ask, and join nobody.
            self._collapsed -= len(leftover)
            flight = self._begin(identity, leftover, shared=False)
            if flight is None:
                await self._bypass("not-understood")
                return
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(identity, flight)
                return
        if not self._fits():
            await self._start_over(identity)
        elif landing is not None and flight is not None:
            await self._answer_merged(flight, landing)
        elif lease is not None:
            await self._answer_from(lease, self._member(None))

    async def _landing_of(self, flight: Flight) -> Landing | None:
        landing = await asyncio.shield(flight.outcome)
        if landing is not None:
            self._values.update(landing.values)
            self._billed += landing.tokens or 0
        return landing

    async def _relay(self, identity: Identity, flight: Flight) -> None:
        """Pass on an answer that was not understood, or put the original request to the app instead."""
        status = flight.call.status
        if status is None:  # the app has raised, or not answered; `_forward` raises again
            if not self._waiting.gone:
                self._counted.turns_out("error")
            return
        if status in (401, 403):
            await self._core.deny(identity)
        understandable = status // 100 == _SUCCESS
        self._core.counts.rejected("not-understood" if understandable else "status")
        if self._is_shrunken(flight) and (understandable or status in _OF_THE_WHOLE_REQUEST):
            await self._replay(flight)
            return
        self._note("bypass" if understandable else "miss", misses=len(flight.names))
        self._counted.turns_out(*(("bypass", "not-understood") if understandable else ("error",)))
        member = http.status("fwd=bypass", detail="not-understood") if understandable else self._member(None)
        await flight.call.relay(self._with_status(member))

    async def _replay(self, flight: Flight) -> None:
        await flight.call.give_up()
        self._replayed = flight
        await self._bypass("replayed")

    def _is_shrunken(self, flight: Flight) -> bool:
        """Whether the sub-request is not, input by input, what the client sent."""
        return list(flight.names) != self._slots

    async def _start_over(self, identity: Identity) -> None:
        """Vectors of several lengths for one scope: the model behind the name has changed."""
        self._core.say_once(
            "redis_asgi.embedding_lengths_differ",
            model=self._batch.model[:80],
            fix="Set EMBEDDING_CACHE_NAMESPACE to your model and its revision.",
        )
        await self._core.renew_epoch(identity)
        await self._bypass("replayed")

    async def _answer_hit(self) -> None:
        now = self._core.wall()
        end = self._core.first_end(self._values, now)
        ttl = (f"ttl={max(0, int(end - now))}",) if end is not None else ()
        if self._found.lease is not None:
            await self._answer_from(self._found.lease, http.status("hit", *ttl))

    async def _answer_from(self, lease: Lease, member: str) -> None:
        """Answer without a call of our own: with what the app said last time to this caller."""
        fresh = Fresh(int(self._core.wall()), os.urandom(16).hex())
        tokens, counted = count_all(self._slots, self._values, self._inputs)
        usage = reported(tokens, self._billed, self._core.settings.EMBEDDING_CACHE_USAGE)
        pieces = await self._pieces(lease.frame, self._batch.encodings, usage, fresh)
        if pieces is None:
            await self._bypass("not-understood")
            return
        outcome: Result = "hit" if not self._collapsed else "partial" if self._hits else "miss"
        self._note(outcome, tokens=tokens)
        self._serve(outcome, counted)
        await send_joined(self._with_status(member), lease.headers, pieces, self._pace)

    async def _answer_merged(self, flight: Flight, landing: Landing) -> None:
        if self._hits and landing.refusal == "integers":
            # What was found is of another time: of the one kind nothing is stored.
            await self._replay(flight)
            return
        member = self._member(landing)
        half = self._core.settings.EMBEDDING_CACHE_DTYPE == "float16"
        tokens, _ = count_all(self._slots, self._values, self._inputs)
        pieces: list[bytes] | None = None
        if half or self._is_shrunken(flight):
            mode = self._core.settings.EMBEDDING_CACHE_USAGE
            usage = reported(tokens, self._billed, mode, counted=landing.tokens)
            usage = usage if self._is_shrunken(flight) else Usage()
            pieces = await self._pieces(landing.frame, landing.encodings, usage, None)
            if pieces is None and self._is_shrunken(flight):
                await self._replay(flight)
                return
        outcome: Result = "partial" if self._hits else "miss"
        self._note(outcome, misses=len(landing.values), tokens=tokens)
        if self._wanted.lookup and not self._hits and landing.refusal is not None:
            self._counted.turns_out("bypass", landing.refusal)
        else:
            saved = sum(self._values[name].tokens for name in self._slots if name not in landing.values)
            self._serve("stale" if self._forced else outcome, saved)
        if pieces is None:
            # Nothing was added, so the app's own words will do.
            await flight.call.relay(self._with_status(member))
            return
        await send_joined(self._with_status(member), landing.reply.headers, pieces, self._pace)

    def _serve(self, result: Result, saved_tokens: int) -> None:
        """Count an answer that the app did not compute, or not all of it."""
        self._counted.turns_out(result)
        self._counted.served(self._found_bytes, saved_tokens)

    @property
    def _may_store(self) -> bool:
        return self._found.epoch != NO_EPOCH and self._core.store.writable

    def _member(self, landing: Landing | None) -> str:
        """Our member of ``Cache-Status``; *landing*: our own sub-request's, if understood."""
        stored: tuple[str, ...] = ()
        if landing is not None and landing.refusal is None and self._may_store:
            stored = ("stored",)
        misses = len(self._inputs) - self._hits - self._collapsed
        if self._forced:
            return http.status("fwd=stale", "detail=lease", *stored)
        if not self._wanted.lookup:
            return http.status("fwd=request", *stored)
        if self._hits:
            collapsed = f" collapsed={self._collapsed}" if self._collapsed else ""
            return http.status("fwd=partial", *stored, detail=f"hit={self._hits} miss={misses}{collapsed}")
        if landing is not None and landing.refusal is not None:
            return http.status("fwd=bypass", detail=landing.refusal)
        return http.status("fwd=miss", *stored, *(("collapsed",) if self._collapsed else ()))

    async def _pieces(
        self, frame: dict[str, Any], encodings: Sequence[Encoding], usage: Usage, fresh: Fresh | None
    ) -> list[bytes] | None:
        """The answer's body; ``None`` when the wire format fails."""
        texts = await self._texts(encodings)
        pieces: object
        try:
            pieces = self._wire.render(self._batch, frame, texts, usage, fresh)
        except Exception as error:
            pieces = error
        # Looking at each piece is a thirtieth of a hit from the process, so ours are believed.
        ours = WIRE_FORMATS.get(self._wire.name) is self._wire
        if isinstance(pieces, list) and (ours or {*map(type, pieces)} == {bytes}):
            return list(pieces)
        self._say_broken("render", pieces)
        return None

    async def _texts(self, encodings: Sequence[Encoding]) -> dict[Encoding, list[bytes]]:
        pace, keep = self._pace, self._core.local.on or len(self._slots) > len(self._inputs)
        texts: dict[Encoding, list[bytes]] = {encoding: [] for encoding in encodings}
        for encoding, listed in texts.items():
            for name in self._slots:
                value = self._values[name]
                text = value.texts.get(encoding)
                if text is None:
                    text = text_of(value, encoding, keep=keep)
                    self._core.local.weigh(name, value)
                    if pace.due:
                        await pace.rest()
                listed.append(text)
        return texts

    async def _bypass(self, detail: str) -> None:
        """Let the app answer the original request, to the byte."""
        self._looked_up = False
        self._counted.turns_out("bypass", detail)
        if self._wanted.only_if_cached and detail in ("no-store", "redis-down", "replayed"):
            await send_not_cached(self._send)
            return
        await self._waiting.stop_watching()
        if self._waiting.gone:
            return  # the app would compute for nobody, and a server may say only once that its client has gone
        self._note("bypass")
        send = self._with_status(http.status("fwd=bypass", detail=detail))
        identity = self._identity

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (401, 403) and identity is not None:
                await self._core.deny(identity)
            await send(message)

        await self._core.app(self._scope, self._body.replay(self._receive), watched)

    def _say_broken(self, step: str, result: object) -> None:
        """A wire format may be the user's, and its mistake is no error of the app."""
        name, got = self._wire.name, type(result).__name__
        self._core.say_once("redis_asgi.embedding_wire_format_fails", wire_format=name, step=step, got=got)

    def _with_status(self, member: str) -> Send:
        return with_status(self._send, member) if self._core.settings.EMBEDDING_CACHE_STATUS else self._send

    def _note(self, outcome: Any, *, misses: int = 0, tokens: int = 0) -> None:
        collapsed = self._collapsed
        result = EmbeddingCacheResult(outcome, self._hits, misses, collapsed, tokens, self._billed)
        self._scope["state"]["embedding_cache_result"] = result
