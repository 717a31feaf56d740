"""The health of a server: does it answer, does it serve, and what it says of itself (``INFO``)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import Failure


@dataclass(frozen=True, slots=True)
class Health:
    """The findings of one look; ``None`` stands for what is not known.

    Attributes:
        failure: What is wrong, if anything is.
        partial: Whether Redis goes on serving some of what it is asked for.
        latency: Seconds from a PING to its answer, the slowest primary's on a cluster.
        servers: The fields of ``INFO``,
            a mapping for every primary that answered; empty where it is refused.
    """

    failure: Failure | None = None
    partial: bool = False
    latency: float | None = None
    servers: tuple[Mapping[str, str], ...] = ()

    @property
    def is_up(self) -> bool:
        """Whether a PING was answered, on a cluster by all of it."""
        return self.latency is not None and self.failure is not Failure.CLUSTER

    @property
    def clients(self) -> int | None:
        """Connected clients."""
        return self.count("connected_clients")

    @property
    def memory(self) -> int | None:
        """Used memory in bytes."""
        return self.count("used_memory")

    @property
    def saved_at(self) -> int | None:
        """Unix seconds of the last successful save, the oldest one on a cluster."""
        return self.count("rdb_last_save_time", min)

    def number(self, name: str, combine: Callable[[Iterable[float]], float] = sum) -> float | None:
        """A field of all who answered as one number; ``None`` when it is unknown of any of them.

        Args:
            combine: How those of several primaries become one.
        """
        found = []
        for server in self.servers:
            try:
                found.append(float(server[name]))
            except (KeyError, ValueError):
                return None
        return combine(found) if found else None

    def count(self, name: str, combine: Callable[[Iterable[float]], float] = sum) -> int | None:
        """`number` as a whole one."""
        number = self.number(name, combine)
        return None if number is None else int(number)

    @property
    def server(self) -> str:
        """Name and version of the server, such as ``redis 7.0.15``;
        ``unknown`` when it does not say.
        """
        said = self.servers[0] if self.servers else {}
        for field in ("valkey_version", "dragonfly_version", "redis_version"):
            if field in said:
                return f"{field.removesuffix('_version')} {said[field]}"
        return "unknown"
