"""Bodies, and the buckets that they fall into."""

import json
from typing import Any

PLANS = {"gpt-5-mini*": "small", "gpt-5*": "large"}


def body(**members: Any) -> bytes:
    """A JSON body."""
    return json.dumps(members).encode()


def call(tool: Any = "search", **more: Any) -> Any:
    """A call of an MCP tool."""
    return {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": tool, "arguments": {"name": "x"}},
    } | more


TOOLS = {"search": "search", "fetch_*": "fetch"}
