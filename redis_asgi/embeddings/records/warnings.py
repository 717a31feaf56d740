"""Warnings that are said once."""

import logging

from ...events import SaidOnce
from .lease import Lease

logger = logging.getLogger("redis_asgi.embeddings")

_SHOWN = 80  # characters of a name that a client or the app chose


class Warnings(SaidOnce):
    """The warnings of one middleware."""

    def __init__(self) -> None:
        super().__init__(logger)

    def wire_format_fails(self, wire_format: str, step: str, got: object) -> None:
        """Say that a wire format, which may be the user's,
        raised in a *step* of its, or returned what it must not.
        """
        self.say("embedding_wire_format_fails", wire_format=wire_format, step=step, got=type(got).__name__)

    def lengths_differ(self, model: str) -> None:
        """Say that vectors for one name of a *model* have several lengths."""
        self.say("embedding_lengths_differ", model=model[:_SHOWN])

    def model_changed(self, requested: str, before: Lease | None, now: Lease) -> None:
        """Say that the app names another model *now* than it did for what is stored."""
        self.say(
            "embedding_model_changed",
            requested=requested[:_SHOWN],
            before=before.model[:_SHOWN] if before is not None else None,
            now=now.model[:_SHOWN],
        )
