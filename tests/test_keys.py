"""Names of Redis keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from redis_asgi import KeyManagement
from redis_asgi.keys import digest, embedding_key, embedding_lease_key, id_mark, key_mark, key_marks, partition_key

PREFIXES = st.text(min_size=1).filter(lambda text: ":" not in text)


@given(prefix=PREFIXES, identifier=st.text())
def test_key_comes_back_apart(prefix: str, identifier: str) -> None:
    """Whatever the identifier holds, colons included, parsing gives back what was put in."""
    assert (prefix, identifier) == KeyManagement.parse_key(KeyManagement.generate_key(prefix, identifier))


def test_key_is_prefix_colon_identifier() -> None:
    """The form is the plain one that people read in redis-cli."""
    assert KeyManagement.generate_key("embedding", "doc:1") == "embedding:doc:1"


@pytest.mark.parametrize("prefix", ["", "a:b", ":"])
def test_prefix_that_could_not_be_split_is_refused(prefix: str) -> None:
    """A prefix is not empty and holds no colon."""
    with pytest.raises(ValueError, match="prefix="):
        KeyManagement.generate_key(prefix, "x")


def test_key_as_redis_returns_it_is_parsed() -> None:
    """UTF-8 bytes are read like text."""
    assert KeyManagement.parse_key("größe:ü".encode()) == ("größe", "ü")


def test_what_is_no_key_at_all() -> None:
    """It is named, before anything is asked of it."""
    with pytest.raises(TypeError, match="key=5 is neither str nor bytes"):
        KeyManagement.parse_key(5)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("nocolon", id="no colon"),
        pytest.param(":identifier", id="empty prefix"),
        pytest.param("", id="empty"),
        pytest.param(b"\xff:x", id="not UTF-8"),
    ],
)
def test_foreign_key_is_refused(key: str | bytes) -> None:
    """What this class did not make is a ``ValueError``."""
    with pytest.raises(ValueError, match=r"key=|utf-8"):
        KeyManagement.parse_key(key)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("a:b", "c"), ("a", "b:c"), id="colon on either side"),
        pytest.param(("ab",), ("a", "b"), id="joined"),
        pytest.param(("", "a"), ("a", ""), id="empty part"),
        pytest.param(("a",), ("a", ""), id="empty part at the end"),
    ],
)
def test_digest_keeps_parts_apart(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """Different parts never make the same digest by being joined."""
    assert digest(*one) != digest(*other)


@given(parts=st.lists(st.text(), max_size=4), secret=st.none() | st.text(min_size=1, max_size=200))
def test_digest_is_22_safe_characters(parts: list[str], secret: str | None) -> None:
    """Any text, lone surrogates included, and a secret of any length give 22 base64url characters."""
    text = digest(*parts, secret=secret)

    assert len(text) == 22
    assert text.replace("-", "").replace("_", "").isalnum()
    assert text == digest(*parts, secret=secret)


def test_lone_surrogate_is_digested() -> None:
    """Text that no UTF-8 can carry still names a counter."""
    assert len(digest("\ud800")) == 22


def test_secret_changes_the_digest() -> None:
    """With another secret, or none, a dump of Redis cannot be searched for known addresses."""
    assert len({digest("a"), digest("a", secret="x"), digest("a", secret="y")}) == 3


def test_partition_key_has_one_hash_tag() -> None:
    """Everything of one partition lives in the slot of its tag."""
    key = partition_key("myapp:", "203.0.113.7")

    assert key == b"myapp:rate_limit:{203.0.113.7}"
    assert key_slot(key) == key_slot(b"203.0.113.7") == key_slot(key + b":default:m60:1")


def test_a_mark_is_a_keys_own() -> None:
    """Of a key that ends with a digest its last bytes,
    of one by id a digest of the whole; in the size asked for.
    """
    name = embedding_lease_key("p:", (b"a",))
    assert bytes.fromhex(name[-32:].decode()) == key_mark(name, 16)
    assert key_mark(name) == key_mark(name, 16)[8:]
    assert [key_mark(name), key_mark(name)] == key_marks([name, name])
    ids = [embedding_key(prefix, name) for prefix in ("", "p:") for name in ("a", "b")]
    assert [8, 8, 8, 8] == [len(id_mark(name)) for name in ids]
    assert 4 == len({id_mark(name) for name in ids})
    assert 16 == len(id_mark(ids[0], 16))
