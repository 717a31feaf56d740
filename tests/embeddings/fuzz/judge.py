"""What an answer through the cache is measured by:
what the app alone would say, and what it has said before.
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import orjson
from starlette.types import Scope

from .asks import Ask, Request, Sides
from .quirks import App, Crash, Reply, around, same, vectors_in

_DETAILS = frozenset(
    {
        *("partition", "item-lists", "unique-header", "late-chunking", "multi-vector", "encoding", "not-json"),
        *("body-header", "no-store", "response-no-store", "vary", "integers", "too-large", "busy", "redis-down"),
        *("not-understood", "replayed", "lease", "only-if-cached"),
    }
)
_MODEL_BELIEVED = 300.0  # seconds at most for which a hit may have the vectors of another deployment
_EXTRA_CALLS = 2  # a minute and scope


@dataclass(frozen=True)
class Config:
    """How the middleware is configured."""

    share: bool = False
    partition: bool = False  # by x-tenant
    lease: float | Literal["off"] = 300.0
    local: bool = True  # whether vectors are kept in the process
    usage: Literal["original", "billed"] = "original"
    ignored: tuple[str, ...] = ()  # headers


class Violation(AssertionError):
    """What came through the cache is not what the app alone would have given."""


@dataclass
class Call:
    """One answer of the app's."""

    worker: int
    at: float
    sides: Sides
    status: int
    deployment: str
    items: int
    seen_at: float | None = None  # when other workers can know of it


@dataclass
class Through:
    """What came through the cache."""

    scope: Scope
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    error: BaseException | None = None

    def values(self, name: bytes) -> list[str]:
        """All values of a header."""
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == name]

    @property
    def said(self) -> str:
        """Our member of ``Cache-Status``."""
        return ", ".join(self.values(b"cache-status"))

    @property
    def content(self) -> bytes:
        """The body, not compressed."""
        return gzip.decompress(self.body) if self.values(b"content-encoding") == ["gzip"] else self.body


class Judge:
    """One history's.

    Attributes:
        calls: What the app has answered so far.
        requests: How many answers were judged.
        hits: How many of them were full hits.
    """

    def __init__(self, app: App, config: Config) -> None:
        self.app = app
        self.config = config
        self.now = 1_800_000_000.0  # Unix seconds, and everybody's clock
        self.calls: list[Call] = []
        self.requests = 0
        self.hits = 0
        self._extra: dict[object, list[float]] = {}

    def judge(self, ask: Ask, worker: int, through: Through, start: int) -> None:
        """Look at an answer; before its request came *start* calls.

        Raises:
            Violation: When the app alone would not have answered so.
        """
        self.requests += 1
        request = Request(ask.scope(), ask.raw)
        try:
            alone = self.app.answer(request.scope, request.raw)
        except Crash as error:
            if through.error is not None:
                if type(through.error) is not type(error):
                    raise Violation(f"{ask}: raised {through.error!r}") from through.error
                return
            alone = Reply(500, (), b"")
        if through.error is not None:
            raise Violation(f"{ask}: raised {through.error!r}") from through.error
        said = through.values(b"cache-status")
        story = f"{ask} at worker {worker}: alone {alone.status}, through {through.status} ({'; '.join(said)})"
        if len(said) != 1 or not said[0].startswith("redis-asgi; ") or "," in said[0]:
            raise Violation(f"{story}: not one member of Cache-Status")
        detail = said[0].partition("detail=")[2].partition(";")[0]
        if detail and not detail.startswith('"') and detail not in _DETAILS:
            raise Violation(f"{story}: {detail} is no detail")
        if through.scope["state"].get("embedding_cache_result") is None:
            raise Violation(f"{story}: no result is left")
        self.hits += "; hit" in said[0]
        if through.status == 504 and "only-if-cached" in request.headers.get("cache-control", ""):
            return
        good = through.status // 100 == 2
        if good and alone.status // 100 != 2:
            self._excuse(story, request, worker, through, alone, start)
        elif through.status != alone.status:
            raise Violation(f"{story}: another status")
        if good and not (alone.status // 100 == 2 and same(through.content, _plain(alone))):
            self._compare(story, request, through, alone)

    def _excuse(self, story: str, request: Request, worker: int, through: Through, alone: Reply, start: int) -> None:
        """Of 2xx where the app alone says no,
        only what an earlier answer of the app's to such a request allows.
        """
        if alone.status in (400, 413, 422):
            return  # of the request's form: what is stored, or sent once, was not asked in that form
        if not ("; hit" in through.said or "fwd=partial" in through.said or "collapsed" in through.said):
            raise Violation(f"{story}: let in, and not from the cache")
        sides, lease = request.sides, self.config.lease
        if lease == "off":
            return  # whoever comes so far has been let in
        for at, call in enumerate(self.calls):
            if call.sides.door == sides.door and call.status // 100 == 2 and self.now < call.at + lease:
                since = self.calls[at + 1 : start]
                if not any(self._ends(denial, sides, worker) for denial in since):
                    return
        raise Violation(f"{story}: let in though the app did not let such a request in")

    def _ends(self, denial: Call, sides: Sides, worker: int) -> bool:
        """Whether a refusal has ended a lease as *worker* has to know by now."""
        of_this = denial.status in (401, 403) and denial.sides.door == sides.door
        if not of_this and not (denial.status == 401 and denial.sides.who == sides.who):
            return False
        if denial.worker == worker:
            return True
        # L1 is told within EMBEDDING_CACHE_L1_SECONDS.
        return denial.seen_at is not None and self.now > denial.seen_at + (5 if self.config.local else 0)

    def _compare(self, story: str, request: Request, through: Through, alone: Reply) -> None:
        """Every vector is one that the app alone gives now,
        or a deployment did so lately; all of the same one.
        """
        if not self.app.right(request, self.app.state.deployment):
            return  # a list that does not fit: refused for its form, which a smaller request need not have
        door = request.sides.door
        since = self.now - (_MODEL_BELIEVED if self.config.lease == "off" else min(self.config.lease, _MODEL_BELIEVED))
        # Inside the app's own door nobody is told apart from anybody.
        alike = [call for call in self.calls if self.config.lease == "off" or call.sides.door == door]
        allowed = {call.deployment for call in alike if call.at > since}
        allowed.add(self.app.state.deployment)
        try:
            document = orjson.loads(through.content)
            values = vectors_in(request.format, document)
            if alone.status // 100 == 2 and _says(values, vectors_in(request.format, orjson.loads(_plain(alone)))):
                self._compare_frame(story, request, document, self.app.state.deployment)
                return
            found = [_numbers(value) for value in values]
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise Violation(f"{story}: not the app's answer, nor one of ours: {through.content[:200]!r}") from error
        if self.app.quirks.numbers in ("integers", "nested") or "bad" in request.items:
            raise Violation(f"{story}: vectors where the app has none")
        for deployment in allowed:
            right = [numbers.tobytes() for numbers in self.app.right(request, deployment)]
            if right == found:
                if alone.status // 100 == 2:
                    self._compare_frame(story, request, document, deployment)
                return
        raise Violation(f"{story}: vectors that the app does not give")

    def _compare_frame(self, story: str, request: Request, document: Any, deployment: str) -> None:
        expected = self.app.document(request, deployment)
        left, right = around(request.format, expected), around(request.format, document)
        if left != right:
            raise Violation(f"{story}: says {right} for {left}")
        if not isinstance(expected, dict):
            return
        usage, mine = expected.get("usage"), document.get("usage")
        if type(usage) is not type(mine):
            raise Violation(f"{story}: usage {mine} for {usage}")
        if isinstance(usage, dict) and isinstance(mine, dict) and self.config.usage == "original":
            for name, value in mine.items():
                counted = name in ("prompt_tokens", "total_tokens")
                # What a smaller request cost was said of that one, and is true of this.
                as_said = value == usage.get(name) or "; hit" not in story
                if (counted and value < 1) or (not counted and not as_said):
                    raise Violation(f"{story}: usage {mine} for {usage}")
        warnings = (document.get("meta") or {}).get("warnings")
        if warnings is not None and warnings != expected.get("meta", {}).get("warnings"):
            raise Violation(f"{story}: warns {warnings} for {expected.get('meta')}")

    def weigh(self, ask: Ask, worker: int, through: Through, calls: Sequence[Call]) -> None:
        """Look at the *calls* that a request has cost: no more than alone,
        but for two a minute, scope and encoding.

        Raises:
            Violation: When there were more, or more texts.
        """
        request = Request(ask.scope(), ask.raw)
        story = f"{ask} ({through.said})"
        if any(call.items > len(request.items) for call in calls) or len(calls) > 2:
            raise Violation(f"{story}: {len(calls)} calls with {[call.items for call in calls]} texts")
        if "; hit" in through.said and self.config.lease == 0 and not calls:
            raise Violation(f"{story}: a hit where every request reaches the app")
        # An app may refuse one representation, so each has its two.
        asked = (worker, request.sides.vectors, repr(ask.body.get("encoding_format", "float")))
        times = self._extra.setdefault(asked, [])
        if "stored" in through.said:
            times.clear()  # understood, so that another two may be tried
        if len(calls) > 1:
            times.append(self.now)
            if len([at for at in times if at > self.now - 60]) > _EXTRA_CALLS:
                raise Violation(f"{story}: a third call more than without the cache within a minute")


def _says(values: list[Any], others: list[Any]) -> bool:
    return orjson.dumps(values) == orjson.dumps(others)  # 1 is not 1.0


def _plain(reply: Reply) -> bytes:
    return gzip.decompress(reply.body) if (b"content-encoding", b"gzip") in reply.headers else reply.body


def _numbers(value: Any) -> bytes:
    if isinstance(value, str):
        return base64.b64decode(value)
    if not all(type(x) is float for x in value):
        raise ValueError("not floats")
    return np.array(value, "<f4").tobytes()
