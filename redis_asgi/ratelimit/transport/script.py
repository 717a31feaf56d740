"""The script, the one writer of a command that calls it,
and the one reader of what it replies to that.
"""

import hashlib
import logging
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from typing import Any

import hiredis

from ...errors import Failure, OddReply, classify_reply
from ...events import say
from ..limits.policy import bulk
from .check import Check, graver, still_waiting

logger = logging.getLogger("redis_asgi.ratelimit")


def _load_script() -> bytes:
    folder = files(__package__) / "scripts"
    names = ("prelude", "fixed_window", "sliding_window_counter", "moving_window", "gcra", "concurrency", "batch")
    return b"\n".join((folder / f"{name}.lua").read_bytes() for name in names)


SCRIPT = _load_script()
SCRIPT_SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()


# The script with nothing to decide: whether it may be called,
# and once it is loaded whether it runs.
NOTHING_ASKED = (b"EVALSHA", SCRIPT_SHA, b"0", b"0", b"")


class Call:
    """One command to the script.

    Args:
        checks: The requests it asks about.
        number: What its reply has to begin with. A reply to another command, behind one that a
            proxy has swallowed, would else be taken for this one's, and every request be given
            another's verdict from there on.
        clock: The script's time in us, for tests; ``None`` = Redis's own.
    """

    __slots__ = ("checks", "clock", "in_full", "number")

    def __init__(self, checks: list[Check], number: int, clock: int | None = None) -> None:
        self.checks = checks
        self.number = number
        self.clock = clock
        self.in_full = False  # whether it was sent with the script itself

    def command(self) -> bytes:
        """The whole command in RESP, joined from what charges keep ready."""
        keys: list[bytes] = []
        questions: list[bytes] = []
        key_count, words = 0, 5
        for check in self.checks:
            asked = check.asked
            keys.append(asked.keys)
            key_count += asked.key_count
            words += asked.key_count + asked.words
            question = asked.consume
            if check.mode != "consume":
                question = bulk(check.mode.encode()) + asked.terms + b"".join(map(_number, check.receipts))
                words += len(check.receipts)
            if asked.holds and check.mode != "peek":
                question += bulk(b" ".join(check.holders))
                words += 1
            questions.append(question)
        clock = bulk(b"") if self.clock is None else _number(self.clock)
        head = b"*%d\r\n%b%b" % (words, _IN_FULL if self.in_full else _BY_NAME, _number(key_count))
        return b"".join((head, *keys, _number(self.number), clock, *questions))

    def command_in_full(self) -> bytes | None:
        """`command` once more, with the script, for a server that did not know it;
        ``None``: no check waits any more.

        Nothing ran, so sending it again cannot count twice.
        """
        self.in_full = True
        self.checks = still_waiting(self.checks)
        return self.command() if self.checks else None

    def words(self) -> list[Any]:
        """`command` as redis-py takes it."""
        reader = hiredis.Reader()
        reader.feed(self.command())
        name, *rest = reader.gets()
        return [name.decode(), *rest]

    def hand_out(self, reply: Any) -> Failure | None:
        """Give each check its part of *reply*; an odd key costs its own request only.

        Returns:
            Why some have no verdict, the gravest reason; ``None`` when all have one.

        Raises:
            OddReply: If it is no reply to this call; checks without an outcome still wait then.
        """
        try:
            return self._hand_out(reply)
        except (TypeError, LookupError, ValueError):
            raise OddReply("The reply is not one to these checks.") from None

    def _hand_out(self, reply: Any) -> Failure | None:
        if reply[0] != self.number or len(reply) != 1 + len(self.checks):
            raise LookupError
        worst: Failure | None = None
        for check, part in zip(self.checks, islice(reply, 1, None), strict=True):
            if type(part) is list and len(part) == check.asked.reply_size:
                sum(part)  # of anything but numbers a TypeError
                check.answer(part)
            elif isinstance(part, bytes | str):
                outcome = classify_reply(part.decode() if isinstance(part, bytes) else part)
                if outcome is Failure.PERMISSION and check.asked.holds:
                    # What the others need may be allowed: it does not stop them.
                    _say_denied()
                else:
                    worst = graver(worst, outcome)
                check.answer(outcome)
            else:
                raise LookupError
        return worst


@lru_cache
def _say_denied() -> None:
    """Say once what a user of before there were concurrency limits lacks."""
    say(logger, "concurrency_denied")


def _number(value: int) -> bytes:
    return bulk(b"%d" % value)


_BY_NAME = bulk(b"EVALSHA") + bulk(SCRIPT_SHA)
_IN_FULL = bulk(b"EVAL") + bulk(SCRIPT)
