"""Reading an app's answer: every vector checked, placed, and made ready for the store."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson

from ...events import say
from ...keys import key_mark
from ...time_slice import TimeSlice
from ..records.codec import Flag, Value, encode
from ..records.keys import mark_of
from ..records.lease import Lease
from ..records.vectors import Encoding, Parsed, narrowed, read_base64, read_floats, trimmed
from ..requests.chunked_json import Skeleton, in_turns, parse_whole, take_apart
from ..requests.http_caching import StorePermission, by_name, replayed, storable
from ..wire import Answer, Batch, Input, WireFormat
from .app_call import AppReply
from .single_flight import FlightResult
from .tokens import apportion

logger = logging.getLogger("redis_asgi.embeddings")


@dataclass(frozen=True, slots=True)
class SubRequest:
    """The part of a sub-request that the reading of its answer depends on.

    Attributes:
        wire: The wire format.
        batch: The original request.
        inputs: What was forwarded, by key.
        epoch: What the lookup saw.
        model: What the caller's living lease names; ``None`` without one.
        asked_at: Unix seconds.
        half: Whether float16 is stored.
        is_in_key: Whether a request header is in the keys.
        refusal: Why the answer is not stored, whatever it says; ``None`` = nothing is against it.
    """

    wire: WireFormat
    batch: Batch
    inputs: Mapping[bytes, Input]
    epoch: bytes
    model: str | None
    asked_at: float
    half: bool
    is_in_key: Callable[[bytes], bool]
    refusal: str | None


async def read_answer(asked: SubRequest, reply: AppReply, body: bytes, now: float) -> FlightResult | None:
    """Read *reply* with its *body*, received *now* (Unix seconds);
    ``None`` when it is not understood as a whole.
    """
    try:
        return await _read(asked, reply, body, now)
    except Exception as error:
        # Fails open: a wire format may be the user's,
        # and an answer it cannot read is relayed as it is.
        say(logger, "embedding_answer_unreadable", error, wire_format=asked.wire.name)
        return None


async def _read(asked: SubRequest, reply: AppReply, body: bytes, now: float) -> FlightResult | None:
    inputs = list(asked.inputs.values())
    for parse in (take_apart, parse_whole):
        skeleton = await in_turns(parse(body), TimeSlice())
        if skeleton is None:
            continue
        answer = asked.wire.read(asked.batch, inputs, skeleton.document)
        # Each text taken out must be exactly one vector; if not,
        # it was something else: parse as a whole.
        if answer is not None and _all_placed(answer, skeleton):
            return await _land(asked, reply, answer, skeleton, now)
        if not skeleton.spans:
            return None
    return None


def _all_placed(answer: Answer, skeleton: Skeleton) -> bool:
    placed = [v for values in answer.values.values() for v in values if isinstance(v, str) and v in skeleton.spans]
    return len(placed) == len(skeleton.spans) == len(set(placed))


async def _land(
    asked: SubRequest, reply: AppReply, answer: Answer, skeleton: Skeleton, now: float
) -> FlightResult | None:
    time_slice = TimeSlice()
    inputs = list(asked.inputs.values())
    tokens = apportion(answer.tokens, inputs)
    rule = storable(by_name(reply.headers), asked.is_in_key)
    if rule.refusal is None and asked.refusal is not None:
        rule = StorePermission(asked.refusal)
    mark = mark_of(asked.epoch, answer.model)
    is_stray = asked.model is not None and answer.model != asked.model
    encodings = tuple(answer.values)
    values: dict[bytes, Value] = {}
    dims = 0
    # One vector may be of zeros and ones by chance; where all are, they are quantised.
    integers = True
    if any(len(listed) != len(inputs) for listed in answer.values.values()):
        return None
    for at, name in enumerate(asked.inputs):
        texts: dict[str, bytes] = {}
        parsed: Parsed | None = None
        for encoding in encodings:
            read = _read_vector(answer.values[encoding][at], encoding, skeleton, texts)
            if read is None or (dims and len(read.numbers) != dims):
                return None
            dims = len(read.numbers)
            # Of several representations the floats say most.
            parsed = read if parsed is None or encoding is Encoding.FLOAT else parsed
        if parsed is None:
            return None
        integers = integers and parsed.integers
        if asked.half and not parsed.integers:
            parsed, texts = narrowed(parsed), {}
        count = tokens[at] if tokens is not None else None
        flags = parsed.flags | (Flag.TOKENS_EXACT if count is not None and count.exact else 0)
        flags |= Flag.CAPPED if rule.max_age is not None else 0
        values[name] = encode(
            parsed.numbers,
            born=now,
            own=key_mark(name),
            epoch=mark,
            tokens=count.tokens if count is not None else None,
            flags=flags,
            texts=texts,
        )
        if time_slice.expired:
            await time_slice.checkpoint()
    if integers and rule.refusal is None:
        rule = StorePermission("integers")
    lease = Lease(asked.asked_at, now, reply.status, answer.model, tuple(replayed(reply.headers)), answer.frame)
    return FlightResult(values, encodings, lease, mark, reply, answer.tokens, rule, answer.repeatable, is_stray)


def _read_vector(value: object, encoding: Encoding, skeleton: Skeleton, texts: dict[str, bytes]) -> Parsed | None:
    if encoding is Encoding.BASE64:
        read = read_base64(value)
        if read is not None:
            texts[encoding] = b'"%b"' % str(value).encode()
        return read
    span = skeleton.spans.get(value) if isinstance(value, str) else None
    if span is None:
        read = read_floats(value)
        if read is not None and read.integers:
            texts[encoding] = trimmed(orjson.dumps(value))  # not stored, and relayed as they are
        return read
    try:
        read = read_floats(orjson.loads(span))
    except orjson.JSONDecodeError:
        return None
    texts[encoding] = span
    return read
