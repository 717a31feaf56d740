"""Checks of the arguments of rules; each says what to write instead."""

import difflib
import re
from collections.abc import Iterable, Sequence

from ...errors import ConfigurationError
from ...misuse import shown
from ...settings.notation import MAX_QUOTA

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_METHOD = re.compile(r"[A-Z]{1,20}")
# IANA's "HTTP Method Registry", what caches and UPnP add, and a handshake;
# a name that is like none is an app's own.
_METHODS = (
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY", "WEBSOCKET",
    "PURGE", "BAN", "NOTIFY", "SUBSCRIBE", "UNSUBSCRIBE", "MSEARCH", "ACL", "BIND", "CHECKIN", "CHECKOUT",
    "COPY", "LABEL", "LINK", "LOCK", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MKREDIRECTREF",
    "MKWORKSPACE", "MOVE", "ORDERPATCH", "PRI", "PROPFIND", "PROPPATCH", "REBIND", "REPORT", "SEARCH", "UNBIND",
    "UNCHECKOUT", "UNLINK", "UNLOCK", "UPDATE", "UPDATEREDIRECTREF",
)  # fmt: skip
_METHODS_ELSEWHERE = {
    "ALL": "Leave it out for all methods.",
    "ANY": "Leave it out for all methods.",
    "WS": "Did you mean 'WEBSOCKET'?",
}
# What other packages call a strategy, or what to do without Redis.
_ELSEWHERE = {
    "allow": "open",
    "deny": "closed",
    "leaky-bucket": "gcra",
    "memory": "local",
    "raise": "closed",
    "refuse": "closed",
    "sliding-log": "moving-window",
    "token-bucket": "gcra",
}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a *value* that is none of *choices*.

    Raises:
        ConfigurationError: Lists the choices.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        meant = _ELSEWHERE.get(str(value).replace("_", "-").lower(), near[0] if near else "")
        example = meant if meant in choices else choices[0]
        raise ConfigurationError(f"{name}={shown(value)} is not one of {', '.join(choices)}. Try {example!r}.")


def check_name(name: object) -> str:
    """A name fit for a rule: it stands in header fields, Redis fields and metric labels.

    Raises:
        ConfigurationError: If it does not fit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"name={name!r} is not 1 to 40 of A-Z a-z 0-9 _ . -. Try 'search'.")
    return name


def check_cost(cost: object, what: str = "cost") -> int:
    """A cost, or *what* else is one, is a whole number of units, 0 or more.

    Raises:
        ValueError: If it is not; ``True`` is no number.
    """
    if not isinstance(cost, int) or isinstance(cost, bool) or cost < 0:
        raise ValueError(f"{what}={cost!r} is not a whole number of units, 0 or more.")
    return cost


def check_concurrency(number: object, *, least: int) -> int:
    """A number of requests in flight is a whole one, *least* to 10^9.

    Raises:
        ValueError: If it is not; ``True`` is no number.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= MAX_QUOTA:
        raise ValueError(f"concurrency={shown(number)} is not a whole number of requests in flight, {least} to 10^9.")
    return number


def check_strategy_of_tokens(strategy: str) -> None:
    """Refuse a *strategy* that cannot give back what was estimated too high.

    Raises:
        ConfigurationError: Says why.
    """
    why = {
        "gcra": "gives back only what has not drained",
        "moving-window": "keeps a time for each token, and 10,000 at most",
    }.get(strategy)
    if why is not None:
        raise ConfigurationError(
            f"strategy={strategy!r} {why}, so that cost=tokens() does not go with it. "
            "Try strategy='fixed-window' or 'sliding-window-counter'."
        )


def check_method(method: str, *, label: str = "methods") -> None:
    """Refuse what no client sends: a rule of such a method would limit nothing, and say nothing."""
    if _METHOD.fullmatch(method):
        near = difflib.get_close_matches(method, _METHODS, n=1, cutoff=0.66)
        meant = _METHODS_ELSEWHERE.get(method, f"Did you mean {near[0]!r}?" if near else "")
        if method in _METHODS or not meant:
            return  # one of an app's own, perhaps
    else:
        several = re.findall(r"[A-Z]+", method)
        meant = (
            f"Try {tuple(several)!r}." if len(several) > 1 else "Try 'POST' or 'WEBSOCKET', or leave it out for all."
        )
    raise ConfigurationError(f"{label}={method!r} is not an HTTP method. {meant}")


def several(name: str, value: str | Iterable[str], example: str) -> tuple[str, ...]:
    """One value or several as a tuple.

    Raises:
        ConfigurationError: For none: a rule that covers nothing would be a limit silently off.
    """
    if not isinstance(value, str | Iterable):
        raise ConfigurationError(f"{name}={shown(value)} is neither text nor several. Try {name}={example}.")
    found = (value,) if isinstance(value, str) else tuple(value)
    if not found:
        raise ConfigurationError(f"{name}={value!r} covers nothing. Try {name}={example}, or None for all.")
    return found
