"""Keys of a request's records, and the marks that tell a value's epoch and model. Pure."""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

from ...keys import Digest
from .novelty import Marks

_HALF = 4  # bytes of a mark


@dataclass(slots=True, eq=False)
class RecordKeys:
    """The keys of a request's records; requests that say the same share one.

    Attributes:
        scope: The digest that input keys begin with.
        scope_name: The same in bytes: everything in the key but the item.
        lease_name: The lease's key.
        epoch_name: The epoch's key.
        denied_name: The key of when the app last did not know this caller.
        marks: The digest of each value that is in the key, by name;
            ``None`` before `novelty` has looked.
    """

    scope: Digest
    scope_name: bytes
    lease_name: bytes
    epoch_name: bytes
    denied_name: bytes
    marks: Marks | None = field(default=None, repr=False)


@lru_cache(maxsize=1024)
def mark_of(epoch: bytes, model: str) -> bytes:
    """The 8 bytes that a value carries: half of them of the epoch,
    half of it and the model that its answer named.
    """
    return (
        epoch_part(epoch) + hashlib.blake2b(epoch + model.encode("utf-8", "surrogatepass"), digest_size=_HALF).digest()
    )


@lru_cache(maxsize=256)
def epoch_part(epoch: bytes) -> bytes:
    """The first bytes of the marks of all values of an epoch, whatever model answered."""
    return hashlib.blake2b(epoch, digest_size=_HALF).digest()
