"""The commands about limits: what they are,
how a client stands to them, and giving it its quota back.
"""

from collections.abc import Sequence
from typing import Annotated, cast, get_args

import typer

from ..connection.manager import RedisManager
from ..errors import ConfigurationError
from ..inspection.apps import NOTHING_LIMITS, LimitedApp, limits_in, load_app
from ..inspection.quotas import QuotaRow, known_policies, look, partition_of
from ..inspection.quotas import reset as reset_quota
from ..ratelimit.limits.policy import Policy
from ..ratelimit.overview import LimitInForce
from ..ratelimit.rules.checks import check_method
from ..settings import Settings, StrategyName
from . import output
from .options import App, By, ClientArgument, Json, Name, UrlOption
from .session import alone, complaints, opened, read, refuse_memory, run, settings_for, talking_to
from .views import print_rules, print_standings

_SAY_LIMITS = ("RATE_LIMITS", "MAX_REQUESTS_PER_WINDOW", "RATE_LIMIT_WINDOW")


def list_rules(
    app_name: Annotated[
        str,
        typer.Option("--app", metavar="MODULE:ATTRIBUTE", help="Import this app: main:app, or main:make_app()."),
    ],
    path: Annotated[str | None, typer.Option("--path", metavar="PATH", help="Only what limits this path.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="METHOD", help="Only of such requests; WEBSOCKET for a handshake. Of a path: GET."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what limits an app, or a path of it.

    Rules of its middlewares and limits of its routes. Nothing is asked of Redis, and no request is
    made: what a callable says (limits, exempt, partitions of None) is not known.
    """
    with complaints():
        if path is not None and not path.startswith("/"):
            raise ConfigurationError(f"--path={path!r} does not begin with a slash. Try --path /{path}.")
        if method is not None:
            method = method.upper()
            check_method(method, label="--method")
        loaded = load_app(app_name)

    async def work() -> tuple[list[LimitInForce], bool]:
        app = _some_limits(loaded)
        if path is not None:
            return app.limits_of(method or "GET", path)
        return [limit for limit in app.limits if method is None or limit.may_cover(method)], False

    limits, is_exempt = run(work())
    if as_json:
        output.json({"rules": [_as_json(limit) for limit in limits], "exempt": is_exempt})
        return
    if limits:
        print_rules(limits)
    else:
        output.line(output.printable(f"Nothing limits {method or 'GET'} {path or '*'}."))
    if is_exempt:
        output.note("The path is exempt from a middleware's rules.")
    if any(limit.limits is None for limit in limits):
        output.note("Where the limits are ?, a callable says them for each request.")


def _as_json(limit: LimitInForce) -> dict[str, object]:
    shown = ("name", "limits", "by", "strategy", "cost", "paths", "methods", "shadow", "on_redis_error", "dialects")
    return {**{name: getattr(limit, name) for name in shown}, "redis": limit.manager.address}


def peek(
    context: typer.Context,
    client: ClientArgument,
    app_name: App = None,
    by: By = None,
    name: Name = None,
    limits: Annotated[
        str | None,
        typer.Option("--limits", metavar="NOTATION", help="The rule's limits, where they are in the app's code."),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", metavar="STRATEGY", help="The rule's. Default: RATE_LIMIT_STRATEGY.")
    ] = None,
    url: UrlOption = None,
    as_json: Json = False,
) -> None:
    """Show what a client has left, and until when.

    Charges nothing. Quotas are not in Redis: --app knows them all; else they are those of --limits,
    or of limits that are set in the environment, for the rule --name (default: default). Of other
    rules Redis tells what is used.
    """
    with complaints():
        alone(context)
        settings = settings_for(url)
        if strategy is not None and strategy not in get_args(StrategyName):
            raise ConfigurationError(f"--strategy={strategy!r} is not one of {', '.join(get_args(StrategyName))}.")
        if app_name is not None and (limits is not None or strategy is not None):
            raise ConfigurationError("--app knows limits and strategies: leave out --limits and --strategy.")
        if app_name is None:
            refuse_memory(settings)
        known = known_policies(name, limits, cast("StrategyName | None", strategy), settings)
        is_said = limits is not None or (
            name in (None, "default") and not settings.model_fields_set.isdisjoint(_SAY_LIMITS)
        )
        loaded = None if app_name is None else load_app(app_name)
        value = read(client, "CLIENT")

    seen: list[LimitInForce] = []
    kinds: set[str] = set()

    async def work() -> list[tuple[str, str, list[QuotaRow]]]:
        if loaded is None:
            partition = await partition_of(value, by, settings)
            async with opened(settings) as manager:
                standings = await look(manager, partition, tuple(known) if is_said else (), name=name)
            return [("", partition.label, standings)]
        found = []
        app = _some_limits(loaded)
        for manager, its in _by_manager(app, url, settings):
            partition = await partition_of(value, by, its[0].settings)
            seen.extend(its)
            kinds.add(partition.kind)
            policies = _policies(its, partition.kind, name)
            async with talking_to(manager):
                found.append((manager.address, partition.label, await look(manager, partition, policies, name=name)))
        if not any(standings for _, _, standings in found):
            _check_named(name, app)
        return found

    found = run(work())
    if as_json:
        # Of an app that counts in several places, one after the other.
        output.json({"client": found[0][1], "policies": [standing for _, _, each in found for standing in each]})
        return
    for where, label, standings in found:
        if len(found) > 1:
            output.note(f"In {where}:")
        print_standings(label, standings)
    everything = [standing for _, _, each in found for standing in each]
    if any(standing.quota is None for standing in everything):
        of_app = "it is no limit of the app any more, or a callable says it"
        fix = of_app if app_name is not None else "pass --app, or the rule's --name and --limits"
        output.note(f"Where the quota is ?, {fix}.")
    elif app_name is None and limits is None and everything:
        output.note("Quotas are the environment's: if the app's code has others, pass --app or --limits.")
    others = dict.fromkeys(limit.by for limit in seen if limit.by not in kinds)
    if others:
        output.note(f"Other rules count by {', '.join(others)}: see --by.")


def reset(
    context: typer.Context,
    client: ClientArgument,
    app_name: App = None,
    by: By = None,
    name: Name = None,
    url: UrlOption = None,
) -> None:
    """Give a client its full quota back.

    With --app wherever its rules count.
    Other processes may refuse it from memory for a second more.
    """
    with complaints():
        alone(context)
        settings = settings_for(url)
        if app_name is None:
            refuse_memory(settings)
        loaded = None if app_name is None else load_app(app_name)
        value = read(client, "CLIENT")

    async def work() -> tuple[str, bool]:
        if loaded is None:
            partition = await partition_of(value, by, settings)
            async with opened(settings) as manager:
                return partition.label, await reset_quota(manager, partition, name=name)
        found = []
        app = _some_limits(loaded)
        for manager, its in _by_manager(app, url, settings):
            partition = await partition_of(value, by, its[0].settings)
            # A route's limit has its quota in the names of its counters.
            names = {name} if name is None else {name, *(each.name for each in _policies(its, partition.kind, name))}
            async with talking_to(manager):
                found += [(partition.label, await reset_quota(manager, partition, name=each)) for each in names]
        was_counted = any(each for _, each in found)
        if not was_counted:
            _check_named(name, app)
        return found[0][0], was_counted

    label, found = run(work())
    output.line(output.printable(f"{label}: {'has its full quota again' if found else 'nothing was counted'}"))


def _some_limits(loaded: object) -> LimitedApp:
    """The limits of an app.

    Raises:
        ConfigurationError: When nothing does.
    """
    app = limits_in(loaded)
    if not app.limits:
        raise ConfigurationError(f"Nothing limits this app. {NOTHING_LIMITS}")
    return app


def _check_named(name: str | None, app: LimitedApp) -> None:
    """Refuse a *name* under which nothing is counted, nor ever will be.

    Raises:
        ConfigurationError: Says what the rules are called.
    """
    if name is not None and not any(limit.counts_as(name) for limit in app.limits):
        names = ", ".join(dict.fromkeys(limit.name for limit in app.limits))
        raise ConfigurationError(f"--name={name!r} is no rule of this app, which has {names}.")


def _by_manager(app: LimitedApp, url: str | None, settings: Settings) -> list[tuple[RedisManager, list[LimitInForce]]]:
    """The limits of an app by where they are counted,
    and how names are made there; with *url* all are there.

    Raises:
        ConfigurationError: For limits that are counted in the app's process.
    """
    groups: dict[tuple[RedisManager, Settings], list[LimitInForce]] = {}
    for limit in app.limits:
        groups.setdefault((limit.manager, limit.settings), []).append(limit)
    if url is not None:
        elsewhere = RedisManager(settings)
        return [(elsewhere, its) for its in groups.values()]
    outside = [(manager, its) for (manager, _), its in groups.items() if manager.has_redis]
    if not outside:
        refuse_memory(app.limits[0].settings)
        refuse_memory(app.limits[0].manager.settings)
    return outside


def _policies(limits: Sequence[LimitInForce], kind: str, name: str | None) -> list[Policy]:
    """The policies that clients of that kind are counted by, each once."""
    found: dict[bytes, Policy] = {}
    for limit in limits:
        if limit.by == kind:
            found |= {policy.field: policy for policy in limit.policies if name in (None, limit.name, policy.name)}
    return list(found.values())
