"""Paths that are embedding endpoints, and the wire format of each."""

import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigurationError
from ...misuse import shown
from ..wire import DEFAULT_PATHS, WIRE_FORMATS, WireFormat

_MODEL = "{model}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An embedding endpoint: its wire format, and what ``{model}`` stood for."""

    wire: WireFormat
    path_model: str | None


class Routes:
    """Paths, exact or with a ``{model}`` that spans slashes, each with its wire format."""

    def __init__(self, paths: Mapping[str, WireFormat]) -> None:
        self._exact = {path: Endpoint(wire, None) for path, wire in paths.items() if _MODEL not in path}
        self._patterns = tuple((_pattern(path), wire) for path, wire in paths.items() if _MODEL in path)

    def match(self, scope: MutableMapping[str, Any]) -> Endpoint | None:
        """The endpoint of *scope*, by its full path or by that less ``root_path``; ``None`` if it
        is none.
        """
        path: str = scope["path"]
        found = self._find(path)
        root = scope.get("root_path", "")
        if found is None and root and path.startswith(root):
            found = self._find(path[len(root) :])
        return found

    def _find(self, path: str) -> Endpoint | None:
        found = self._exact.get(path)
        if found is not None:
            return found
        for pattern, wire in self._patterns:
            matched = pattern.fullmatch(path)
            if matched:
                return Endpoint(wire, matched["model"])
        return None


def read_routes(routes: Mapping[str, WireFormat | str] | None, names: Iterable[str]) -> Routes:
    """The routes given in code, else those of ``EMBEDDING_CACHE_ROUTES``.

    Raises:
        ConfigurationError: For an unknown wire format, or a path that does not start with ``/``.
    """
    paths: dict[str, WireFormat] = {}
    if routes is not None:
        _check_routes(routes)
        for path, wire in routes.items():
            if not path.startswith("/") or path.count(_MODEL) > 1:
                raise ConfigurationError(f"routes={path!r} is not a path. Try '/v1/embeddings'.")
            paths[path] = _named(wire, "routes") if isinstance(wire, str) else _checked(wire, path)
        return Routes(paths)
    for entry in names:
        name, colon, path = entry.partition(":")
        wire = _named(name, "EMBEDDING_CACHE_ROUTES")
        if not colon and name not in DEFAULT_PATHS:
            raise ConfigurationError(f"EMBEDDING_CACHE_ROUTES={name!r} has no usual path. Try {name}:/embed.")
        paths |= {path: wire} if colon else DEFAULT_PATHS[name]
    return Routes(paths)


def _check_routes(routes: object) -> None:
    """A mapping of paths to wire formats, and not the other way round.

    Raises:
        ConfigurationError: Says what was meant.
    """
    if isinstance(routes, str) or not isinstance(routes, Mapping):
        named = [routes] if isinstance(routes, str) else list(routes) if isinstance(routes, Iterable) else []
        known = [name for each in named if (name := str(each).partition(":")[0]) in DEFAULT_PATHS]
        usual = {path: name for name in known for path in list(DEFAULT_PATHS[name])[:1]} or {"/v1/embeddings": "openai"}
        setting = f", or EMBEDDING_CACHE_ROUTES={','.join(known)} for its usual paths" if known else ""
        raise ConfigurationError(f"routes={shown(routes)} is no mapping of paths. Try routes={usual!r}{setting}.")
    if not routes:
        raise ConfigurationError("routes={} caches nothing. Try routes={'/v1/embeddings': 'openai'}, or leave it out.")
    for path, wire in routes.items():
        if isinstance(wire, str) and wire.startswith("/") and path in WIRE_FORMATS:
            raise ConfigurationError(
                f"routes={{{path!r}: {wire!r}}} is the wrong way round. Try {{{wire!r}: {path!r}}}."
            )
        if not isinstance(path, str):
            raise ConfigurationError(f"routes={shown(path)} is not a path. Try '/v1/embeddings'.")


def _named(name: str, source: str) -> WireFormat:
    if name not in WIRE_FORMATS:
        known = ", ".join(WIRE_FORMATS)
        raise ConfigurationError(f"{source}={name!r} is not a wire format. Try one of {known}.")
    return WIRE_FORMATS[name]


def _checked(wire: WireFormat, path: str) -> WireFormat:
    missing = [name for name in ("name", "split", "shrink", "read", "render") if not hasattr(wire, name)]
    if missing:
        lacks = ", ".join(missing)
        raise ConfigurationError(f"routes[{path!r}] lacks {lacks} of WireFormat. Try 'openai'.")
    return wire


def _pattern(path: str) -> re.Pattern[str]:
    # Names of models have slashes: "azure/ada", "BAAI/bge-m3".
    return re.compile("(?P<model>.+)".join(map(re.escape, path.split(_MODEL))), re.DOTALL)
