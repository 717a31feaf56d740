"""Putting inputs of a request to the app: a flight, its answer read, and what it brings kept."""

from collections.abc import Sequence
from time import perf_counter

from ..time_slice import TimeSlice
from .origin.app_call import AppCall, AppReply, Untouched, inflated
from .origin.read_answer import SubRequest, read_answer
from .origin.single_flight import Flight, FlightResult
from .origin.waiters import Waiting
from .requests import http_caching as http
from .requests.question import Question
from .shared import Shared
from .storage.lookup import Stored


def ask_app(
    shared: Shared,
    untouched: Untouched,
    question: Question,
    found: Stored,
    names: Sequence[bytes],
    waiting: Waiting,
    *,
    refusal: str | None,
    joinable: bool,
    filling: bool = False,
) -> Flight | None:
    """Begin a flight for inputs of *question*; ``None`` when its wire format fails.

    Args:
        shared: Of the middleware.
        untouched: The request's scope as it came.
        question: What it asks.
        found: What its lookup found.
        names: The keys of the inputs.
        waiting: Who waits for it from the first.
        refusal: Why its answer is not kept, whatever it says.
        joinable: Whether others may join it.
        filling: Whether the lookup found none of its inputs.
    """
    wire, batch, identity, epoch = question.wire, question.batch, question.identity, found.epoch
    inputs = {name: question.inputs[name] for name in names}
    body: object
    try:
        body = wire.shrink(batch, list(inputs.values()))
    except Exception as error:
        body = error
    if not isinstance(body, bytes):
        shared.warnings.wire_format_fails(wire.name, "shrink", body)
        return None
    sent = untouched.headers
    half = shared.settings.EMBEDDING_CACHE_DTYPE == "float16"
    # An answer that is passed on as it is may be compressed for its client.
    gzip = names == question.slots and not half and http.accepts_gzip(sent)
    headers = http.for_sub_request(sent, len(body), gzip=gzip)
    limit = shared.settings.EMBEDDING_CACHE_MAX_RESPONSE_BYTES
    call = AppCall(shared.app, untouched, headers, body, limit=limit, budget=shared.budget)
    asked_at, began = shared.clock.wall(), perf_counter()
    flight = Flight(names, identity.lease_name, epoch, call, asked_at, filling=filling)
    model = found.lease.model if found.lease is not None else None
    is_in_key = shared.questions.headers.is_in_key
    asked = SubRequest(wire, batch, inputs, epoch, model, asked_at, half, is_in_key, refusal)
    call.reply.add_done_callback(lambda _: shared.counts.origin_seconds.observe(perf_counter() - began))

    async def read(reply: AppReply) -> FlightResult | None:
        now = shared.clock.wall()
        body, held = await inflated(reply, limit, shared.budget, TimeSlice())
        try:
            return await read_answer(asked, reply, body, now) if body is not None else None
        finally:
            shared.budget.give(held)

    async def write(landing: FlightResult) -> None:
        rule = landing.rule
        if rule.refusal is not None:
            _say_not_kept(shared, rule)
        elif not landing.is_stray:
            await shared.vectors.keep(
                identity, epoch, landing.values, landing.lease, repeatable=landing.repeatable, max_age=rule.max_age
            )

    # Before it begins, as an eager task may have ended when it is there.
    waiting.wait_for(flight)
    shared.flights.begin(flight, read, write, shared=joinable)
    return flight


def _say_not_kept(shared: Shared, rule: http.StorePermission) -> None:
    refusal = rule.refusal or ""
    shared.counts.rejected(refusal)
    if refusal == "response-no-store":
        shared.warnings.say("embedding_response_not_stored")
    elif refusal == "vary":
        shared.warnings.say("embedding_response_varies", header=rule.varies_by)
