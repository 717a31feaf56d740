"""What a request says: whether it can be cached, and into which inputs it falls."""

import inspect
from collections.abc import Mapping

import orjson
from starlette.requests import HTTPConnection
from starlette.types import Scope

from . import http_caching as http
from .beside import refusal_beside, scope_of
from .body import Body
from .core import Core, PartitionBy
from .head import Head
from .pace import Pace
from .piecewise import TooManyValues, parse_request
from .routes import Matched
from .wire import ANY_CONTENT_TYPE, Batch, Input, Uncacheable
from .wire.content import is_inline, names_media

_MAX_BESIDE = 256 * 1024  # bytes of JSON
_SHOWN = 80  # characters of a name that a client chose


def head_refusal(head: Head, sent: http.RawHeaders, matched: Matched, limit: int) -> str | None:
    """Why a request passes through by its headers alone; ``None`` when its body, of *limit* bytes at most, decides."""
    if head.refusal is not None:
        return head.refusal
    if not head.is_json and matched.wire.name not in ANY_CONTENT_TYPE:
        return "not-json"
    return "too-large" if http.content_length(sent) > limit else None


async def partition_of(scope: Scope, partition_by: PartitionBy) -> str | None:
    """What the user's callable says; its exceptions are the app's to handle.

    Raises:
        TypeError: When it says something other than a text or ``None``.
    """
    partition = partition_by(HTTPConnection(scope))
    if inspect.isawaitable(partition):
        partition = await partition
    if partition is not None and not isinstance(partition, str):
        kind = type(partition).__name__
        raise TypeError(f"partition_by returned {kind}. Return a str, or None to pass through.")
    return partition


async def split(core: Core, matched: Matched, body: Body, pace: Pace) -> Batch | Uncacheable:
    """Cut a request into inputs, or say why not; hostile input raises nothing."""
    settings = core.settings
    if body.content is None:
        if body.coming is None and body.messages[-1]["type"] != "http.request":
            return Uncacheable("not-understood")  # the client has gone
        held = sum(len(message.get("body", b"")) for message in body.messages)
        too_large = body.coming is None and held > settings.EMBEDDING_CACHE_MAX_REQUEST_BYTES
        return Uncacheable("too-large" if too_large else "busy")
    try:
        fields = await parse_request(body.content, settings.EMBEDDING_CACHE_MAX_INPUTS, pace)
    except orjson.JSONDecodeError:
        return Uncacheable("not-json")
    except TooManyValues:
        return Uncacheable("too-large")
    if not isinstance(fields, dict):
        return Uncacheable("not-understood")
    if pace.due:
        await pace.rest()
    if _has_too_many(fields, settings.EMBEDDING_CACHE_MAX_INPUTS):
        return Uncacheable("too-large")
    if _wants_no_cache(fields.get("cache")):
        return Uncacheable("no-store")
    try:
        batch = matched.wire.split(fields, matched.path_model)
        if isinstance(batch, Batch):
            refusal = _refused(core, batch, len(body.content))
            if refusal is not None and refusal.field:
                _say_item_lists(core, refusal.field)
            if refusal is None:
                batch.scope = scope_of(batch, core.ignored)
            return refusal or batch
        if isinstance(batch, Uncacheable):
            return batch
        failure = f"{type(batch).__name__} from split"
    except Exception as error:
        failure = type(error).__name__
    # Fails open: whatever a client sends, a wire format's mistake is no error of the app.
    core.say_once("redis_asgi.embedding_request_unreadable", wire_format=matched.wire.name, failure=failure)
    return Uncacheable("not-understood")


def _wants_no_cache(cache: object) -> bool:
    """Whether a body says, as LiteLLM's may, what a request's ``Cache-Control`` says elsewhere."""
    return isinstance(cache, dict) and any(cache.get(name) for name in ("no-cache", "no-store"))


def _refused(core: Core, batch: Batch, size: int) -> Uncacheable | None:
    if len(batch.inputs) > core.settings.EMBEDDING_CACHE_MAX_INPUTS or _holds_much(batch, size):
        return Uncacheable("too-large")
    # Nothing to embed is not ours to answer.
    if not (batch.inputs and batch.encodings):
        return Uncacheable("not-understood")
    if names_media(batch.fields) and not all(_is_content(item) for item in batch.inputs):
        return Uncacheable("not-understood")
    return refusal_beside(batch, core.request_lists)


def _is_content(item: Input) -> bool:
    """Whether an input of a request about images, audio or video is the content, and no name of it."""
    if item.kind == b"s":
        return is_inline(item.canonical.decode())
    return not item.canonical.startswith(b'{"text"')


def _say_item_lists(core: Core, field: str) -> None:
    core.say_once(
        "redis_asgi.embedding_item_lists",
        about=field[:_SHOWN],
        fix="It is as long as the inputs, and may belong to them one by one, so such requests pass through. "
        "If it belongs to the whole request, add it to EMBEDDING_CACHE_REQUEST_LISTS.",
    )


def _has_too_many(fields: Mapping[str, object], limit: int) -> bool:
    """Whether some field lists more texts, arrays or objects than a batch may have; before each is looked at."""
    lists = (value for value in fields.values() if isinstance(value, list))
    return any(len(value) > limit and isinstance(value[0], str | list | dict) for value in lists)


def _holds_much(batch: Batch, size: int) -> bool:
    """Whether what stands beside the inputs is long: parsed it takes up to thirty times its bytes, until the answer."""
    return size > _MAX_BESIDE and len(orjson.dumps(batch.fields)) > _MAX_BESIDE
