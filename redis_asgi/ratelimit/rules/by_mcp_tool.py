"""The partition of the tool that an MCP client calls."""

from typing import Any

from ...asgi.bodies import Document, Member, has_twice
from ...misuse import constructor_says_what_was_meant
from .by_body import ByBody, Said, Values

_METHOD = (Member("method"),)
_TOOL = (Member("params"), Member("name"))


@constructor_says_what_was_meant("by_mcp_tool(['search', 'fetch_*'])")
class by_mcp_tool(ByBody):  # noqa: N801 - reads as a function where it is used
    """Partition by the tool that an MCP client calls:
    ``params.name`` of a JSON-RPC request ``tools/call``.

    ::

        Rule("30/minute", name="tools", paths="/mcp", partition_by=[by_header("authorization"), by_mcp_tool(TOOLS)])

    Every other message (``initialize``, ``tools/list``, notifications, responses) is not covered.
    The header ``Mcp-Name`` is not believed. A batch, which revisions before 2025-06-18 know, is in
    the bucket *other* and costs its calls: ``cost`` for each of them, unless a callable says the
    cost.

    Args:
        values: Names or patterns of tools, or a mapping of them to buckets; see `by_json`.
        other: The one bucket of every other tool, of batches, and of bodies that are unreadable.
            ``None``: the rule does not apply to other tools; to what may be a call of one of
            *values* it does, in the bucket ``other``.

    Raises:
        ConfigurationError: For *values* that match nothing.
    """

    kind = "mcp_tool"
    counts_uses = True

    def __init__(self, values: Values, *, other: str | None = "other") -> None:
        super().__init__(values, other, "by_mcp_tool", {"search": "read", "fetch_*": "read"})

    def __repr__(self) -> str:
        return "by_mcp_tool(...)"

    def read(self, document: Document) -> Said:
        if not document.is_read:
            return self._unread(document)
        message = document.value
        if isinstance(message, list):
            return self._read_batch(document)
        if document.has_twice(_METHOD):
            return self._unclear()
        if not _is_call(message):
            return Said(None)
        return self._unclear() if document.has_twice(_TOOL) else self._said(_tool(message))

    def _read_batch(self, document: Document) -> Said:
        messages = document.members()
        if messages is None:  # too many to tell
            return Said(self._unclear().bucket, len(document.value))
        calls = [message for message in messages if _is_call(message) or has_twice(message, "method")]
        if self._other is None:
            calls = [call for call in calls if _is_unclear(call) or self._bucket(_tool(call)) is not None]
        return Said(self._unclear().bucket, len(calls)) if calls else Said(None)


def _is_unclear(call: Any) -> bool:
    return has_twice(call, "method") or has_twice(call, "params") or has_twice(call.get("params"), "name")


def _is_call(message: object) -> bool:
    return isinstance(message, dict) and message.get("method") == "tools/call"


def _tool(call: Any) -> object:
    params = call.get("params")
    return params.get("name") if isinstance(params, dict) else None
