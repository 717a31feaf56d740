"""The words and numbers of the status page; all numbers are of this process, but those of Redis."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.resources import files
from urllib.parse import urlencode

from ...connection.pool_usage import PoolUsage
from ...explanations import explain
from ...telemetry import SAMPLE_SECONDS, Sample
from ..health import AppHealth, human_bytes
from . import charts
from .markup import Markup, joined, markup

REFRESH = 10  # seconds
_MINUTE = round(60 / SAMPLE_SECONDS)  # samples
_BUSIEST = 10

_NOTHING = "—"
_TITLES = {"healthy": "Healthy", "degraded": "Degraded", "unhealthy": "Unhealthy"}


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the page shows.

    Attributes:
        in_flight: Requests in flight under each concurrency limit.
        at: Unix seconds.
        process: The process's id.
        is_open: Whether anybody may read it.
        query: What the page was asked for with.
    """

    standing: AppHealth
    history: Sequence[Sample]
    pool: PoolUsage | None
    in_flight: Mapping[str, int]
    at: float
    process: int
    is_open: bool
    query: Sequence[tuple[str, str]] = ()

    @property
    def refreshes(self) -> bool:
        """Whether the page loads itself again."""
        return ("refresh", "off") not in self.query


def render(facts: Facts) -> Markup:
    """The page."""
    now = facts.standing
    return markup(
        _template(),
        title=_TITLES[now.status],
        status=now.status,
        again=markup('<meta http-equiv="refresh" content="{s}">', s=REFRESH) if facts.refreshes else Markup(),
        reason=_reason(now),
        open=_OPEN if facts.is_open else Markup(),
        figures=_figures(facts),
        decisions=_decisions(facts.history),
        cache=_cache(facts.history),
        policies=_policies(facts.history, facts.in_flight),
        redis=_redis(facts),
        process=facts.process,
        at=datetime.fromtimestamp(facts.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        toggle=_toggle(facts),
    )


@lru_cache(maxsize=1)
def _template() -> str:
    return (files(__package__) / "page.html").read_text("utf-8")


_OPEN = markup(
    '<p class="notice"><strong>This page is open to anybody who reaches it.</strong> '
    "Mount it with <code>status_app(authorize=…)</code> to say who may.</p>"
)


def _toggle(facts: Facts) -> Markup:
    kept = [(name, value) for name, value in facts.query if name != "refresh"]
    if facts.refreshes:
        url = "?" + urlencode([*kept, ("refresh", "off")])
        return markup('Reloads every {s} seconds. <a href="{url}">Pause</a>', s=REFRESH, url=url)
    return markup('Paused. <a href="{url}">Reload every {s} seconds</a>', s=REFRESH, url="?" + urlencode(kept))


def _reason(now: AppHealth) -> Markup:
    if now.error is None:
        return Markup()
    explained = explain(now.error)
    why = "Redis answers with an error." if explained is None else explained.cause
    then = "The app goes on without it." if now.status == "degraded" else "Requests that need it are refused."
    return markup('<p class="reason">{why} {then} <code>{code}</code></p>', why=why, then=then, code=now.error)


def _figures(facts: Facts) -> Markup:
    history = facts.history
    minute = history[-_MINUTE:]
    asked, refused = sum(map(_asked, history)), sum(sample.refused for sample in history)
    hits = sum(sample.hits for sample in history)
    looked_up = hits + sum(sample.misses for sample in history)
    latency = facts.standing.health.latency
    rate = sum(map(_asked, minute)) / (len(minute) * SAMPLE_SECONDS) if minute else 0.0
    return joined(
        [
            _figure("Requests now", _rate(rate), f"mean of the last minute; {asked:,} in ten"),
            _figure("Refused", _percent(refused, asked), f"{refused:,} of {asked:,}"),
            _figure("Cache hits", _percent(hits, looked_up), f"{hits:,} of {looked_up:,} inputs"),
            _figure(
                "Redis answers in",
                _NOTHING if latency is None else f"{latency * 1000:.{1 if latency >= 0.01 else 2}f} ms",
                "Counted in this process" if facts.standing.mode == "memory" else f"Breaker {_breaker(facts).lower()}",
            ),
        ]
    )


def _breaker(facts: Facts) -> str:
    return facts.standing.breaker.replace("_", " ").capitalize()


def _figure(name: str, value: str, note: str) -> Markup:
    return markup(
        '<div class="figure"><dt>{name}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>',
        name=name,
        value=value,
        note=note,
    )


def _asked(sample: Sample) -> int:
    """Requests that were decided in an interval."""
    return sample.allowed + sample.refused + sample.unavailable


def _decisions(history: Sequence[Sample]) -> Markup:
    totals = {
        "admitted": sum(sample.allowed for sample in history),
        "refused": sum(sample.refused for sample in history),
        "unavailable": sum(sample.unavailable for sample in history),
    }
    top = charts.nice_ceiling(max((_asked(sample) / sample.seconds for sample in history), default=0.0))
    series = [
        ("admitted", lambda sample: sample.allowed / sample.seconds),
        ("refused", lambda sample: sample.refused / sample.seconds),
        ("unavailable", lambda sample: sample.unavailable / sample.seconds),
    ]

    def words(sample: Sample) -> str:
        more = f", {sample.unavailable:,} unavailable" if sample.unavailable else ""
        return f"{sample.allowed:,} admitted, {sample.refused:,} refused{more} in {sample.seconds:g} s"

    summary = ", ".join(f"{count:,} {name}" for name, count in totals.items() if count or name == "admitted")
    shown = [name for name, count in totals.items() if count or name != "unavailable"]
    without_redis, exempt = sum(s.fallbacks for s in history), sum(s.exempt for s in history)
    return _chart(
        "Limiter decisions",
        joined(_key(name, f"{totals[name]:,} {name}") for name in shown),
        charts.chart(
            f"Limiter decisions of the last ten minutes: {summary}",
            charts.stacked(history, series, top),
            history,
            words,
        ),
        top=_rate(top),
        bottom="0",
        empty="" if any(totals.values()) else "No requests in the last ten minutes",
        note=f"{without_redis:,} decided without Redis, {exempt:,} exempt",
    )


def _cache(history: Sequence[Sample]) -> Markup:
    hits, misses = sum(sample.hits for sample in history), sum(sample.misses for sample in history)

    def share(sample: Sample) -> float | None:
        looked_up = sample.hits + sample.misses
        return sample.hits / looked_up if looked_up else None

    def words(sample: Sample) -> str:
        return f"{sample.hits:,} hits, {sample.misses:,} misses in {sample.seconds:g} s"

    return _chart(
        "Cache hit rate",
        _key("hit", f"{hits:,} hits, {misses:,} misses"),
        charts.chart(
            f"Cache hit rate of the last ten minutes: {hits:,} hits, {misses:,} misses",
            charts.line(history, "hit", share, 1.0),
            history,
            words,
        ),
        top="100 %",
        bottom="0 %",
        empty="" if hits + misses else "No inputs in the last ten minutes",
        note="Where the line is broken, nothing was looked up",
    )


def _key(name: str, text: str) -> Markup:
    return markup('<span class="key"><i class="swatch {name}"></i>{text}</span>', name=name, text=text)


def _chart(title: str, keys: Markup, drawing: Markup, *, top: str, bottom: str, empty: str, note: str) -> Markup:
    return markup(
        '<figure class="card"><figcaption><h2>{title}</h2><span class="keys">{keys}</span></figcaption>'
        '<div class="plot"><div class="y" aria-hidden="true"><span>{top}</span><span>{bottom}</span></div>'
        '<div class="canvas">{drawing}{empty}</div>'
        '<div class="x" aria-hidden="true"><span>10 min ago</span><span>5 min</span><span>now</span></div></div>'
        '<p class="note">{note}</p></figure>',
        title=title,
        keys=keys,
        drawing=drawing,
        top=top,
        bottom=bottom,
        empty=markup('<p class="empty">{text}</p>', text=empty) if empty else Markup(),
        note=note,
    )


def _policies(history: Sequence[Sample], in_flight: Mapping[str, int]) -> Markup:
    admitted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    shadowed: Counter[str] = Counter()
    for sample in history:
        for name, (yes, no, would) in sample.policies.items():
            admitted[name] += yes
            refused[name] += no + would
            shadowed[name] += would
    busiest = (admitted + refused).most_common(_BUSIEST)
    if not busiest:
        return markup('<p class="empty">No policy has been asked in the last ten minutes</p>')
    rows = joined(
        markup(
            '<tr><th scope="row">{name}{tag}</th><td>{admitted}</td><td>{refused}</td>'
            '<td class="share"><span>{bar}<span class="number">{percent}</span></span></td></tr>',
            name=_breakable(name),
            tag=_SHADOW if shadowed[name] else Markup(),
            admitted=f"{admitted[name]:,}",
            refused=f"{refused[name]:,}",
            bar=charts.bar(refused[name] / asked, "refused"),
            percent=_percent(refused[name], asked),
        )
        for name, asked in busiest
    )
    notes = ["Each policy counts what it decided: a request under two of them is in both rows"]
    notes += ["A shadow refuses nobody; counted is whom it would refuse"] if +shadowed else []
    left_out = len(admitted + refused) - len(busiest)
    notes += [f"{left_out} more with less to do"] if left_out else []
    now = ", ".join(f"{number:,} of {name}" for name, number in Counter(in_flight).most_common(_BUSIEST))
    notes += [f"In flight: {now}"] if now else []
    return markup(
        '<table><thead><tr><th scope="col">Policy</th><th scope="col">Admitted</th><th scope="col">Refused</th>'
        '<th scope="col">Refused of all</th></tr></thead><tbody>{rows}</tbody></table>{notes}',
        rows=rows,
        notes=joined(markup('<p class="note">{note}</p>', note=note) for note in notes),
    )


_SHADOW = markup(' <span class="tag">shadow</span>')


def _breakable(name: str) -> Markup:
    """*name*, with places where a narrow column may break it."""
    return joined(markup("{part}<wbr>", part=part) for part in re.split(r"(?<=[._-])", name))


def _redis(facts: Facts) -> Markup:
    now, health = facts.standing, facts.standing.health
    saved = None
    if health.saved_at is not None:
        saved = datetime.fromtimestamp(health.saved_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    rows: list[tuple[str, str | Markup | None]] = [("Deployment", now.mode.capitalize())]
    if now.mode == "memory":
        rows.append(("Counters", "In this process, each worker its own"))
    else:
        pool = facts.pool
        rows += [
            ("Breaker", _breaker(facts)),
            ("Clients", None if health.clients is None else f"{health.clients:,}"),
            ("Memory", None if health.memory is None else human_bytes(health.memory)),
            ("Last save", saved),
            ("PoolUsage of this process", None if pool is None else _pool(pool)),
        ]
    return markup(
        '<dl class="facts">{rows}</dl>',
        rows=joined(
            markup(
                "<div><dt>{name}</dt><dd>{value}</dd></div>",
                name=name,
                value=markup('<span class="unknown">not known</span>') if value is None else value,
            )
            for name, value in rows
        ),
    )


def _pool(pool: PoolUsage) -> Markup:
    if not pool.most:  # a cluster that has not been asked for its nodes yet
        return markup("No connection yet")
    most = f"of {pool.most:,}" if pool.most < 2**31 - 1 else "of any number"
    return markup(
        "{in_use} {most} in use, {idle} idle{bar}",
        bar=charts.bar(pool.in_use / pool.most, "admitted"),
        in_use=f"{pool.in_use:,}",
        idle=f"{pool.idle:,}",
        most=most,
    )


def _rate(per_second: float) -> str:
    if per_second >= 10 or per_second == int(per_second):
        return f"{per_second:,.0f}/s"
    return f"{per_second:.2g}/s"


def _percent(part: int, whole: int) -> str:
    """Of nothing there is no share; what is neither none nor all is not rounded to it."""
    if not whole:
        return _NOTHING
    share = 100 * part / whole
    if part and share < 0.1:
        return "< 0.1 %"
    if part < whole and share > 99.9:
        return "> 99.9 %"
    return f"{share:.0f} %" if 10 <= share < 99 or part in (0, whole) else f"{share:.1f} %"
