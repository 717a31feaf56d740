"""Scopes of requests."""

from collections.abc import Iterable

from starlette.types import Scope


def http(
    client: str | None = "192.0.2.1",
    headers: Iterable[tuple[str, str]] = (),
    path: str = "/",
    root_path: str = "",
    method: str = "GET",
) -> Scope:
    """A request's scope."""
    return {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "client": None if client is None else (client, 1234),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
