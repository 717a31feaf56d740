"""Texts that may be shown: without the secrets of URLs, and each in one line."""

import re

_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(\S*)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """*text* whose URLs have no user, no password and no options."""
    return _URL.sub(_redacted, text)


def _redacted(url: re.Match[str]) -> str:
    """A URL without what may be a secret:
    a password may hold an @ or a ?, and an option may be one.
    """
    scheme, rest = url.groups()
    known = "***@" if rest.startswith("***@") else ""
    host, *_ = rest.removeprefix(known).partition("?")
    return scheme + ("***" if "@" in rest.removeprefix(known) else known + host)


def in_one_line(text: str) -> str:
    """*text* with control characters and the like escaped:
    nobody writes lines of his own into the log.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
