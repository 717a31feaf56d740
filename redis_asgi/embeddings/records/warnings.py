"""Warnings that are said once."""

import logging

from ...events import say
from .lease import Lease

logger = logging.getLogger("redis_asgi.embeddings")

_MAX_SAID = 64  # warnings about what clients name
_SHOWN = 80  # characters of a name that a client or the app chose


class Warnings:
    """What one middleware has said."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def warn(self, event: str, *, about: str = "", **details: object) -> None:
        """Log a warning the first time only; *about*: for each of these, the first `_MAX_SAID` of all."""
        said = (event, about)
        if said not in self._said and (not about or len(self._said) < _MAX_SAID):
            self._said.add(said)
            say(logger, event, **({"about": about, **details} if about else details))

    def wire_format_fails(self, wire_format: str, step: str, got: object) -> None:
        """Say that a wire format, which may be the user's, raised in a *step* of its, or returned what it must not."""
        self.warn("embedding_wire_format_fails", wire_format=wire_format, step=step, got=type(got).__name__)

    def lengths_differ(self, model: str) -> None:
        """Say that vectors for one name of a *model* have several lengths."""
        self.warn("embedding_lengths_differ", model=model[:_SHOWN])

    def model_changed(self, requested: str, before: Lease | None, now: Lease) -> None:
        """Say that the app names another model *now* than it did for what is stored."""
        self.warn(
            "embedding_model_changed",
            requested=requested[:_SHOWN],
            before=before.model[:_SHOWN] if before is not None else None,
            now=now.model[:_SHOWN],
        )
