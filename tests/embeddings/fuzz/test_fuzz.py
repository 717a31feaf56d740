"""A differential fuzz: whatever happens,
an answer through the cache is one that the app alone would give.

A failure prints its example, shrunk, which repeats it: ``play(example, url)``. The long runs draw
anew each time and print their seed (``--hypothesis-seed``).
"""

import asyncio
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from redis_asgi.embeddings.records.keys import RecordKeys
from redis_asgi.embeddings.requests.headers import HeaderClass, Headers
from redis_asgi.embeddings.requests.keyspace import Identities
from redis_asgi.embeddings.storage import lookup
from redis_asgi.embeddings.wire import Answer, Batch, Input
from redis_asgi.embeddings.wire.openai import OpenAI
from redis_asgi.settings import Settings

from .asks import Ask
from .histories import Play, configs, doors, plays, quirks
from .judge import Config, Judge, Violation
from .quirks import Quirks
from .world import Deploy, Refuse, Send, World

_fresh = itertools.count()
ANY = example_settings(deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
SHORT = example_settings(ANY, derandomize=True)
# Not made smaller: that takes longer than to find it.
LONG = example_settings(
    ANY, max_examples=150, phases=[Phase.generate], derandomize="REDIS_ASGI_FUZZ_ANEW" not in os.environ
)
short_and_long = pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "long"]
)


@pytest.fixture
def url(any_settings: Settings) -> str:
    """A real server, and the process's own memory."""
    assert any_settings.REDIS_URL is not None
    return any_settings.REDIS_URL.get_secret_value()


def play(example: Play, url: str) -> Judge:
    """Take an example's steps in a world and a loop of their own.

    Raises:
        Violation: When an answer is none that the app alone would give.
    """

    async def main() -> Judge:
        prefix = f"{os.getpid()}-{next(_fresh)}:"
        async with World(example.app, example.config, url, prefix, example.workers) as world:
            await world.play(example.steps)
        return world.judge

    return asyncio.run(main())


def fuzz(url: str, examples: st.SearchStrategy[Play], profile: example_settings) -> tuple[int, int]:
    """Play *examples*; how many requests there were, and how many full hits among them."""
    counts: list[tuple[int, int]] = []

    @profile
    @given(examples)
    def run(example: Play) -> None:
        judge = play(example, url)
        counts.append((judge.requests, judge.hits))

    run()
    return sum(requests for requests, _ in counts), sum(hits for _, hits in counts)


@short_and_long
def test_an_answer_is_one_that_the_app_alone_would_give(url: str, many: bool) -> None:
    """Any app, configuration and history: status, vectors, what is said of them,
    and how often the app is asked.
    """
    profile = LONG if many else example_settings(SHORT, max_examples=25)
    requests, hits = fuzz(url, plays(quirks(), configs()), profile)
    assert hits > requests / 20, "the cache was hardly used"


@short_and_long
def test_nobody_is_let_in_whom_the_app_alone_would_refuse(url: str, many: bool) -> None:
    """Whatever opens a door, and whoever closes it:
    a hit is for whom the app itself has let in, and no longer.
    """
    profile = LONG if many else example_settings(SHORT, max_examples=25)
    requests, hits = fuzz(url, plays(doors(), configs(), one_in=4), profile)
    assert hits > requests / 20, "the cache was hardly used"


# What it has found, as short as it became.


def _ask(texts: list[str], *headers: tuple[str, str], **fields: Any) -> Ask:
    return Ask({"model": "m", "input": texts, **fields}, headers)


_ALICE = ("authorization", "Bearer alice")
FOUND = {
    "a memory of what is not understood that a request for something fresh goes round": Play(
        Quirks(), Config(), 1, [Send(_ask(["a", "a", "bad"], ("cache-control", "no-cache")))] * 3
    ),
    "what the app has kept of a smaller request in its scope, found by the original": Play(
        Quirks(names_model=True, keeps="scope"), Config(), 1, [Send(_ask(["a"])), Deploy(), Send(_ask(["a", "bb"]))]
    ),
    "what it has kept in the request's state": Play(
        Quirks(names_model=True, keeps="state"), Config(), 1, [Send(_ask(["a"])), Deploy(), Send(_ask(["a", "bb"]))]
    ),
    "a caller whom the app knows no more, said to a request that passes through": Play(
        Quirks(door="key"),
        Config(),
        1,
        [
            Send(_ask(["a"], _ALICE)),
            Refuse("alice", 401),
            Send(_ask(["a"], _ALICE, late_chunking=True)),
            Send(_ask(["a"], _ALICE)),
        ],
    ),
}


@pytest.mark.parametrize("example", FOUND.values(), ids=FOUND)
def test_what_was_found_stays_mended(example: Play, url: str) -> None:
    """Histories that once ended with an answer that the app alone would not have given."""
    play(example, url)


# Sabotage: what has to be seen, done to the product.


@dataclass(frozen=True)
class Sabotage:
    """One defect, and the app that suffers from it."""

    do: Callable[[pytest.MonkeyPatch], None]
    app: Quirks
    config: Config = field(default_factory=Config)


def _identify(change: Callable[[Callable[..., RecordKeys], dict[str, Any]], RecordKeys]) -> Callable[..., None]:
    """Put *change* around the naming of a request's records, whose arguments it gets by name."""

    def do(monkeypatch: pytest.MonkeyPatch) -> None:
        right = Identities.identify
        names = [name for name in inspect.signature(right).parameters if name != "self"]

        def wrong(self: Identities, *given: Any) -> RecordKeys:
            return change(lambda **now: right(self, **now), dict(zip(names, given, strict=True)))

        monkeypatch.setattr(Identities, "identify", wrong)

    return do


def _without_header(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Headers._classify

    def wrong(self: Headers, name: bytes) -> HeaderClass:
        return HeaderClass.NEITHER if name == b"openai-organization" else right(self, name)

    monkeypatch.setattr(Headers, "_classify", wrong)


def _without_field(identify: Callable[..., RecordKeys], given: dict[str, Any]) -> RecordKeys:
    scope = orjson.loads(given["batch"].scope)
    scope.pop("adapter", None)
    return identify(**given | {"batch": replace(given["batch"], scope=orjson.dumps(scope))})


def _lease_without_partition(identify: Callable[..., RecordKeys], given: dict[str, Any]) -> RecordKeys:
    return replace(identify(**given), lease_name=identify(**given | {"partition": ""}).lease_name)


def _by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OpenAI.read

    def wrong(self: OpenAI, batch: Batch, inputs: Sequence[Input], document: Any) -> Answer | None:
        for at, item in enumerate(document["data"]):
            item["index"] = at
        return right(self, batch, inputs, document)

    monkeypatch.setattr(OpenAI, "read", wrong)


def _told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "decode_denied", lambda _: None)


SABOTAGE = {
    "a header is left out of the key": Sabotage(_without_header, Quirks(tenant="header:openai-organization")),
    "a body field is left out of the key": Sabotage(_identify(_without_field), Quirks(tenant="field:adapter")),
    "vectors are placed by position": Sabotage(_by_position, Quirks(index="permuted")),
    "a lease is for every partition": Sabotage(
        _identify(_lease_without_partition),
        Quirks(door="key", tenant="header:x-tenant", private=True),
        Config(partition=True, ignored=("x-tenant",)),
    ),
    "whom the app knows no more is told to nobody else": Sabotage(
        _told_to_nobody, Quirks(door="key"), Config(local=False)
    ),
}


@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE)
def test_the_fuzz_sees(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this one thing wrong an example is found that does not pass,
    and passes when it is right again.
    """
    tried: list[Play] = []

    def kept(example: Play) -> Play:
        tried.append(example)
        return example

    examples = plays(st.just(sabotage.app), st.just(sabotage.config)).map(kept)
    profile = example_settings(SHORT, max_examples=30, phases=[Phase.generate], database=None)
    with monkeypatch.context() as patch:
        sabotage.do(patch)
        with pytest.raises(Violation):
            fuzz("memory://", examples, profile)
    play(tried[-1], "memory://")
