"""Buckets of bodies, as values: models, tools, and several parts of an identity."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi import (
    by_json,
    by_mcp_tool,
)
from redis_asgi.asgi.bodies import Document
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.ratelimit.rules.joined import joined

from ..kit.logs import event_of
from .buckets import PLANS, TOOLS, body, call

pytestmark = pytest.mark.anyio


def bucket(reader: Any, content: bytes) -> Any:
    """What *reader* makes of a body."""
    return reader.read(Document(content)).bucket


@pytest.mark.parametrize(
    ("values", "model", "expected"),
    [
        pytest.param(["a", "b"], "b", "b", id="name"),
        pytest.param("a", "a", "a", id="the only name"),
        pytest.param({"a", "b"}, "a", "a", id="names in a set"),
        pytest.param(["a*"], "abc", "a*", id="pattern is its bucket"),
        pytest.param(["gpt-5-mini*", "gpt-5*"], "gpt-5-mini-2026", "gpt-5-mini*", id="first that matches"),
        pytest.param(PLANS, "gpt-5-mini", "small", id="bucket of a pattern"),
        pytest.param(PLANS, "gpt-5.1", "large", id="second bucket"),
        pytest.param(PLANS, "GPT-5", "other", id="case counts"),
        pytest.param(PLANS, "invented", "other", id="outside"),
        pytest.param(PLANS, "", "other", id="empty"),
        pytest.param(["*"], "x" * 10_000, "other", id="far too long"),
        pytest.param(["true"], True, "true", id="boolean"),
        pytest.param(["7"], 7, "7", id="whole number"),
        pytest.param(["7"], 7.0, "other", id="fraction"),
        pytest.param(["null", "None"], None, "other", id="null"),
        pytest.param(["*"], ["a"], "other", id="list"),
        pytest.param(["*"], {"a": 1}, "other", id="object"),
        pytest.param(["gpt-5"], "gpt-5\n", "other", id="newline"),
    ],
)
def test_value_falls_into_a_bucket(values: Any, model: Any, expected: str) -> None:
    """Buckets are what the rule names, and one more."""
    assert expected == bucket(by_json("model", values), body(model=model))


@pytest.mark.parametrize(
    ("values", "hidden"),
    [
        (["gpt-5*", "gpt-5-mini*"], ["'gpt-5-mini*'"]),
        ({"*": "all", "a": "one", "b*": "two"}, ["'a'", "'b*'"]),
        ({"a*c": "one", "ab*c": "two", "*": "three"}, ["'ab*c'"]),
        ({"gpt-5*": "all", "gpt-5-mini*": "all"}, []),  # one bucket
        (["gpt-5-mini*", "gpt-5*", "gpt-5*"], []),
        (["a*c", "a*", "*a", "a*b"], ["'a*b'"]),
        (["ab", "a*b", "*"], []),
    ],
)
def test_pattern_that_hides_a_later_one_is_told_of(values: Any, hidden: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whose bucket nobody is ever counted in: once each, with the order that was meant."""
    by_json("model", values)

    assert hidden == [vars(record)["hidden"] for record in caplog.records if event_of(record).endswith("values_hidden")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b'{"meta": {"tenant": "a"}}', "a", id="below"),
        pytest.param(b'{"meta": {"tenant": "a"}, "x": {"tenant": "b"}, "tenant": "b"}', "a", id="elsewhere too"),
        pytest.param(b'{"meta": [{"tenant": "a"}]}', "other", id="through a list"),
        pytest.param(b'{"meta": "tenant"}', "other", id="of a text"),
        pytest.param(b'{"meta.tenant": "a"}', "other", id="a dot in a name"),
        pytest.param(b'{"meta": {"tenant": "b"}, "meta": {"tenant": "a"}}', "other", id="twice above"),
        pytest.param(b'{"meta": {"tenant": "a", "tenant": "a"}}', "other", id="twice below"),
        pytest.param(b'{"meta": {"tenant": "a"}, "x": {"meta": 1, "meta": 2}}', "a", id="twice elsewhere"),
    ],
)
def test_dots_descend_into_objects(content: bytes, expected: str) -> None:
    """Each part of the name is a member of the object that the ones before it lead to."""
    assert expected == bucket(by_json("meta.tenant", ["a"]), content)


UNREADABLE = [
    pytest.param(b'{"model": "a", "model": "a"}', True, id="twice"),
    pytest.param(b'{"model": "a", "m\\u006fdel": "b"}', True, id="twice, once in escapes"),
    pytest.param('{"model": "a"}'.encode("utf-16"), True, id="UTF-16"),
    pytest.param('{"model": "a"}'.encode("utf-16-be"), True, id="UTF-16 without a mark"),
    pytest.param(b'\xef\xbb\xbf{"model": "a"}', True, id="byte order mark"),
    pytest.param(b'{"model": "a", "n": NaN}', True, id="NaN"),
    pytest.param(b'{"model": "a", "n": 1e400}', True, id="1e400"),
    pytest.param(b'{"model": "a", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}", True, id="deep"),
    pytest.param(b'{"model": "a", "n": "\xff"}', True, id="Latin-1"),
    pytest.param(b'{"model": "a"', True, id="cut"),
    pytest.param(b"model=a", False, id="form"),
    pytest.param(b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n', False, id="multipart"),
]


@pytest.mark.parametrize(("content", "may_be_one"), UNREADABLE)
def test_unreadable_body_is_other_and_never_outside_of_the_rule(content: bytes, may_be_one: bool) -> None:
    """With ``other=None`` it is out of the rule only if no parser of JSON could take it for one of
    the values.
    """
    assert bucket(by_json("model", ["a"]), content) == "other"
    assert ("other" if may_be_one else None) == bucket(by_json("model", ["a"], other=None), content)


def test_body_that_says_that_it_is_compressed_is_other() -> None:
    """Who stands behind may see through it."""
    document = Document(b"\x1f\x8b", is_encoded=True)

    assert by_json("model", ["a"], other=None).read(document).bucket == "other"


@pytest.mark.parametrize(
    ("message", "expected", "of_none"),
    [
        pytest.param(call(), ("search", 1), ("search", 1), id="tool"),
        pytest.param(call("fetch_page"), ("fetch", 1), ("fetch", 1), id="pattern"),
        pytest.param(call("invented"), ("other", 1), (None, 1), id="other tool"),
        pytest.param(call(None), ("other", 1), (None, 1), id="no tool"),
        pytest.param(call(params=[1]), ("other", 1), (None, 1), id="parameters in a list"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, (None, 1), (None, 1), id="list of tools"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "method": "initialize"}, (None, 1), (None, 1), id="initialize"),
        pytest.param({"jsonrpc": "2.0", "method": "notifications/x"}, (None, 1), (None, 1), id="notification"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": {}}, (None, 1), (None, 1), id="response"),
        pytest.param("tools/call", (None, 1), (None, 1), id="text"),
        pytest.param([call(), call("fetch_a"), {"method": "ping"}], ("other", 2), ("other", 2), id="batch"),
        pytest.param([call("x"), call("search")], ("other", 2), ("other", 1), id="batch of other tools too"),
        pytest.param([call("x"), 7, None], ("other", 1), (None, 1), id="batch of other tools"),
        pytest.param([{"method": "ping"}], (None, 1), (None, 1), id="batch without a call"),
        pytest.param([], (None, 1), (None, 1), id="empty batch"),
    ],
)
def test_mcp_tool(message: Any, expected: Any, of_none: Any) -> None:
    """Only calls are covered; a batch is one bucket and as many uses as it has calls."""
    document = Document(json.dumps(message).encode())
    said = by_mcp_tool(TOOLS).read(document)
    strict = by_mcp_tool(TOOLS, other=None).read(document)

    assert expected == (said.bucket, said.times)
    assert of_none == (strict.bucket, strict.times)


@pytest.mark.parametrize(
    "text",
    [
        '{"method": "tools/list", "method": "tools/call", "params": {"name": "search"}}',
        '{"method": "tools/call", "params": {"name": "x"}, "params": {"name": "search"}}',
        '{"method": "tools/call", "params": {"name": "x", "name": "search"}}',
        '[{"method": "tools/list", "method": "tools/call", "params": {"name": "search"}}]',
        '[{"method": "tools/call", "params": {"name": "x", "n\\u0061me": "search"}}]',
    ],
)
def test_mcp_message_that_says_two_things_is_other(text: str) -> None:
    """Whichever of them the server takes, it is counted."""
    assert by_mcp_tool(TOOLS, other=None).read(Document(text.encode())).bucket == "other"


@given(st.lists(st.lists(st.text(max_size=6), max_size=3), max_size=3).map(lambda lists: lists + lists[:1]))
def test_joined_identities_are_told_apart(lists: list[list[str]]) -> None:
    """Two lists of names are one identity only if they are one list."""
    for one, other in itertools.product(lists, repeat=2):
        assert (one == other) == (joined(one) == joined(other))


def test_address_in_place_of_an_identity_is_nobodys_identity() -> None:
    """A header that says what an address is called is another partition."""
    address = make_partition("ip", "203.0.113.7", plain=True)

    assert joined([address, "a"]) != joined(["203.0.113.7", "a"])
