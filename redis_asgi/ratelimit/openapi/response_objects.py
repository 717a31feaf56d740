"""Answers of limits as OpenAPI describes them: Response Objects,
and the schemas of bodies in each dialect.
"""

import copy
from typing import Any, TypeAlias, get_args

from ...asgi.problem import CONTENT_TYPE
from ...settings import HeaderStyle
from ..answers.dialects import DIALECTS, NUMBERS, DialectName
from ..rules.checks import check_choice

Document: TypeAlias = dict[str, Any]

_NAME = "RateLimitProblem"

_PROBLEM: Document = {
    "title": _NAME,
    "description": "A problem document (RFC 9457).",
    "type": "object",
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "Which kind of problem it is."},
        "title": {"type": "string"},
        "status": {"type": "integer", "description": "The status of the response."},
        "detail": {"type": "string", "description": "One sentence or two for a person."},
        "violated-policies": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Names of the policies that refused the request, of a 429.",
        },
    },
    "required": ["type", "title", "status", "detail"],
}
_DETAIL: Document = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
_DESCRIPTIONS = {
    400: "The request lacks what it would be counted by.",
    429: "A rate limit refuses the request.",
    503: "A rate limit cannot be checked right now.",
}


def _header(description: str, kind: str = "string") -> Document:
    return {"description": description, "schema": {"type": kind}}


_NO_STORE = {"Cache-Control": _header("`no-store`")}
_IETF = {
    "RateLimit-Policy": _header("The policies that apply: a quota `q` per window of `w` seconds each."),
    "RateLimit": _header("How the client stands to each: `r` units remain, and `t` seconds until more do."),
}
_LEGACY = {
    "X-RateLimit-Limit": _header("Units per window, of the policy that matters most.", "integer"),
    "X-RateLimit-Remaining": _header("Units that remain.", "integer"),
    "X-RateLimit-Reset": _header("When the quota is back, in Unix seconds.", "integer"),
}
# Of the numbers that dialects tell; of the reset both spellings.
_NUMBERS = {
    "limit": "Units per window of the rule `{}`, if there is one.",
    "remaining": "Units of that which remain.",
    "reset": "When all of them are back: a duration such as `1m0.052s`, or a time (RFC 3339).",
}
_RETRY_AFTER_MS = {"retry-after-ms": _header("`Retry-After` in milliseconds.", "integer")}
_SHOULD_RETRY = {"x-should-retry": _header("`false` where that is more than a minute, or never.")}


def _object(**properties: Document) -> Document:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: Document = {"type": "string"}
_TEXT_OR_NULL: Document = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_BODIES: dict[str, Document] = {
    "openai": _object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)),
    "anthropic": _object(type=_TEXT, error=_object(type=_TEXT, message=_TEXT)),
    "mcp": _object(
        jsonrpc=_TEXT,
        error=_object(
            code={"type": "integer"},
            message=_TEXT,
            data=_object(retry_after={"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        ),
        id={"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]},
    ),
}


def rate_limit_responses(
    *,
    headers: HeaderStyle = "ietf",
    dialect: DialectName | None = None,
    fails_closed: bool = False,
    needs_identity: bool = False,
) -> dict[int | str, dict[str, Any]]:
    """The answers that a limit may give, for ``responses=`` of a FastAPI app, router or route.

    ::

        @app.get("/report", dependencies=[Depends(limit)], responses=rate_limit_responses())

    `document_limits` finds by itself which operations are limited; this is for what it cannot see,
    such as a limit that a dependency of your own asks, or a proxy's.

    Args:
        headers: Which fields a 429 carries; as ``headers=`` of the middleware.
        dialect: That of the middleware outside; ``None`` = problem documents.
        fails_closed: Also the 503 of a limit that is ``on_redis_error="closed"``.
        needs_identity: Also the 400 of ``RATE_LIMIT_MISSING_IDENTITY=refuse``.

    Raises:
        ConfigurationError: If *headers* or *dialect* is none of those.
    """
    check_choice("headers", headers, get_args(HeaderStyle))
    if dialect is not None:
        check_choice("dialect", dialect, get_args(DialectName))
    found = {400: needs_identity, 429: True, 503: fails_closed}
    return {status: response_of(status, headers, _PROBLEM, dialect=dialect) for status, may in found.items() if may}


def response_of(
    status: int, style: HeaderStyle, problem: Document, *, dialect: str | None = None, by_route: bool = True
) -> Document:
    """The Response Object of *status*;
    a route's own is made by the app's handler of ``HTTPException``.
    """
    fields: Document = {}
    if status == 429:
        fields |= {"Retry-After": _header("Seconds until it is admitted; absent where it never can be.", "integer")}
        fields |= (_IETF if style in ("ietf", "both") else {}) | (_LEGACY if style in ("legacy", "both") else {})
    elif status == 503:
        fields |= {"Retry-After": _header("Seconds until it is worth another try.", "integer")}
    content = {CONTENT_TYPE.decode(): {"schema": problem}}
    if dialect is not None:
        content = {"application/json": {"schema": _BODIES[dialect]}}
        fields |= _fields_of(dialect, status)
    elif by_route:
        content["application/json"] = {"schema": _DETAIL}
    # A copy: the user may change what one operation says.
    return copy.deepcopy({"description": _DESCRIPTIONS[status], "headers": fields | _NO_STORE, "content": content})


def _fields_of(dialect: str, status: int) -> Document:
    """The fields that a *dialect* adds to a response of that *status*."""
    fields: Document = {}
    if status == 429:
        for kind, names in DIALECTS[dialect].field_names.items():
            both = zip(names, NUMBERS, strict=True)
            fields |= {name: _header(_NUMBERS[number].format(kind)) for name, number in both}
    if DIALECTS[dialect].kinds and status != 400:
        fields |= _RETRY_AFTER_MS | (_SHOULD_RETRY if status == 429 else {})
    return fields


def add_problem(document: Document) -> Document:
    """A reference to the problem document's schema,
    under a name that nothing else in *document* has.
    """
    schemas: Document = document.setdefault("components", {}).setdefault("schemas", {})
    name = _NAME
    while schemas.setdefault(name, copy.deepcopy(_PROBLEM)) != _PROBLEM:
        name += "_"
    return {"$ref": f"#/components/schemas/{name}"}
