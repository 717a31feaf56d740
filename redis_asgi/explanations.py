"""Meanings of the words of the log,
of health checks and of metrics' labels: ``redis-asgi explain``.
"""

import difflib
import logging
from dataclasses import dataclass

from .events import BREAKER_OPEN, EVENTS, FIELD, PREFIX, REASONS, Event


@dataclass(frozen=True, slots=True)
class Explanation:
    """A word of the log, of a health check or of a metric's label, in words.

    Attributes:
        word: As it is written there.
        where: ``debug``, ``warning`` or ``error`` of the log, else ``health``.
        cause: What it says; what differs from line to line is in capitals.
        fix: What to do.
    """

    word: str
    where: str
    cause: str
    fix: str


def explanations() -> tuple[Explanation, ...]:
    """Every event, and every code of a health check."""
    events = (
        Explanation(
            PREFIX + name,
            logging.getLevelName(row.level).lower(),
            _general(row.cause, row),
            _general(row.fix, row),
        )
        for name, row in EVENTS.items()
    )
    reasons = (Explanation(f"redis_{name}", "health", row.cause, row.fix) for name, row in REASONS.items())
    return (*events, *reasons, Explanation("breaker_open", "health", BREAKER_OPEN.cause, BREAKER_OPEN.fix))


def explain(word: str) -> Explanation | None:
    """The meaning of *word*: an event, with its prefix or without,
    a health check's code, or a reason (``timeout``).
    """
    # Also as it stands in a line, with its colon and what follows.
    word = word.strip().partition(":")[0]
    known = {each.word: each for each in explanations()}
    return next((known[each] for each in (word, PREFIX + word, f"redis_{word}") if each in known), None)


def near(word: str) -> list[str]:
    """Words that *word* may have been meant for, the likeliest first."""
    known = {each.word.removeprefix(PREFIX): each.word for each in explanations()}
    bare = word.lower().removeprefix(PREFIX)
    found = difflib.get_close_matches(bare, known, n=3, cutoff=0.5)
    found += [name for name in known if bare and bare in name and name not in found]
    return [known[name] for name in found[:3]]


def _general(text: str, event: Event) -> str:
    """A text of *event* without a line's fields: their names stand for them, in capitals."""
    text = text.replace(". %(cause)s", ".").replace("%(cure)s", event.generally)
    return FIELD.sub(lambda found: found[1].upper(), text)
