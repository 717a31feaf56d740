"""Writes of epochs, as values."""

import pytest

from redis_asgi.embeddings.records.codec import NO_EPOCH
from redis_asgi.embeddings.storage import epochs
from redis_asgi.embeddings.storage.operations import Write

DAY = 86_400.0


@pytest.mark.parametrize(
    ("write", "size", "ttl", "mode"),
    [
        pytest.param(epochs.claim(b"e"), 8, 600.0, "absent", id="claim"),
        pytest.param(epochs.renewal(b"e", 60.0), 0, DAY, "renew", id="renewal of a short TTL"),
        pytest.param(epochs.renewal(b"e", DAY), 0, 2 * DAY, "renew", id="renewal of a long TTL"),
        pytest.param(epochs.replacement(b"e", DAY), 8, 2 * DAY, "set", id="replacement"),
        pytest.param(epochs.flush(b"e"), 8, 366 * DAY, "set", id="flush"),
    ],
)
def test_an_epoch_outlives_its_vectors(write: Write, size: int, ttl: float, mode: str) -> None:
    """It lasts for two lives of a vector, or for a year where that is not known;
    a claim only until it is used.
    """
    assert (b"e", size, ttl, mode) == (write.name, len(write.value), write.ttl, write.mode)


def test_each_epoch_is_another() -> None:
    """Values of one are never valid under another."""
    assert 100 == len({epochs.flush(b"e").value for _ in range(100)} - {NO_EPOCH})


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"12345678", b"12345678"), (b"1234567", NO_EPOCH), (b"", NO_EPOCH), (None, NO_EPOCH), (8, NO_EPOCH)],
)
def test_what_is_no_epoch_validates_nothing(raw: object, expected: bytes) -> None:
    """A reply is eight bytes, or no epoch."""
    assert expected == epochs.as_epoch(raw)
