"""Arguments and options that several commands take."""

from typing import Annotated

import typer

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Use this server instead of the configured ones. Other users of this host can see it: a password "
        "belongs into the environment.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
ClientArgument = Annotated[
    str,
    typer.Argument(
        metavar="CLIENT",
        help="An address, or the value of the header, user or partition. - reads it from standard input, so that a "
        "credential is in no history and no process list. It is never printed.",
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="KIND",
        help="ip, header:NAME, user, json:NAME, mcp_tool or custom; or several, as header:NAME,json:NAME, of which "
        "CLIENT is then a list in JSON. Default: RATE_LIMIT_PARTITION.",
    ),
]
Name = Annotated[str | None, typer.Option("--name", metavar="RULE", help="Only the counters of this rule.")]
# Typer would print what is too much, which may be a part of a credential; `alone` does not.
ANY_ARGUMENTS = {"allow_extra_args": True}
App = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="MODULE:ATTRIBUTE",
        help="Import this app, as servers do (main:app, or main:make_app()), and know all that limits it.",
    ),
]
