"""An embedding app with the quirks of real ones;
what it answers depends on the request and its state alone.
"""

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import orjson
from starlette.types import Scope

from ...kit.embedding_apps import FORMATS, Spy, vector
from .asks import Request, member

KNOWN = ("alice", "bob", "carol")  # whom the app lets in, until it does not
OWNED: Mapping[str, Sequence[str]] = {"alice": ("", "a"), "bob": ("", "b"), "carol": ("", "a", "b")}
WELCOME, UNWELCOME = "application/json", "application/json; v=2"  # in a header that a door looks at, `Accept` too

Door = Literal["open", "key", "certificate", "address"]
Numbers = Literal["plain", "integers", "nested", "ragged", "null"]
Index = Literal["plain", "missing", "zero-missing", "shifted", "permuted", "zeros"]
Usage = Literal["plain", "none", "null", "cost", "floats"]


@dataclass(frozen=True)
class Quirks:
    """How one app is.

    Attributes:
        door: What opens it.
        key_headers: Where it takes its key from; the first that is there.
        watched: A header in which it takes no `UNWELCOME`, or ``scheme``: only ``https`` will do.
        tenant: What chooses the vector space: ``header:NAME``,
            ``field:NAME``, ``query:`` or nothing.
        private: Whether a key opens its own tenants only.
        beside: A body field that may be a list (or an object of numbered members) with one value
            per input.
        names_model: Whether it says which deployment has answered, and that has vectors of its own.
    """

    door: Door = "open"
    key_headers: tuple[str, ...] = ("authorization",)
    watched: str = ""
    tenant: str = ""
    private: bool = False
    beside: str = ""
    names_model: bool = False
    numbers: Numbers = "plain"
    index: Index = "plain"
    extra: bool = False  # each item says something of its own input
    usage: Usage = "plain"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    gzip: Literal["never", "asked", "always"] = "never"
    refuses: str = ""  # an encoding_format
    ignores_base64: bool = False
    warns: bool = False  # of long texts
    most: int = 100  # inputs
    keeps: Literal["", "scope", "state"] = ""  # where it keeps a body it has read, and finds it before it reads again


@dataclass
class State:
    """What changes while an app runs."""

    refused: dict[str, int] = field(default_factory=dict)  # whom it knows no more: 401 or 403
    deployment: str = "primary"
    weights: int = 0
    down: int = 0  # a status; -1: it raises


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Crash(Exception):
    """What the app dies of."""


class App:
    """The pure half of the app; see the module."""

    def __init__(self, quirks: Quirks) -> None:
        self.quirks = quirks
        self.state = State()

    # The door.

    def tenant(self, request: Request) -> str:
        """Whose vectors are asked for."""
        kind, _, name = self.quirks.tenant.partition(":")
        if kind == "header":
            value = request.headers.get(name, "")
            return "" if value == "app" else value
        if kind == "query":
            return str(request.scope["query_string"].decode())
        return str(member(request.fields, name) or "") if kind == "field" else ""

    def who(self, request: Request) -> str | None:
        """Who asks, as this app reads it."""
        quirks = self.quirks
        if quirks.door == "certificate":
            return request.certificate or None
        keys = [str(request.headers[name]) for name in quirks.key_headers if name in request.headers]
        if keys:
            return keys[0].removeprefix("Bearer ")
        if quirks.door == "address":
            return str(request.headers.get("x-forwarded-for", request.scope["client"][0]))
        return None

    def refusal(self, request: Request) -> int:
        """Why not, as a status; 0 = come in."""
        quirks = self.quirks
        if quirks.watched == "scheme" and request.scope["scheme"] != "https":
            return 403
        if quirks.watched and request.headers.get(quirks.watched) == UNWELCOME:
            return 403
        if quirks.door == "open":
            return 0
        who = self.who(request)
        if who is None:
            return 401
        if who in self.state.refused:
            return self.state.refused[who]
        if who not in KNOWN and not (quirks.door == "address" and who.endswith(".1")):
            return 403 if quirks.door == "address" else 401
        return 403 if quirks.private and self.tenant(request) not in OWNED.get(who, ("",)) else 0

    # Vectors.

    def model(self, request: Request, deployment: str) -> Any:
        """What the answer calls its model."""
        asked = request.fields.get("model")
        names = self.quirks.names_model and request.format in ("openai", "ollama")
        return f"{asked}@{deployment}" if names else asked

    def right(self, request: Request, deployment: str) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """The only right vectors of a request,
        answered by *deployment*; none where it has no answer.
        """
        shared = {k: v for k, v in request.fields.items() if k not in (request.input_field, "encoding_format", "user")}
        shared.pop("embedding_types", None)
        beside = member(request.fields, self.quirks.beside) if self.quirks.beside else None
        own = list(beside.values()) if isinstance(beside, dict) else beside if isinstance(beside, list) else None
        if own is not None and len(own) != len(request.items):
            return []
        if own is not None:
            shared.pop(self.quirks.beside.partition(".")[0])
        space = (
            self.model(request, deployment),
            self.state.weights,
            self.tenant(request),
            repr(sorted(shared.items())),
        )
        return [vector(item, (*space, own[at] if own is not None else None)) for at, item in enumerate(request.items)]

    def document(self, request: Request, deployment: str) -> Any:
        """The answer of *deployment*, as JSON values."""
        quirks, name, items = self.quirks, request.format, request.items
        one = FORMATS[name][2]
        spy = Spy(honours_base64=not quirks.ignores_base64)
        document = one(request.fields | {"model": None}, items, spy)
        _put(name, document, [_as(numbers, request.fields, spy) for numbers in self.right(request, deployment)])
        if isinstance(document, dict) and "model" in document:
            document["model"] = self.model(request, deployment)
        if name == "openai":
            self._dress(document, items)
        if quirks.warns and isinstance(document, dict) and any(len(str(item)) > 20 for item in items):
            document["meta"] = {**document.get("meta", {}), "warnings": [f"{len(str(items[0]))} is long"]}
        return document

    def _dress(self, document: Any, items: Sequence[Any]) -> None:
        quirks, data = self.quirks, document["data"]
        for at, item in enumerate(data):
            if quirks.numbers == "integers":
                item["embedding"] = [int(number * 50) for number in _floats(item["embedding"])]
            elif quirks.numbers == "nested":
                item["embedding"] = [_floats(item["embedding"])] * 2
            if quirks.extra:
                item["characters"] = len(str(items[at]))
            if quirks.index != "permuted":
                item["index"] = {"shifted": at + 7, "zeros": 0}.get(quirks.index, at)
            if quirks.index == "missing" or (quirks.index == "zero-missing" and at == 0):
                del item["index"]
        if quirks.numbers == "ragged" and len(data) > 1:
            data[-1]["embedding"] = _floats(data[-1]["embedding"])[:-1]
        elif quirks.numbers == "null" and len(data) > 1:
            data[0]["embedding"] = [None] * 6
        if quirks.index == "permuted":
            data.reverse()
        tokens = document["usage"]["prompt_tokens"]
        if quirks.usage == "cost":
            document["usage"] |= {"cost": tokens / 8, "prompt_tokens_details": {"image_count": len(items)}}
        elif quirks.usage == "floats":
            document["usage"] = {name: float(count) for name, count in document["usage"].items()}
        elif quirks.usage == "null":
            document["usage"] = None
        elif quirks.usage == "none":
            del document["usage"]

    # Answers.

    def answer(self, scope: Scope, raw: bytes) -> Reply:
        """What it says to *raw*.

        Raises:
            Crash: In that state.
        """
        request, quirks, down = Request(scope, raw), self.quirks, self.state.down
        beside = member(request.fields, quirks.beside) if quirks.beside else None
        refusal = self.refusal(request)
        if down < 0:
            raise Crash
        if down or refusal:
            return _error(down or refusal)
        if quirks.refuses and request.fields.get("encoding_format") == quirks.refuses:
            return _error(400)
        if isinstance(beside, list | dict) and len(beside) != len(request.items):
            return _error(422)
        if "bad" in request.items or len(request.items) > quirks.most:
            return _error(413 if "bad" not in request.items else 422)
        body = orjson.dumps(self.document(request, self.state.deployment))
        headers = [(b"content-type", b"application/json")]
        headers += [(name.encode(), value.encode()) for name, value in quirks.headers]
        asked = "gzip" in request.headers.get("accept-encoding", "")
        if quirks.gzip == "always" or (quirks.gzip == "asked" and asked):
            headers.append((b"content-encoding", b"gzip"))
            body = gzip.compress(body, mtime=0)
        return Reply(quirks.status, tuple(headers), body)


def _error(status: int) -> Reply:
    return Reply(status, ((b"content-type", b"application/json"),), b'{"error":%d}' % status)


def _floats(value: Any) -> list[float]:
    if isinstance(value, str):
        return [float(x) for x in np.frombuffer(base64.b64decode(value), "<f4")]
    return list(value)


def _as(numbers: np.ndarray[Any, np.dtype[np.float32]], fields: Mapping[str, Any], spy: Spy) -> Any:
    wants_base64 = fields.get("encoding_format") == "base64" and spy.honours_base64
    return base64.b64encode(numbers.tobytes()).decode() if wants_base64 else numbers.tolist()


def vectors_in(name: str, document: Any) -> list[Any]:
    """The vectors of an answer as they stand there, in the order in which a client reads them."""
    if name == "openai":
        data = document["data"]
        indexes = [item.get("index", at) for at, item in enumerate(data)]
        if sorted(indexes) == list(range(len(data))):
            data = [data[indexes.index(at)] for at in range(len(data))]
        return [item["embedding"] for item in data]
    if name == "ollama_prompt":
        return [document["embedding"]]
    if name == "tei":
        return list(document)
    found = document["embeddings"]
    return list(found if isinstance(found, list) else found["float"])


def _put(name: str, document: Any, values: list[Any]) -> None:
    if name == "openai":
        for item, value in zip(document["data"], values, strict=True):
            item["embedding"] = value
    elif name == "ollama_prompt":
        document["embedding"] = values[0]
    elif name == "tei":
        document[:] = values
    elif isinstance(document["embeddings"], dict):
        document["embeddings"] = {"float": values}
    else:
        document["embeddings"] = values


def around(name: str, document: Any) -> dict[str, Any]:
    """What an answer says beside its vectors, but for what is new in each."""
    if not isinstance(document, dict):
        return {}
    left_out = {"data", "embedding", "embeddings", "usage", "id", "meta", "prompt_eval_count", "total_duration"}
    return {key: value for key, value in document.items() if key not in left_out}


def same(left: bytes, right: bytes) -> bool:
    """Whether two bodies say the same JSON, types included."""
    try:
        return _canonical(left) == _canonical(right)
    except orjson.JSONDecodeError:
        return left == right


def _canonical(body: bytes) -> bytes:
    return orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
