"""The commands of ``redis-asgi``: read the arguments, call what does the work, say what came of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from .._version import __version__
from ..connection.manager import RedisManager
from ..errors import ConfigurationError
from ..explanations import explain as explanation_of
from ..explanations import explanations, near
from ..inspection.apps import limits_in, load_app
from ..inspection.diagnosis import diagnose
from ..inspection.findings import Finding
from ..inspection.quotas import known_policies
from ..inspection.reference import reference, settings_in_force
from ..inspection.rights import NO_PASSWORD, rights_of
from ..inspection.servers import servers_of
from ..inspection.sizing import Sizing, compare, estimate
from ..maintenance import configure_persistence, flush_model
from ..settings import Settings, StrategyName
from . import output
from .options import ANY_ARGUMENTS, App, Json, UrlOption
from .quotas import list_rules, peek, reset
from .session import (
    ENV_FILE,
    FAILED,
    MISUSED,
    WARNED,
    complaints,
    greet,
    opened,
    read,
    refuse_memory,
    run,
    settings_for,
    some_server,
    talking_to,
)
from .views import print_changes, print_explanations, print_findings, print_markdown, print_settings, print_sizes

if TYPE_CHECKING:
    from ..embeddings.overview import CacheInForce

app = typer.Typer(
    name="redis-asgi",
    help="Look after what redis_asgi keeps in Redis. Settings come from the environment, as the app's do.\n\n"
    "Exit codes: 0 done, and all is well; 1 something failed, such as a check, or Redis itself; 2 an argument or a "
    "setting cannot work (to check a setting is a finding: 1); 3 check --strict found nothing "
    "worse than warnings; 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        output.line(f"redis-asgi {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Read settings from this file too, as the app does; the environment wins over it.",
        ),
    ] = None,
) -> None:
    """Options that stand before a command."""
    ENV_FILE.set(env_file)


@app.command()
def check(
    app_name: App = None,
    url: UrlOption = None,
    as_json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when there are warnings.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.01, help="For each command. Default: REDIS_TIMEOUT, 5 at most."
        ),
    ] = None,
) -> None:
    """Say whether all is well: a gate for deploys.

    Settings, connection, TLS, server version, role, rights, the script, latency, clock, eviction,
    connections, persistence; sentinels and the slots of a cluster. With --app also the servers that
    its rules and its cache name. Leaves nothing behind.
    """
    about = "settings"
    try:
        settings = settings_for(url)
        within = min(settings.REDIS_TIMEOUT, 5.0) if timeout is None else timeout
        settings = settings.but(REDIS_TIMEOUT=within)
        if app_name is None:
            some_server(settings)
        about = "app"
        loaded = None if app_name is None else load_app(app_name)
    except ConfigurationError as error:
        findings = _mistakes(about, error)
    else:

        async def gather() -> list[Finding]:
            try:
                of_app = None if loaded is None else limits_in(loaded)
            except ConfigurationError as error:
                return _mistakes("app", error)
            with output.progress() as step:
                known = (None,) if of_app is None else (of_app.limits, of_app.caches)
                return [finding async for finding in diagnose(settings, step, *known)]

        findings = run(gather())
    failed = any(finding.level == "fail" for finding in findings)
    warned = any(finding.level == "warn" for finding in findings)
    if as_json:
        output.json({"ok": not failed, "findings": findings})
    else:
        print_findings(findings)
    raise typer.Exit(FAILED if failed else WARNED if warned and strict else 0)


def _mistakes(about: str, error: ConfigurationError) -> list[Finding]:
    return [Finding(about, "fail", each, "Correct it and check again.") for each in error.problems]


@app.command("settings")
def list_settings(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.", show_default=False)
    ] = None,
    url: UrlOption = None,
    as_json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the table of the documentation; reads no environment.")
    ] = False,
) -> None:
    """List every setting and its value.

    Each with the value in force, without passwords; where that came from (environment, a file's
    name, argument or default); and what it means.
    """
    if markdown:
        print_markdown(reference())
        return
    with complaints():
        found = settings_for(url)
        listed = settings_in_force(found, names or ())
    if as_json:
        output.json({"settings": listed, "misspelt": found.near_misses})
        return
    print_settings(listed)
    for variable, meant in found.near_misses.items():
        output.note(f"{variable} is no setting and changes nothing. If {meant} is meant, rename it.")


app.command("rules")(list_rules)
app.command(context_settings=ANY_ARGUMENTS)(peek)
app.command(context_settings=ANY_ARGUMENTS)(reset)


@app.command()
def flush(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='As the requests name it; "" for TEI, which has no names.')
    ],
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", metavar="NAMESPACE", help="Default: EMBEDDING_CACHE_NAMESPACE."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write even if nothing is stored under that name.")] = False,
    app_name: App = None,
    url: UrlOption = None,
) -> None:
    """Make every stored vector of a model a miss.

    Writes one key: it holds in Redis now, and in every process within EMBEDDING_CACHE_L1_SECONDS.
    Redis takes the memory back as the vectors end. Where nothing is stored under that name, exits
    with 1. With --app wherever its middlewares keep vectors, in their namespaces.
    """
    with complaints():
        settings = settings_for(url)
        if app_name is None:
            refuse_memory(settings, vectors=True)
        loaded = None if app_name is None else load_app(app_name)

    async def work() -> tuple[bool, str]:
        if loaded is None:
            vectors = next(server.settings for server in servers_of(settings) if server.vectors)
            places = [(RedisManager(vectors), settings.EMBEDDING_CACHE_NAMESPACE, settings)]
        else:
            places = _places(limits_in(loaded).caches, settings if url is not None else None)
        flushed, within = False, ""
        for manager, its_namespace, its_settings in places:
            within = its_namespace if namespace is None else namespace
            async with talking_to(manager):
                await greet(manager)
                flushed |= await flush_model(
                    model, namespace=within, redis=manager, settings=its_settings, only_stored=not force
                )
        return flushed, within

    flushed, within = run(work())
    where = f" in namespace {within!r}" if within else ""
    if not flushed:
        output.error(
            f"nothing is stored under {model!r}{where or ' without a namespace'}. Name the model as the requests do, "
            "and its --namespace; --force writes anyway."
        )
        raise typer.Exit(FAILED)
    believed = settings.EMBEDDING_CACHE_L1_SECONDS if settings.EMBEDDING_CACHE_L1_BYTES else 0
    when = f"within {believed:g} s" if believed else "now"
    output.line(output.printable(f"Flushed {model!r}{where}: complete in every process {when}."))


def _places(caches: Sequence["CacheInForce"], instead: Settings | None) -> list[tuple[RedisManager, str, Settings]]:
    """The (servers, namespaces, key schemes) in which an app keeps vectors; *instead* = all are
    there.
    """
    if not caches:
        raise ConfigurationError("Nothing caches in this app: it has no EmbeddingCacheMiddleware. Leave out --app.")
    elsewhere = None if instead is None else RedisManager(instead)
    found = [(elsewhere or cache.manager, cache.namespace, cache.settings) for cache in caches]
    outside = [place for place in found if place[0].has_redis]
    if not outside:
        refuse_memory(found[0][0].settings)
    return outside


@app.command()
def memory(
    dims: Annotated[int | None, typer.Option("--dims", help="Numbers in a vector, such as 1536.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="How many vectors.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float16, float32 or float64. Default: EMBEDDING_CACHE_DTYPE.")
    ] = None,
    clients: Annotated[int | None, typer.Option("--clients", help="How many limited clients.")] = None,
    limits: Annotated[
        str | None, typer.Option("--limits", metavar="NOTATION", help="Of each. Default: the environment's.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", metavar="STRATEGY", help="Default: RATE_LIMIT_STRATEGY.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Compare with the maxmemory of Redis; 1 if it is less.")] = False,
    url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Estimate what vectors and clients take.

    In Redis, with keys and the tables they stand in; measured on Redis 7.0.
    """
    with complaints():
        settings = settings_for(url)
        if live:
            some_server(settings)
        if strategy is not None and strategy not in get_args(StrategyName):
            raise ConfigurationError(f"--strategy={strategy!r} is not one of {', '.join(get_args(StrategyName))}.")
        policies = known_policies(None, limits, cast("StrategyName | None", strategy), settings)
        sizings = estimate(settings, dims=dims, vectors=count, dtype=dtype, clients=clients, policies=tuple(policies))
    servers: list[Sizing] = sizings
    if live:

        async def work() -> list[Sizing]:
            found = []
            for server in servers_of(settings):
                async with opened(server.settings) as manager:
                    found += await compare(manager, server, sizings)
            return found

        servers = run(work())
    fits = all(sizing.fits is not False for sizing in servers)
    if as_json:
        output.json({"fits": fits if live else None, "parts": servers, "bytes": sum(s.bytes for s in servers)})
    else:
        print_sizes(servers, live=live)
    raise typer.Exit(0 if fits else FAILED)


@app.command()
def acl(
    user: Annotated[str, typer.Option("--user", metavar="NAME", help="The user to make.")],
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read its password from standard input; its SHA-256 goes in.")
    ] = False,
    url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Print the least rights that will do.

    As one ACL SETUSER line: for limits, vectors, health and metrics, on Redis 6.2 or later. An
    administrator runs it on every server, since primaries and replicas keep users of their own.
    """
    with complaints():
        settings = settings_for(url)
        some_server(settings)
        if not user or not user.isprintable() or any(c.isspace() or c in "\"'" for c in user):
            raise ConfigurationError(f"--user={user!r} is no name of a user: no blanks and no quotes. Try app.")
        password = read("-", "Password") if password_stdin else None
        if password == "":
            raise ConfigurationError("The password on standard input is empty.")
    lines = []
    for server in servers_of(settings):
        rights = rights_of(server.settings, limits=server.limits, vectors=server.vectors)
        lines.append((server.name, rights, rights.line(user, password)))
    if as_json:
        output.json(
            [{"server": s, "keys": rights.keys, "commands": rights.commands, "line": text} for s, rights, text in lines]
        )
        return
    for server_name, _, text in lines:
        if len(lines) > 1:
            output.note(f"For the server of {server_name}:")
        output.line(text)
    if settings.REDIS_CLUSTER or settings.REDIS_SENTINELS:
        output.note("Run it on every node: replicas too keep users of their own.")
    if password is None:
        output.note(f"Put the password's SHA-256 for {NO_PASSWORD[1:]}, or pass --password-stdin.")


@app.command()
def explain(
    event: Annotated[
        str | None,
        typer.Argument(
            metavar="EVENT",
            help="Such as redis_unavailable, of the log; or redis_timeout, of a health check. Default: all of them.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a line of the log means, and what to do.

    Needs no Redis and no settings.
    """
    found = explanations()
    if event is not None:
        one = explanation_of(event)
        if one is None:
            guesses = near(event)
            meant = f" Did you mean {', or '.join(guesses)}?" if guesses else ""
            output.error(f"{event[:80]!r} is no event of the log and no code of a health check.{meant}")
            raise typer.Exit(MISUSED)
        found = (one,)
    if as_json:
        output.json(found if event is None else found[0])
    else:
        print_explanations(found)


@app.command()
def persist(url: UrlOption = None) -> None:
    """Make Redis save snapshots.

    Says what that changed; on a cluster, on every node.
    """
    with complaints():
        settings = settings_for(url)
        refuse_memory(settings)

    async def work() -> None:
        async with opened(settings) as manager:
            await greet(manager)
            changes = await configure_persistence(manager)
        print_changes(changes)
        output.note("This lasts until Redis restarts; CONFIG REWRITE puts it into its configuration file.")
        if settings.REDIS_SENTINELS:
            output.note("Only the master was reached: do the same for each replica that may take over, with --url.")

    run(work())
