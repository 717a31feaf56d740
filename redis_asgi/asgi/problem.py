"""Problem documents (RFC 9457), and how a WebSocket is refused."""

from http import HTTPStatus

import orjson

CONTENT_TYPE = b"application/problem+json"
# RFC 6455: "when there is no other more suitable status code";
# before accept, servers answer it with 403.
POLICY_VIOLATION = 1008


def problem(status: int, detail: str = "", kind: str = "about:blank", **members: object) -> bytes:
    """A problem document.

    Args:
        status: Its title is the status's own phrase.
        detail: For people; none when empty.
        kind: The URI of the problem's type.
        members: Extensions, with underscores for hyphens.
    """
    document: dict[str, object] = {"type": kind, "title": HTTPStatus(status).phrase, "status": status}
    if detail:
        document["detail"] = detail
    document.update((name.replace("_", "-"), value) for name, value in members.items())
    return orjson.dumps(document)
