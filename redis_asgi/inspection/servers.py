"""The servers that some settings name, and what the package keeps on each."""

from dataclasses import dataclass

from ..settings import Settings


@dataclass(frozen=True, slots=True)
class Server:
    """A server the settings name, and what the package keeps there.

    Attributes:
        name: ``redis``, the shared one, or ``vectors``, that of ``EMBEDDING_CACHE_REDIS_URL``.
        settings: Those that lead there.
        limits: Whether counters are kept there.
        vectors: Whether vectors are.
    """

    name: str
    settings: Settings
    limits: bool
    vectors: bool


def servers_of(settings: Settings) -> list[Server]:
    """The shared server, and that of ``EMBEDDING_CACHE_REDIS_URL`` if there is one; none of ``memory://``."""
    found = [Server("redis", settings, limits=True, vectors=settings.EMBEDDING_CACHE_REDIS_URL is None)]
    if settings.EMBEDDING_CACHE_REDIS_URL is not None:
        # Here, because it brings numpy along, which nothing else of this module needs.
        from ..embeddings.store import resolve_vectors  # noqa: PLC0415

        found.append(Server("vectors", resolve_vectors(None, settings)[0].settings, limits=False, vectors=True))
    return [server for server in found if not server.settings.is_memory]
