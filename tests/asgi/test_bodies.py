"""Bodies that are read ahead of the app: what they say, and the room that they take."""

import gc
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope

from redis_asgi.asgi.bodies import KEPT_BYTES, Buffer, Document, Member, take_document, without_texts
from redis_asgi.asgi.body_budget import Budget

pytestmark = pytest.mark.anyio


def body_of(*parts: bytes) -> Receive:
    """A ``receive`` that gives the body in these pieces."""
    messages: list[Message] = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)
    ]
    messages.reverse()

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param('{"a": 1}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', id="byte order mark"),
        pytest.param(b'{"a": "\xff"}', id="Latin-1"),
        pytest.param(b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n', id="multipart"),
        pytest.param(b'{"a": NaN}', id="NaN"),
        pytest.param(b"[" * 5_000_000, id="nested too deep"),
        pytest.param(b'{"a":' * 1_000_000, id="objects nested too deep"),
        pytest.param(b"[" + b"[]," * 2_000_000 + b"[]]", id="too many lists"),
        pytest.param(b"[" + b'"",' * 2_000_000 + b"[]" * 200_000 + b"]", id="too many texts"),
        pytest.param(b"[" + b'"ab",' * 1_000_000 + b"0]", id="texts alone"),
        pytest.param(b"[" * 200_000 + b'"' + rb"\"" * 3_000_000, id="quotes in a text without an end"),
        pytest.param(b"[" * 200_000 + b'"' + rb"\n" * 3_000_000, id="escapes in a text without an end"),
    ],
)
def test_what_is_no_json_raises_nothing_and_takes_no_time(content: bytes) -> None:
    """It is not read, whatever it is, in a time and room that its size explains."""
    tracemalloc.start()
    began = time.process_time()
    document = Document(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * len(content) + 10_000
    assert (False, None) == (document.is_read, document.value)
    assert document.has_twice([Member("a")]) in (True, False)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ['{"a": 1e400}', '{"a": %s}' % ("9" * 5000), '{"a": 1e-400}', '{"a": "\\ud800"}'])
def test_numbers_and_texts_that_no_variable_holds_raise_nothing(text: str) -> None:
    """They are no JSON, or some number."""
    document = Document(text.encode())

    assert document.is_read in (True, False)
    assert not document.has_twice([Member("a")])


def test_members_without_number_are_not_counted_one_by_one() -> None:
    """Where a name stands several times,
    and nobody can say in time at which level, it stands twice.
    """
    many = b",".join(b'"k%d":{"m":1}' % n for n in range(60_000))
    began = time.process_time()

    assert Document(b'{"m":1,%b}' % many).has_twice([Member("m")])
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("filler", "is_told"), [(b'"%b"' % (b"1," * 300_000), True), (b"[%b1]" % (b"1," * 300_000), False)]
)
def test_values_without_number_are_not_read_once_more(filler: bytes, is_told: bool) -> None:
    """A table in a text is one value;
    of a million numbers it is not asked at which level a name stands twice.
    """
    document = Document(b'{"m":1,"x":%b,"y":{"m":2}}' % filler)

    assert document.is_read
    assert is_told == (not document.has_twice([Member("m")]))


@given(
    st.recursive(st.text('"\\\\[]{},:a\n'), lambda inner: st.lists(inner) | st.dictionaries(st.text('"\\\\[a'), inner))
)
def test_brackets_outside_of_texts_are_those_of_the_values(value: Any) -> None:
    """Whatever texts there are, and however they end."""

    def containers(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + sum(map(containers, inner))

    bare = without_texts(json.dumps(value).encode())

    assert containers(value) == bare.count(b"[") + bare.count(b"{")


def test_code_in_texts_is_no_nesting() -> None:
    """A long text that is full of brackets is one text."""
    document = Document(json.dumps({"messages": [{"content": "[{" * 200_000 + '"' * 500_000}]}).encode())

    assert document.is_read


SPELLINGS = st.sampled_from(
    ['"m"', '"\\u006d"', '"\\u006D"', '"n"', '"a\\"m"', '"m\\\\"', '"\\\\m"', '"é"', '"\\u00e9"']
)
VALUES = st.recursive(
    st.sampled_from(["1", '"m"', '"\\"m\\":1"', "null", '"é"']),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(SPELLINGS, inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f"{name} :{value}" for name, value in pairs) + "}"
        ),
    ),
    max_leaves=12,
)


@given(st.lists(st.tuples(SPELLINGS, VALUES), max_size=4), st.sampled_from(["m", "é", "n", "m.m", "n.m", "m.é"]))
def test_member_stands_twice_where_a_reader_of_pairs_says_so(pairs: list[tuple[str, str]], path: str) -> None:
    """However a name is spelled, and whatever looks like it in texts and at other levels."""
    text = "{" + ",".join(f"{name}:{value}" for name, value in pairs) + "}"
    at: Any = json.loads(text, object_pairs_hook=lambda found: tuple(found))
    expected = False
    names = path.split(".")
    for name in names:
        if not isinstance(at, tuple):
            break
        found = [value for each, value in at if each == name]
        expected |= len(found) > 1
        at = found[-1] if found else None

    assert expected == Document(text.encode()).has_twice([Member(name) for name in names])


async def test_room_is_given_back_with_the_last_who_could_look() -> None:
    """Handed out, or forgotten without ever being handed out."""
    budget = Budget(100)
    receive = body_of(b"x" * 60)
    buffer = Buffer(receive, cap=100, budget=budget)

    assert b"x" * 60 == await buffer.whole()
    assert not budget.take(50)
    assert b"x" * 60 == (await buffer.replay()())["body"]
    assert budget.take(100)
    budget.give(100)

    buffer = Buffer(body_of(b"x" * 60), cap=100, budget=budget)
    await buffer.whole()
    replay = buffer.replay()
    del buffer
    assert not budget.take(50)
    del replay
    gc.collect()
    assert budget.take(100)


async def test_body_without_room_is_unreadable_and_whole_for_the_app() -> None:
    """What the process has no room for goes to the app as it comes."""
    buffer = Buffer(body_of(b"x" * 60, b"y" * 60), cap=1000, budget=Budget(100))

    assert await buffer.whole() is None
    replay = buffer.replay()
    assert b"x" * 60 + b"y" * 60 == (await replay())["body"]


@pytest.mark.parametrize(("size", "is_kept"), [(10, True), (KEPT_BYTES, False)])
async def test_small_parse_is_kept_until_the_body_is_handed_out(size: int, is_kept: bool) -> None:
    """Who wants it takes it before; nobody holds it afterwards,
    and nobody who comes after a callable of the user's.
    """
    content = json.dumps(["x" * size]).encode()
    scope: Scope = {}
    for meanwhile in ("nothing", "replay", "callable"):
        buffer = Buffer(body_of(content), cap=2**20)
        await buffer.whole()
        buffer.keep(Document(content), scope)
        if meanwhile == "replay":
            await buffer.replay()()
        if meanwhile == "callable":
            buffer.expose()
        document = take_document(scope)

        assert (is_kept and meanwhile == "nothing") == (document is not None)
        assert take_document(scope) is None
