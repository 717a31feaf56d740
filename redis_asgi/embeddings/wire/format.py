"""A wire format: the JSON dialect of an embedding server, as five pure names.

To add one, write a class with the names of `WireFormat` and give an instance to
``EmbeddingCacheMiddleware(app, routes={"/my/path": MyFormat()})``. Nothing in it awaits, reads a
socket or knows of ASGI: it cuts a request into inputs, puts a smaller request together, finds the
vectors in an answer, and writes an answer. `read_inputs` and `read_model` do the parts that are
alike everywhere.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from ..records.vectors import Encoding, trimmed
from .content import is_inline

_LATE_CHUNKING = ("late_chunking",)
_WARNINGS = ("warnings", "warning")
_OF_INTEGERS = b"0123456789-,"


@dataclass(slots=True)
class Input:
    """One thing to embed. Not frozen only because freezing makes every construction twice as slow.

    Attributes:
        kind: One byte: ``s`` a text, ``t`` a token array, ``j`` a content object.
        canonical: What is hashed: the UTF-8 text, or canonical JSON.
        tokens: Its length when it is a token array, else ``None``.
    """

    kind: bytes
    canonical: bytes
    tokens: int | None = None

    @property
    def json(self) -> bytes:
        """The JSON text that is forwarded."""
        return orjson.dumps(self.canonical.decode()) if self.kind == b"s" else self.canonical


class TokenArray(list[int]):
    """A token array of a request.

    Attributes:
        canonical: Its JSON.
    """

    canonical: bytes

    @classmethod
    def of(cls, items: list[Any]) -> "TokenArray | list[Any]":
        """*items* as one; as they are if they are not integers."""
        if not items or type(items[0]) is not int:
            return items
        text = orjson.dumps(items)
        # Anything but integers has other characters; a list of a thousand is looked at in one step.
        if text[1:-1].translate(None, _OF_INTEGERS):
            return items
        tokens = cls(items)
        tokens.canonical = trimmed(text)
        return tokens


@dataclass(slots=True)
class Batch:
    """A request that can be answered input by input.
    Not frozen only because its reader adds the scope.

    Attributes:
        model: As requested; names the epoch and the lease.
        inputs: In the order sent, duplicates included.
        bare: Whether the one input was not in a list.
        fields: The body, in the order sent, with ``None`` where the inputs were.
        input_field: Their name in *fields*.
        encodings: The representations asked for.
        represented: Names of the fields that say so; they are in no key,
            and a list in them is of the whole request.
        scope: Canonical JSON of all that may change a vector,
            except the inputs; a format leaves it empty.
    """

    model: str
    inputs: tuple[Input, ...]
    bare: bool
    fields: Mapping[str, Any]
    input_field: str
    encodings: tuple[Encoding, ...] = (Encoding.FLOAT,)
    represented: frozenset[str] = frozenset()
    scope: bytes = b""


@dataclass(frozen=True, slots=True)
class Uncacheable:
    """The reason why a request passes through.

    Attributes:
        detail: That of its ``Cache-Status``.
        field: The body field that it is for, dotted, for the log; a client chose the name.
    """

    detail: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """An app's answer, taken apart.

    Attributes:
        values: The vectors as they stand in the JSON, unparsed,
            by representation and in the inputs' order.
        frame: Everything else, as JSON values; `WireFormat.render` puts it around vectors again.
        tokens: What the app counted for the whole request; ``None`` when it does not say.
        model: The one that it names as its own; empty when it names none.
        repeatable: Whether the frame may be put around vectors of another request;
            not when it warns of this one.
    """

    values: Mapping[Encoding, Sequence[object]]
    frame: dict[str, Any]
    tokens: int | None = None
    model: str = ""
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage to report.

    Attributes:
        tokens: The count; ``None`` = the frame is the app's answer to this very request: leave what
            it says.
        cached: How many more tokens the cache answered; ``None`` = do not say.
    """

    tokens: int | None = None
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class FreshFields:
    """Fields that a full hit makes new where the app sends them:
    ``created`` (Unix seconds) and ``id``.
    """

    created: int
    unique: str


class WireFormat(Protocol):
    """One JSON dialect. Pure: no I/O, no state, no clock."""

    @property
    def name(self) -> str:
        """Part of every key: two formats that read the same answers differently have two names."""

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """Cut a parsed body into inputs; *path_model* is what ``{model}`` of the route matched."""

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """The body of a request for *inputs* only, each of them one of ``batch.inputs``."""

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """Take an answer for *inputs* apart; ``None`` = not understood, so that nothing is stored."""

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """The body around *vectors* (JSON texts, one per input of *batch*), as pieces to be joined."""


def read_inputs(value: object) -> tuple[tuple[Input, ...], bool] | None:
    """Cut ``str | [str] | [int] | [[int]] | [object]`` into inputs;
    whether it was one without a list.

    An empty text is one in a list; by itself it is nothing to embed (to Ollama: a model to load).
    """
    if isinstance(value, str):
        return ((Input(b"s", value.encode()),), True) if value else None
    if not isinstance(value, list) or not value:
        return None
    if type(value[0]) is int:
        one = _read_input(value)
        return ((one,), True) if one else None
    kind = _kind(value[0])
    if kind is str and all(type(item) is str for item in value):
        # The usual case in one step.
        return tuple([Input(b"s", text.encode()) for text in value]), False
    inputs: list[Input] = []
    for item in value:
        read = _read_input(item) if _kind(item) is kind else None
        if read is None:
            return None
        inputs.append(read)
    return tuple(inputs), False


def _kind(item: object) -> type:
    return list if isinstance(item, TokenArray) else type(item)


def _read_input(item: object) -> Input | None:
    if isinstance(item, list):
        tokens = item if isinstance(item, TokenArray) else TokenArray.of(item)
        return Input(b"t", tokens.canonical, len(tokens)) if tokens and isinstance(tokens, TokenArray) else None
    if isinstance(item, dict) and len(item) == 1:
        [(name, content)] = item.items()
        if name in ("text", "image", "bytes") and isinstance(content, str) and content:
            return Input(b"j", orjson.dumps(item)) if name == "text" or is_inline(content) else None
    return None


def read_model(fields: Mapping[str, Any], path_model: str | None) -> str | None:
    """The model as requested, in the body, else in the path,
    else the empty one; ``None`` when it is no text.
    """
    model = fields.get("model")
    model = (path_model or "") if model is None else model
    return model if isinstance(model, str) else None


def model_of(document: Mapping[str, Any]) -> str:
    """The model that an answer names; empty when it names none."""
    model = document.get("model")
    return model if isinstance(model, str) else ""


def warns(document: Mapping[str, Any]) -> bool:
    """Whether an answer says something of its own request beyond vectors and counts."""
    meta = document.get("meta")
    places = (document, meta) if isinstance(meta, dict) else (document,)
    return any(place.get(name) for place in places for name in _WARNINGS)


def without_warnings(fields: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    """*fields* of an answer for a request that may be another than its own."""
    if usage.tokens is None:
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in _WARNINGS}


def recounted(said: Mapping[str, Any], names: Collection[str], usage: Usage) -> dict[str, Any]:
    """The counts that an answer *said*, *names* of them made anew for another request.

    What else it says was about its own (cost, images, details), and left out,
    but for what it says nothing of.
    """
    if usage.tokens is None:
        return dict(said)
    kept: dict[str, Any] = {}
    for name, value in said.items():
        if name in names and count(value) is not None:
            kept[name] = usage.tokens
        elif value is None or (name == "completion_tokens" and value == 0):
            kept[name] = value
    return kept


def refusal_of(fields: Mapping[str, Any]) -> Uncacheable | None:
    """The reason why a body asks for something other than one dense vector per input, alone, and
    passes through.
    """
    if any(fields.get(name) for name in _LATE_CHUNKING):
        return Uncacheable("late-chunking")
    if fields.get("return_multivector"):
        return Uncacheable("multi-vector")
    if fields.get("stream"):
        return Uncacheable("encoding")
    return None


def shrink(batch: Batch, inputs: Sequence[Input]) -> bytes:
    """The usual `WireFormat.shrink`: the same body with other inputs,
    in a list if the original had one.
    """
    texts = [orjson.Fragment(item.json) for item in inputs]
    value: object = texts[0] if batch.bare else texts
    return orjson.dumps({**batch.fields, batch.input_field: value})


def held(fields: dict[str, Any], input_field: str) -> dict[str, Any]:
    """*fields* with the inputs let go, their place kept."""
    return {**fields, input_field: None}


def members(fields: Mapping[str, Any]) -> list[bytes]:
    """The members of a JSON object, without its braces, as one piece; none when it is empty."""
    return [orjson.dumps(fields)[1:-1]] if fields else []


def array(pieces: Iterable[bytes]) -> list[bytes]:
    """A JSON array of *pieces*, not joined."""
    joined: list[bytes] = [b"["]
    for piece in pieces:
        joined += (piece, b",")
    if len(joined) > 1:
        joined.pop()
    joined.append(b"]")
    return joined


def count(value: object) -> int | None:
    """A token count, also one printed as a float; ``None`` for anything that is none."""
    whole = int(value) if type(value) is float and value.is_integer() else value
    return whole if type(whole) is int and whole >= 0 else None


def vector_list(value: object, n: int) -> list[object] | None:
    """A list of *n* vectors; ``None`` for anything else."""
    return value if isinstance(value, list) and len(value) == n else None
