"""Results of the commands, laid out for people."""

from collections.abc import Iterable, Mapping, Sequence

from ..explanations import Explanation
from ..inspection.findings import Finding
from ..inspection.quotas import QuotaRow
from ..inspection.reference import Setting
from ..inspection.sizing import Sizing
from ..maintenance import Change
from ..ratelimit.overview import LimitInForce
from . import output

_WIDEST = 80  # of a value, where a list may be long


def print_findings(findings: Sequence[Finding]) -> None:
    """A line for each finding, and one below for what to do;
    the server's name where there are several.
    """
    servers = {finding.server for finding in findings if finding.server}
    named = len(servers) > 1
    width = max(len(finding.server) for finding in findings) + 2 if named else 0
    for finding in findings:
        where = finding.server.ljust(width)[:width]
        text = f"{finding.level.ljust(4)}  {where}{finding.check.ljust(11)}  {finding.text}"
        output.line(output.printable(text), "" if finding.level == "ok" else output.STYLES[finding.level])
        if finding.fix:
            output.line(f"      {'':{width}}{'':11}  -> {output.printable(finding.fix)}")


def print_explanations(explanations: Sequence[Explanation]) -> None:
    """A word with its level, and below it what it means and what to do."""
    for each in explanations:
        where = "health check" if each.where == "health" else each.where
        output.line(f"{each.word} ({where})", "bold")
        output.line(f"    {each.cause}")
        output.line(f"    -> {each.fix}")


def print_standings(label: str, standings: Sequence[QuotaRow]) -> None:
    """A client, and a line for each policy."""
    stored = any(standing.stored for standing in standings)
    output.line(output.printable(f"{label}{'' if stored else ': nothing is counted'}"), "bold")
    if standings:
        rows = [
            (
                standing.policy,
                standing.strategy,
                f"{standing.used:,}",
                "?" if standing.quota is None else f"{standing.quota:,}",
                f"{standing.window} s" if standing.window else "in flight",
                "?" if standing.remaining is None else f"{standing.remaining:,}",
                output.seconds(standing.retry_after),
                output.seconds(standing.reset),
            )
            for standing in standings
        ]
        output.table(("policy", "strategy", "used", "quota", "window", "left", "next", "full again"), rows)


def print_rules(limits: Sequence[LimitInForce]) -> None:
    """A line for each rule; which Redis counts it, where there are several,
    and its dialect, where some have one.
    """
    several = len({limit.manager for limit in limits}) > 1
    speaks = any(limit.dialects for limit in limits)
    head = ("rule", "limits", "by", "strategy", "cost", "methods", "paths", "without Redis")
    head += (*(("dialect",) if speaks else ()), "")
    rows = [
        (
            limit.name,
            limit.limits or "?",
            limit.by,
            limit.strategy,
            "?" if limit.cost is None else limit.cost,
            " ".join(limit.methods) if limit.methods else "all",
            " ".join(limit.paths) if limit.paths else "all",
            limit.on_redis_error,
            *((_dialects(limit.dialects),) if speaks else ()),
            ", ".join(filter(None, ("only watches" if limit.shadow else "", limit.manager.address if several else ""))),
        )
        for limit in limits
    ]
    output.table(head, rows)


def _dialects(dialects: Mapping[str, str]) -> str:
    return ", ".join(name if pattern == "*" else f"{pattern}: {name}" for pattern, name in dialects.items())


def print_sizes(sizings: Sequence[Sizing], *, live: bool) -> None:
    """A line for each kind of thing; with *live*, whether each server has the memory."""
    rows = [(s.what, f"{s.count:,}", f"{s.each:,} B", output.size(s.bytes)) for s in sizings]
    if len(rows) > 1:
        rows.append(("together", "", "", output.size(sum(sizing.bytes for sizing in sizings))))
    output.table(("what", "how many", "each", "in Redis"), rows)
    if not live:
        return
    for server in dict.fromkeys(sizing.server for sizing in sizings):
        of_server = [sizing for sizing in sizings if sizing.server == server]
        first, needed = of_server[0], sum(sizing.bytes for sizing in of_server)
        in_use = f"{output.size(first.used or 0)} are in use now"
        if not first.maxmemory:
            output.line(f"{server}: maxmemory is 0; {in_use}")
            continue
        verdict = "fits" if first.fits else "does not fit"
        # What is there already may be what was estimated, or another app's: only an operator knows.
        text = f"{server}: {output.size(needed)} {verdict} in maxmemory of {output.size(first.maxmemory)}; {in_use}"
        output.line(text, "" if first.fits else output.STYLES["fail"])


def print_changes(changes: Sequence[Change]) -> None:
    """Each parameter that was set, with what it was."""
    named = any(change.node for change in changes)
    rows = [
        (*((change.node,) if named else ()), change.name, _quoted(change.before), _quoted(change.after))
        for change in changes
    ]
    output.table((*(("node",) if named else ()), "parameter", "was", "is"), rows)


def _quoted(value: str | None) -> str:
    return "?" if value is None else f'"{value}"'


def print_settings(settings: Sequence[Setting]) -> None:
    """Two lines for each setting: what it is and why, and what it means."""
    for each in settings:
        default = "" if each.source == "default" else f", default {_brief(each.default)}"
        text = f"{each.name} = {_brief(each.value)}  ({each.source}{default})"
        output.line(output.printable(text), "" if each.source == "default" else "bold")
        output.line(output.printable(f"    {each.meaning}"), "dim")


def _brief(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _WIDEST else f"{value[:_WIDEST]}..."


def print_markdown(rows: Iterable[Sequence[str]]) -> None:
    """A table in Markdown; the first row is its head."""
    for i, row in enumerate(rows):
        output.line(f"| {' | '.join(row)} |")
        if i == 0:
            output.line("|" + "---|" * len(row))
