"""Whatever an answer is, its usage is the one that an oracle reads, at any borders."""

import gzip
import json
import random
import zlib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from redis_asgi.ratelimit.budgets.usage import UsageReader

from .usages import JSON, NDJSON, SSE, answer_of, parts_of, read


def compressed(body: bytes, rng: random.Random) -> tuple[bytes, bytes | None]:
    """*body* in an encoding that can be read."""
    return rng.choice([(body, None), (gzip.compress(body), b"gzip"), (zlib.compress(body), b"deflate")])


@given(st.randoms(use_true_random=False), st.sampled_from(["json", "chat", "responses", "ollama"]))
def test_random_answers_are_read_as_the_oracle_does(rng: random.Random, style: str) -> None:
    """Whole or cut anywhere, in any chunks and encoding:
    the first and the last usage count, the later one first.
    """
    answer = answer_of(rng, style)
    body = b"".join(answer.pieces)
    complete = rng.random() < 0.6
    passed = body if complete else body[: rng.randrange(len(body) + 1)]
    sent, encoding = compressed(passed, rng)
    size = rng.choice([1, 2, 5, 1000])
    reader = read(
        [sent[i : i + size] for i in range(0, len(sent), size)],
        answer.content_type,
        encoding=encoding,
        complete=complete,
    )

    found: list[dict[str, int | None]] = []
    counted: list[int] = []
    end = 0
    for piece, said, counts in zip(answer.pieces, answer.said, answer.counts, strict=True):
        end += len(piece)
        # All but its last line end is enough to know it whole.
        if end - len(piece.rstrip()) < 0 or len(passed) < end - len(piece) + len(piece.rstrip()):
            break
        if said is not None and any(number is not None for number in said.values()):
            found.append(said)
        if counts and len(passed) >= end:
            counted.append(len(piece))
    expected = None
    if found:
        first, last = found[0], found[-1]
        expected = parts_of({name: first[name] if last[name] is None else last[name] for name in last})
    assert expected == reader.usage
    if complete:
        assert (len(counted), sum(counted), min(counted, default=0)) == (
            reader.events,
            reader.bytes_sent if answer.content_type != JSON else 0,
            reader.smallest_event,
        )
    else:
        assert len(counted) <= reader.events <= len(counted) + 1


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"content-type", b"Content-Encoding", b"x"]),
        st.sampled_from([SSE, JSON, NDJSON, b"text/plain", b"gzip", b"deflate", b"br", b"", b"\xff;,="]),
    ),
    max_size=3,
)


TEXT = st.lists(
    st.sampled_from(
        [b"data:", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b'{"usage"', b":", b"{", b"}", b'"prompt_tokens":5', b"null",
         b'"done":true', b',"eval_count":1', b"1e400", b"[" * 2000, b'"type":"message_start"', b'"\\ud800"',
         b"\xef\xbb\xbf", b"\xff", b"[DONE]",
         b"event: x", b"NaN", b'"', b"\\", gzip.compress(b"data: {}\n\n"), zlib.compress(b"{}")]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip


@given(HEADERS, TEXT | st.binary(), st.integers(1, 9), st.booleans())
@example([(b"content-type", SSE)], b"data:\n\r\ndata:\r\r\n", 1, True)
@example([(b"content-type", NDJSON)], b"{}\n{}\n", 1, False)
def test_no_answer_raises_and_no_border_matters(
    headers: list[tuple[bytes, bytes]], body: bytes, size: int, complete: bool
) -> None:
    """However it is cut into chunks, what is read is the same."""
    seen = []
    for step in (size, max(1, len(body))):
        reader = UsageReader(200, headers)
        for i in range(0, len(body), step):
            reader.feed(body[i : i + step])
            reader.feed(b"")
        reader.close(complete)
        seen.append((reader.usage, reader.events, reader.bytes_sent, reader.smallest_event, reader.output_is_known))
    if not {b"gzip", b"deflate"} & {value for _, value in headers}:
        # zlib keeps to itself what stood before a fault in the same chunk.
        assert seen[0] == seen[1]


MEMBERS = st.recursive(
    st.none() | st.integers(-1, 9) | st.sampled_from(['"usage":{}}', '\\"usage\\":{', "\\", '"', "usage", "{", "}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "a", "meta", 'x"usage', "done"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["usage", "a", "meta", 'x"usage', "done"]), MEMBERS, max_size=4), st.booleans())
def test_end_of_a_document_says_what_the_document_says(document: dict[str, Any], dense: bool) -> None:
    """Or nothing: no inner member and no text passes for one of the outermost object."""
    from redis_asgi.ratelimit.budgets.usage_bodies import _from_tail

    assert None is _from_tail(b'"usage":{}}')  # nobody knows what stood before
    text = json.dumps(document, separators=(",", ":") if dense else None).encode()
    found = _from_tail(text)
    for name in ("usage", "meta", "done"):
        assert found is None or document.get(name) == found.get(name) or name not in found
    if "usage" in document and text.count(b'"usage"') <= 1:
        assert found is not None
        assert document["usage"] == found["usage"]
