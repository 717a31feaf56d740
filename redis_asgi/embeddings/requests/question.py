"""A request's question: whether it can be cached,
into which inputs it falls, and the key of each. No I/O.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import orjson
from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.bodies import Document
from ...time_slice import TimeSlice
from ..records.keys import RecordKeys
from ..records.novelty import Novelty
from ..records.options import Options, PartitionBy
from ..records.warnings import Warnings
from ..wire import ANY_CONTENT_TYPE, WIRE_FORMATS, Batch, Input, Uncacheable, WireFormat
from ..wire.content import is_inline, names_media
from . import http_caching as http
from .body import Body
from .chunked_json import TooManyValues, parse_request
from .head import Head, Heads, SaidByHead
from .headers import HeaderClass, Headers
from .keyspace import Identities, Route
from .parallel_lists import names_of, refusal_beside, scope_of, values
from .routes import Endpoint

_NAMES_AT_ONCE = 64  # keys made between two looks at the clock
_MAX_BESIDE = 256 * 1024  # bytes of JSON
_SHOWN = 80  # characters of a name that a client chose
# What is remembered of requests: a search sends a query or two, and often one that was sent before.
_MAX_MEMORISED = 256
_MEMORISED_BYTES = 4 * 1024
_MEMORISED_INPUTS = 8


@dataclass(frozen=True, slots=True)
class Question:
    """One request's, and that of all that say the same.

    Attributes:
        wire: The format it is in.
        batch: What it says.
        told: What its headers say.
        identity: Whose it is.
        slots: One key per input sent.
        inputs: Different inputs by key, in the order sent.
    """

    wire: WireFormat
    batch: Batch
    told: SaidByHead
    identity: RecordKeys
    slots: Sequence[bytes]
    inputs: Mapping[bytes, Input]


class Questions:
    """Reads the requests of one middleware.

    Args:
        options: Its configuration.
        warnings: What it has warned of.

    Attributes:
        headers: The classes of its headers.
    """

    def __init__(self, options: Options, warnings: Warnings) -> None:
        settings = options.settings
        partitioned = options.partition_by is not None
        self.headers = Headers(settings, shared=options.share or partitioned)
        self._heads = Heads(self.headers)
        self._identities = Identities(
            settings,
            namespace=options.namespace,
            share=options.share,
            trusting=options.lease is None,
        )
        self._warnings = warnings
        self._max_bytes = settings.EMBEDDING_CACHE_MAX_REQUEST_BYTES
        self._max_inputs = settings.EMBEDDING_CACHE_MAX_INPUTS
        self._ignored = names_of(settings.EMBEDDING_CACHE_IGNORED_FIELDS)
        self._request_lists = names_of(settings.EMBEDDING_CACHE_REQUEST_LISTS)
        self._novelty = Novelty()
        self._memorised: dict[tuple[object, ...], Question] = {}

    def clear(self) -> None:
        """Forget which parts of keys are new in every request."""
        self._novelty = Novelty()

    def head_of(self, scope: Scope) -> Head:
        """The headers of a request, read."""
        return self._heads.read(scope["headers"])

    def refused_head(self, head: Head, scope: Scope, matched: Endpoint) -> str | None:
        """The reason why a request passes through by its headers alone;
        ``None`` when its body decides.
        """
        if head.refusal is not None:
            return head.refusal
        if not head.is_json and matched.wire.name not in ANY_CONTENT_TYPE:
            return "not-json"
        return "too-large" if http.content_length(scope["headers"]) > self._max_bytes else None

    async def read(
        self,
        scope: Scope,
        head: Head,
        matched: Endpoint,
        body: Body,
        partition: str | None,
        time_slice: TimeSlice,
        parsed: Document | None = None,
    ) -> Question | Uncacheable:
        """Cut a request into inputs and name them, or say why not; hostile input raises nothing.

        Args:
            parsed: The body as a middleware outside has parsed it, if one has.
        """
        content = body.content
        if content is None:
            return self._unread(body)
        route = self._identities.route_of(scope, head.told)
        said = (matched.wire.name, matched.path_model, route, head, partition, content)
        question = self._memorised.get(said)
        if question is not None:
            return question
        batch = await self._split(matched, content, time_slice, parsed)
        if isinstance(batch, Uncacheable):
            return batch
        try:
            question = await self._name(route, head, matched.wire, batch, partition, time_slice)
        except Exception as error:
            self._warnings.wire_format_fails(matched.wire.name, "split", error)
            return Uncacheable("not-understood")
        # A format of the user's may do with a batch what it likes.
        if WIRE_FORMATS.get(matched.wire.name) is matched.wire and len(question.slots) <= _MEMORISED_INPUTS:
            self._memorise(said, question, sum([len(part) for part in (*route, partition, content) if part]))
        return question

    def is_defeated_by(self, question: Question, query: bytes) -> bool:
        """Whether something in the key is new in every request,
        so that nothing that is stored is found again.
        """
        identity = question.identity
        again = identity.marks is not None
        if identity.marks is None:
            identity.marks = self._novelty.marks(question.told.keyed, values(question.batch, self._ignored), query)
        return self._novelty.defeats(identity.marks, again=again, is_credential=self._is_credential)

    def denied_name(self, scope: Scope, head: Head) -> bytes:
        """The key of when the app last did not know the caller, whatever his request is."""
        return self._identities.denied_name(scope, head.told)

    def _is_credential(self, name: bytes) -> bool:
        return self.headers.class_of(name) is HeaderClass.CREDENTIAL

    def _memorise(self, said: tuple[object, ...], question: Question, size: int) -> None:
        if size > _MEMORISED_BYTES:
            return
        self._memorised[said] = question
        if len(self._memorised) > _MAX_MEMORISED:
            # The oldest; loops in several threads may share one middleware.
            with suppress(KeyError, RuntimeError):
                del self._memorised[next(iter(self._memorised))]

    def _unread(self, body: Body) -> Uncacheable:
        if body.coming is None and body.messages[-1]["type"] != "http.request":
            return Uncacheable("not-understood")  # the client has gone
        held = sum(len(message.get("body", b"")) for message in body.messages)
        too_large = body.coming is None and held > self._max_bytes
        return Uncacheable("too-large" if too_large else "busy")

    async def _split(
        self, matched: Endpoint, content: bytes, time_slice: TimeSlice, parsed: Document | None
    ) -> Batch | Uncacheable:
        try:
            if parsed is not None and parsed.content == content:
                fields = parsed.value
            else:
                fields = await parse_request(content, self._max_inputs, time_slice)
        except orjson.JSONDecodeError:
            return Uncacheable("not-json")
        except TooManyValues:
            return Uncacheable("too-large")
        if not isinstance(fields, dict):
            return Uncacheable("not-understood")
        if time_slice.expired:
            await time_slice.checkpoint()
        if self._has_too_many(fields):
            return Uncacheable("too-large")
        if _wants_no_cache(fields.get("cache")):
            return Uncacheable("no-store")
        try:
            batch = matched.wire.split(fields, matched.path_model)
            if isinstance(batch, Batch):
                refusal = self._refused(batch, len(content))
                if refusal is not None and refusal.field:
                    self._say_item_lists(refusal.field)
                if refusal is None:
                    batch.scope = scope_of(batch, self._ignored)
                return refusal or batch
            if isinstance(batch, Uncacheable):
                return batch
            failure = f"{type(batch).__name__} from split"
        except Exception as error:
            failure = type(error).__name__
        # Fails open: whatever a client sends, a wire format's mistake is no error of the app.
        self._warnings.say("embedding_request_unreadable", wire_format=matched.wire.name, failure=failure)
        return Uncacheable("not-understood")

    async def _name(
        self, route: Route, head: Head, wire: WireFormat, batch: Batch, partition: str | None, time_slice: TimeSlice
    ) -> Question:
        """Name the inputs of *batch*; raises whatever a user's wire format has put into it."""
        identity = self._identities.identify(route, head.told, wire, batch, partition)
        slots: list[bytes] = []
        inputs: dict[bytes, Input] = {}
        for start in range(0, len(batch.inputs), _NAMES_AT_ONCE):
            items = batch.inputs[start : start + _NAMES_AT_ONCE]
            names = self._identities.input_names(identity, items)
            slots += names
            inputs.update(zip(names, items, strict=True))
            if time_slice.expired:
                await time_slice.checkpoint()
        return Question(wire, batch, head.told, identity, slots, inputs)

    def _refused(self, batch: Batch, size: int) -> Uncacheable | None:
        if len(batch.inputs) > self._max_inputs or _holds_much(batch, size):
            return Uncacheable("too-large")
        # Nothing to embed is not ours to answer.
        if not (batch.inputs and batch.encodings):
            return Uncacheable("not-understood")
        if names_media(batch.fields) and not all(_is_content(item) for item in batch.inputs):
            return Uncacheable("not-understood")
        return refusal_beside(batch, self._request_lists)

    def _has_too_many(self, fields: Mapping[str, object]) -> bool:
        """Whether some field lists more than a batch may have of texts,
        arrays or objects; before any is looked at.
        """
        lists = [value for value in fields.values() if isinstance(value, list)]
        return any(len(value) > self._max_inputs and isinstance(value[0], str | list | dict) for value in lists)

    def _say_item_lists(self, field: str) -> None:
        self._warnings.say("embedding_item_lists", about=field[:_SHOWN])


async def partition_of(scope: Scope, partition_by: PartitionBy) -> str | None:
    """The partition that the user's callable names; its exceptions are the app's to handle.

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


def _wants_no_cache(cache: object) -> bool:
    """Whether a body says, as LiteLLM's may, what a request's ``Cache-Control`` says elsewhere."""
    return isinstance(cache, dict) and any(cache.get(name) for name in ("no-cache", "no-store"))


def _is_content(item: Input) -> bool:
    """Whether an input of a request about images, audio or video is the content, and no name of it."""
    if item.kind == b"s":
        return is_inline(item.canonical.decode())
    return not item.canonical.startswith(b'{"text"')


def _holds_much(batch: Batch, size: int) -> bool:
    """Whether what stands beside the inputs is long:
    parsed it takes up to thirty times its bytes, until the answer.
    """
    return size > _MAX_BESIDE and len(orjson.dumps(batch.fields)) > _MAX_BESIDE
