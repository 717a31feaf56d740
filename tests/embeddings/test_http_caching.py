"""HTTP's rules of caching, as tables: what a request wishes,
what an answer permits, and what is said of it.
"""

import pytest

from redis_asgi.embeddings.requests import http_caching as http
from redis_asgi.embeddings.requests.http_caching import RequestDirectives, StorePermission, by_name

Fields = dict[bytes, list[bytes]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {}),
        ([b"no-store"], {"no-store": ""}),
        ([b"Max-Age=5, NO-CACHE"], {"max-age": "5", "no-cache": ""}),
        ([b'max-age="5"'], {"max-age": "5"}),
        ([b"max-age=5", b"max-age=6"], {"max-age": "5"}),
        ([b",, ,"], {}),
    ],
)
def test_directives(values: list[bytes], expected: dict[str, str]) -> None:
    """Names have no case, arguments no quotes, and of two with one name the first counts."""
    assert expected == http.directives({b"cache-control": values})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", 0),
        ("60", 60),
        (None, None),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("²", None),
        ("9" * 30, 99_999_999_999),
    ],
)
def test_seconds(given: str | None, expected: int | None) -> None:
    """Only digits are a number of seconds, and more than three thousand years are no more."""
    assert expected == http.seconds(given)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, RequestDirectives()),
        ({b"cache-control": [b"no-cache"]}, RequestDirectives(lookup=False)),
        ({b"cache-control": [b"no-store"]}, RequestDirectives(lookup=False, store=False)),
        ({b"cache-control": [b"max-age=0"]}, RequestDirectives(lookup=False, max_age=0)),
        ({b"cache-control": [b"max-age=60"]}, RequestDirectives(max_age=60)),
        ({b"cache-control": [b"max-age=soon"]}, RequestDirectives()),
        ({b"cache-control": [b"only-if-cached"]}, RequestDirectives(only_if_cached=True)),
        ({b"pragma": [b"No-Cache"]}, RequestDirectives(lookup=False)),
        ({b"pragma": [b"no-cache"], b"cache-control": [b"max-age=60"]}, RequestDirectives(max_age=60)),
    ],
)
def test_a_request_says_what_it_wishes(fields: Fields, expected: RequestDirectives) -> None:
    """``Pragma`` counts only where there is no ``Cache-Control``."""
    assert expected == http.wanted(fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, StorePermission()),
        ({b"cache-control": [b"max-age=60"]}, StorePermission(max_age=60)),
        ({b"cache-control": [b"max-age=60, s-maxage=5"]}, StorePermission(max_age=5)),
        ({b"cache-control": [b"s-maxage=0, max-age=60"]}, StorePermission("response-no-store")),
        ({b"cache-control": [b"max-age=soon"]}, StorePermission("response-no-store")),
        ({b"cache-control": [b"private"]}, StorePermission("response-no-store")),
        ({b"cache-control": [b"no-cache"]}, StorePermission("response-no-store")),
        ({b"cache-control": [b"no-store"]}, StorePermission("response-no-store")),
        ({b"vary": [b"Accept-Encoding, Origin"]}, StorePermission()),
        ({b"vary": [b"X-Known"]}, StorePermission()),
        ({b"vary": [b"origin", b"X-Other"]}, StorePermission("vary", varies_by="x-other")),
        ({b"vary": [b"*"]}, StorePermission("vary", varies_by="*")),
        ({b"vary": [b"x" * 200]}, StorePermission("vary", varies_by="x" * 80)),
    ],
)
def test_an_answer_says_whether_it_may_be_stored(fields: Fields, expected: StorePermission) -> None:
    """An age that is no number is none, and what an answer varies by has to be in the key."""
    assert expected == http.storable(fields, lambda name: name == b"x-known")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([b"application/json"], True),
        ([b"Application/JSON; charset=UTF-8"], True),
        ([b'application/vnd.api+json; charset="utf8"'], True),
        ([b"application/json; charset=latin-1"], False),
        ([b"application/json; charset=utf-8; charset=latin-1"], False),
        ([b"text/json"], False),
        ([b"application/jsonl"], False),
        ([b"application/json", b"application/json"], False),
        ([], False),
    ],
)
def test_json_is_in_utf_8_unless_it_says_otherwise(values: list[bytes], expected: bool) -> None:
    """A type that is named twice is none."""
    assert expected is http.is_json({b"content-type": values})


@pytest.mark.parametrize(
    ("codings", "encoded", "gzip"),
    [
        ([], False, False),
        ([b"identity"], False, False),
        ([b" GZIP "], True, True),
        ([b"x-gzip"], True, True),
        ([b"gzip, br"], True, False),
        ([b"gzip", b"gzip"], True, False),
        ([b"br"], True, False),
    ],
)
def test_encodings_of_bodies(codings: list[bytes], encoded: bool, gzip: bool) -> None:
    """One gzip alone can be read; everything else that is named is an encoding."""
    fields = {b"content-encoding": codings}

    assert (encoded, gzip) == (http.is_encoded(fields), http.is_gzip(fields))


@pytest.mark.parametrize(
    ("accepts", "expected"),
    [
        (b"gzip", True),
        (b"br, GZip;q=0.5", True),
        (b"gzip;q=0", False),
        (b"gzip; q=0.000", False),
        (b"*", False),
        (b"identity", False),
    ],
)
def test_gzip_is_sent_to_who_names_it(accepts: bytes, expected: bool) -> None:
    """A weight of nothing is a refusal, and ``*`` may mean another coding."""
    assert expected is http.accepts_gzip([(b"accept", b"gzip"), (b"Accept-Encoding", accepts)])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], True), ([b"application/json"], True), ([b"text/html", b"*/*;q=0.1"], True), ([b"text/html"], False)],
)
def test_accept_leaves_room_for_json(values: list[bytes], expected: bool) -> None:
    """All lines of ``Accept`` are one list."""
    assert expected is http.accepts_json({b"accept": values} if values else {})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([b"12"], 12),
        ([b"0"], 0),
        ([], 0),
        ([b"1", b"1"], 0),
        ([b"-1"], 0),
        ([b"1" * 19], 0),
        ([b"1" * 18], int("1" * 18)),
    ],
)
def test_a_stated_length(values: list[bytes], expected: int) -> None:
    """A length that is stated twice, or is no number that a body can have, says nothing."""
    assert expected == http.content_length([(b"content-length", value) for value in values])


def test_headers_of_a_body_of_ours() -> None:
    """What fits the client's body alone is replaced; the rest keeps its order."""
    sent = [
        (b"Content-Length", b"9"),
        (b"A", b"1"),
        (b"expect", b"100-continue"),
        (b"accept-encoding", b"br"),
        (b"b", b"2"),
    ]

    assert [(b"A", b"1"), (b"b", b"2"), (b"accept-encoding", b"identity"), (b"content-length", b"5")] == (
        http.for_sub_request(sent, 5)
    )


def test_headers_that_a_hit_repeats() -> None:
    """What an answer is, and what keeps browsers safe, but no cookie and nothing of its body."""
    said = [
        (b"Content-Type", b"application/json"),
        (b"set-cookie", b"a=b"),
        (b"etag", b'"1"'),
        (b"Access-Control-X", b"y"),
    ]

    assert [(b"content-type", b"application/json"), (b"access-control-x", b"y")] == http.replayed(said)
    assert [(b"Content-Type", b"application/json"), (b"set-cookie", b"a=b"), (b"Access-Control-X", b"y")] == (
        http.less_body(said)
    )


def test_a_request_is_bound_to_its_body_by_name() -> None:
    """A digest or a signature fits no other bytes, in whatever case its name is written."""
    assert http.binds_its_body(by_name([(b"Content-Digest", b"x")]))
    assert not http.binds_its_body(by_name([(b"content-type", b"x")]))


@pytest.mark.parametrize(
    ("members", "detail", "expected"),
    [
        (("hit",), None, "redis-asgi; hit"),
        (("fwd=miss", "stored"), None, "redis-asgi; fwd=miss; stored"),
        ((), "only-if-cached", "redis-asgi; detail=only-if-cached"),
        (("fwd=miss",), "1 of 2", 'redis-asgi; fwd=miss; detail="1 of 2"'),
    ],
)
def test_a_member_of_cache_status(members: tuple[str, ...], detail: str | None, expected: str) -> None:
    """A detail is a token where it can be one, else a string."""
    assert expected == http.status(*members, detail=detail)
