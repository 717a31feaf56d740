"""Tools for models, over MCP: each has a limit of its own,
and a model that is over one is told so as MCP does.

Each client has 5 searches and 20 other calls a minute::

    python examples/mcp_tools.py
    fastmcp call http://127.0.0.1:8000/mcp search query=limits        # the sixth: "... Retry in 48 s."
"""

import os

import uvicorn
from fastmcp import FastMCP
from starlette.middleware import Middleware

from redis_asgi import RateLimitMiddleware, Rule, Settings, by_mcp_tool, client_ip

SETTINGS = Settings(**({} if Settings().names_redis else {"REDIS_URL": "memory://"}))


def search(query: str) -> list[str]:
    """Titles of books about *query*."""
    return [f"All about {query}"]


def loan(title: str) -> str:
    """Borrow a book."""
    return f"{title} is yours for two weeks."


mcp: FastMCP[None] = FastMCP("library", tools=[search, loan])
RULES = [
    # Listing tools and starting a session are no calls of a tool, and are not counted.
    Rule("5/minute", name="searches", partition_by=[client_ip, by_mcp_tool(["search"], other=None)]),
    Rule("20/minute", name="calls", partition_by=[client_ip, by_mcp_tool({"search": "search"})]),
]
# Its lifespan starts the sessions: a middleware passes it on.
app = mcp.http_app(
    middleware=[Middleware(RateLimitMiddleware, rules=RULES, dialect={"/mcp": "mcp"}, settings=SETTINGS)]
)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
