"""What a request asks is the same whether it was read before or not,
and what is remembered is bounded.
"""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.records.options import Options
from redis_asgi.embeddings.records.warnings import Warnings
from redis_asgi.embeddings.requests.body import Body
from redis_asgi.embeddings.requests.head import Head, Heads
from redis_asgi.embeddings.requests.headers import Headers
from redis_asgi.embeddings.requests.question import Question, Questions
from redis_asgi.embeddings.requests.routes import Endpoint
from redis_asgi.embeddings.wire import WIRE_FORMATS, Uncacheable
from redis_asgi.embeddings.wire.openai import OpenAI
from redis_asgi.settings import Settings
from redis_asgi.time_slice import TimeSlice

SETTINGS = Settings(REDIS_URL="memory://")
OPENAI = Endpoint(WIRE_FORMATS["openai"], None)
JSON = (b"content-type", b"application/json")
NAMES = st.sampled_from([b"X-Tenant", b"x-tenant", b"authorization", b"x-request-id", b"accept", b"cache-control"])
VALUES = st.sampled_from([b"", b"a", b"b", b"no-cache", b"text/html", b"application/json"])
SENT = st.lists(st.tuples(NAMES, VALUES), max_size=4)

pytestmark = pytest.mark.anyio


def make(settings: Settings = SETTINGS) -> Questions:
    """The reader of a middleware."""
    return Questions(Options(3600, "", False, 300, None, settings), Warnings())


async def read(
    questions: Questions,
    content: bytes,
    *headers: tuple[bytes, bytes],
    matched: Endpoint = OPENAI,
    partition: str | None = None,
    **scope: Any,
) -> Question | Uncacheable:
    """A request's question."""
    usual: dict[str, Any] = {
        "path": "/v1/embeddings",
        "query_string": b"",
        "scheme": "http",
        "headers": [JSON, *headers],
    }
    made = usual | scope
    return await questions.read(made, questions.head_of(made), matched, Body((), content), partition, TimeSlice())


def names(question: Question | Uncacheable) -> object:
    """Every key of a question."""
    assert isinstance(question, Question)
    identity = question.identity
    records = (identity.lease_name, identity.epoch_name, identity.denied_name, identity.scope_name)
    return records, tuple(question.slots), tuple(question.inputs), question.batch.model


def body(*texts: str, **fields: Any) -> bytes:
    """A request for *texts*."""
    return orjson.dumps({"model": "m", "input": list(texts)} | fields)


async def test_what_was_read_is_not_read_again() -> None:
    """The same bytes with the same headers, ids of one request aside, are one question."""
    questions = make()
    first = await read(questions, body("a"), (b"x-request-id", b"1"), (b"content-length", b"30"))

    assert first is await read(questions, body("a"), (b"traceparent", b"2"), (b"content-length", b"31"))
    assert first is not await read(questions, body("a", "a"))


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"content": body("b")},
    {"content": body("a", dimensions=1)},
    {"content": body("a", model="n")},
    {"content": body("a", encoding_format="base64")},
    {"headers": ((b"authorization", b"k"),)},
    {"headers": ((b"x-tenant", b"k"),)},
    {"headers": ((b"origin", b"k"),)},
    {"partition": ""},
    {"partition": "t"},
    {"path": "/embeddings"},
    {"raw_path": b"/v1/%65mbeddings"},
    {"query_string": b"a=1"},
    {"root_path": "/api"},
    {"scheme": "https"},
    {"client": ("192.0.2.1", 1)},
    {"extensions": {"tls": {"client_cert_name": "CN=a"}}},
    {"matched": Endpoint(WIRE_FORMATS["simple"], None)},
    {"content": b'{"input":["a"]}', "matched": Endpoint(WIRE_FORMATS["openai"], "one")},
    {"content": b'{"input":["a"]}', "matched": Endpoint(WIRE_FORMATS["openai"], "two")},
]


async def test_whatever_is_in_a_key_is_another_question() -> None:
    """A reader that has read all others names the records of each as one does that has read
    nothing.
    """
    experienced = make()
    for _ in range(2):
        for case in DIFFERENT:
            given_: dict[str, Any] = {"content": body("a")} | case
            content, headers = given_.pop("content"), given_.pop("headers", ())
            fresh = await read(make(), content, *headers, **given_)
            known = await read(experienced, content, *headers, **given_)

            assert names(fresh) == names(known), case
            assert isinstance(fresh, Question)
            assert isinstance(known, Question)
            assert fresh.batch.encodings == known.batch.encodings
    assert len(DIFFERENT) == len(experienced._memorised)


async def test_only_a_little_is_remembered() -> None:
    """Small requests, the last 256 of them; none of a format of the user's,
    which may do with them what it likes.
    """
    questions = make()
    for n in range(600):
        await read(questions, body(f"text {n}"))
    assert 256 == len(questions._memorised)

    questions = make()
    await read(questions, body("a" * 5000))
    await read(questions, body(*"abcdefghi"))
    await read(questions, body("a"), query_string=b"a" * 5000)
    await read(questions, body("a"), partition="a" * 5000)
    await read(questions, body("a"), matched=Endpoint(OpenAI(), None))
    await read(questions, b"{")
    assert not questions._memorised


def said(head: Head) -> object:
    """All of a head, by value."""
    told = head.told
    keys = (told.key, told.credential, told.lease, told.has_credential, told.keyed)
    return keys, head.wanted, head.refusal, head.is_json


@given(st.lists(SENT, min_size=1, max_size=12))
def test_a_head_says_the_same_whatever_was_read_before(requests: list[list[tuple[bytes, bytes]]]) -> None:
    """In any order, spelling and company; lists of a server's do as well as tuples."""
    heads = Heads(Headers(SETTINGS, shared=False))
    for sent in requests:
        fresh = Heads(Headers(SETTINGS, shared=False)).read(sent)
        as_lists: Any = [list(pair) for pair in sent]

        assert said(fresh) == said(heads.read(sent)) == said(heads.read(as_lists))


def test_heads_are_bounded() -> None:
    """The last 256 sets of at most 8 KiB, and 4,096 names of clients."""
    heads = Heads(Headers(SETTINGS, shared=False))
    for n in range(5000):
        heads.read([(b"x-%d" % n, b"v")])
    heads.read([(b"x", b"v" * 9000)])
    heads.read([(b"x" * 300, b"v")])

    assert 256 == len(heads._memorised)
    assert len(heads._counting) <= 4096
    assert b"x" * 300 not in heads._counting
