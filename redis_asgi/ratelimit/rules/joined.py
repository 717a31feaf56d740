"""One partition by several things at once, such as an API key and a model."""

from collections.abc import Iterable, Sequence
from inspect import isawaitable
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.scope import Addressing
from ...settings import Settings
from ..limits.policy import Partition
from .partition import PartitionBy, Partitioner, PartitionPart, check_partition_by


class JoinedPartitioner(Partitioner):
    """A `Partitioner` by several parts: who differs in one of them has another counter.

    A part that says ``None`` of a request takes it out of the rule; the others are not asked then.
    """

    def __init__(self, parts: Sequence[PartitionPart], settings: Settings, addressing: Addressing | None) -> None:
        self._each = each = tuple(Partitioner(part, settings, addressing) for part in parts)
        super().__init__(self._ask, settings, addressing)
        self.kind = ",".join(part.kind for part in each)
        self.readers = tuple(reader for part in each for reader in part.readers)
        self._reads: Any = [part.read for part in each if part.read is not None]
        if len(self._reads) == len(each):
            self.read = self._read

    @property
    def counts_users(self) -> bool:
        return any(part.counts_users for part in self._each)

    @property
    def refuses(self) -> bool:
        return any(part.refuses for part in self._each)

    async def _ask(self, conn: HTTPConnection) -> Any:
        # What the body takes out of the rule needs no identity.
        if any(reader(conn) is None for reader in self.readers):
            return None
        said: Any = (part.by(conn) if part.read is None else part.read(conn.scope) for part in self._each)
        return await self._names(said, conn.scope)

    def _read(self, scope: Scope) -> Any:
        """`_ask` where no callable of the user's is among them; some names may be missing."""
        return tuple([read(scope) for read in self._reads])

    async def settle(self, said: Any, scope: Scope) -> Any:
        if isawaitable(said):
            return await said
        return None if None in self.bucket_of(said) else await self._names(said, scope)

    async def _names(self, said: Iterable[Any], scope: Scope) -> Any:
        names: list[str | Partition] = []
        for part, its in zip(self._each, said, strict=True):
            name = its if isinstance(its, str) else await part.settle(its, scope)
            if name is None:
                return None
            names.append(name)
        return tuple(names)

    def of(self, name: Any) -> Partition:
        return super().of(name if isinstance(name, str) else joined(name))

    def bucket_of(self, name: Any) -> Any:
        return tuple(its for part, its in zip(self._each, name, strict=True) if part.readers)


def joined(names: Iterable[str | Partition]) -> str:
    """The identity of who has all these *names*; that of nobody else.

    Args:
        names: A `Partition` is an address that stands for an identity which a request lacks; no
            identity is like it.
    """
    return "".join(
        [f"{len(name)}:{name}" if isinstance(name, str) else f"ip{len(name.value)}:{name.value}" for name in names]
    )


def partitioner_of(partition_by: PartitionBy | None, settings: Settings, addressing: Addressing | None) -> Partitioner:
    """The partitioner by one callable or by several; a list of one is that one."""
    if partition_by is None or callable(partition_by):
        return Partitioner(partition_by, settings, addressing)
    check_partition_by(partition_by)
    if len(partition_by) == 1:
        return Partitioner(partition_by[0], settings, addressing)
    return JoinedPartitioner(partition_by, settings, addressing)
