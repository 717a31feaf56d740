"""From samples to what is printed: the table of apps, and the promises beside what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .apps import APPS

MANY = 32  # connections
TOLERATED = 0.25  # cores for other work
ENOUGH = 3  # rounds that nothing disturbed, to leave out the others
MEMORY_LIMIT = 200  # MB in Redis for a million limited clients


@dataclass(frozen=True, slots=True)
class Sample:
    """One app under load for a moment."""

    app: str
    connections: int
    rate: float  # requests per second
    p50: float  # ms
    p99: float  # ms
    errors: int  # of sockets
    server_cpu: float | None  # us per request
    redis_cpu: float  # us per request
    trips: float  # per request: how often Redis read from a socket
    scripts: float  # per request: EVALSHA and EVAL
    others: float | None = None  # cores that other work used meanwhile

    @property
    def disturbed(self) -> bool:
        """Whether other work took so much of the machine that the figures say little."""
        return self.others is not None and self.others > TOLERATED


class Results:
    """The samples of a run, by app and connections, in the order of the rounds."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def values(self, what: str, app: str, connections: int = MANY) -> list[float]:
        """The field *what* of an app's samples; empty when it is not known."""
        found = [getattr(sample, what) for (sample,) in self._rounds(connections, app)]
        return [value for value in found if value is not None]

    def ratios(self, what: str, app: str, base: str, connections: int = MANY) -> list[float]:
        """*app*'s value over *base*'s of the same round, for every round."""
        pairs = [[getattr(s, what) for s in pair] for pair in self._rounds(connections, app, base)]
        return [mine / theirs for mine, theirs in pairs if mine is not None and theirs]

    def others(self, connections: int, *apps: str) -> float | None:
        """The most cores that others used while the figures that count for *apps* were taken."""
        return max((_disturbance(taken) for taken in self._rounds(connections, *apps)), default=None)

    def _rounds(self, connections: int, *apps: str) -> list[tuple[Sample, ...]]:
        """The samples of *apps*, round by round: those that nothing disturbed,
        or the quietest when these are few.
        """
        of_app = [[s for s in self._samples if (s.app, s.connections) == (app, connections)] for app in apps]
        rounds = sorted(zip(*of_app, strict=False), key=_disturbance)
        quiet = [taken for taken in rounds if not any(s.disturbed for s in taken)]
        return quiet if len(quiet) >= ENOUGH else rounds[:ENOUGH]


def _disturbance(taken: Sequence[Sample]) -> float:
    return max(sample.others or 0.0 for sample in taken)


def table(results: Results, apps: Sequence[str]) -> list[str]:
    """One Markdown row per app; every figure is the median of the rounds."""
    head = ["app", "req/s", "x bare", "p50 ms", "p99 ms", "cpu us", "x cpu", "redis us", "trips"]
    head += ["1c req/s", "1c x bare", "1c p50 ms", "1c cpu us", "1c trips"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for app in apps:
        row = [APPS[app].title]
        for connections in (MANY, 1):
            values = (results, app, connections)
            cells = [_cell(*values, "rate", ".0f"), _show(results.ratios("rate", app, "bare", connections), ".3f")]
            cells.append(_cell(*values, "p50", ".2f"))
            if connections == MANY:
                x_cpu = _show(results.ratios("server_cpu", "bare", app, connections), ".3f")
                cells += [_cell(*values, "p99", ".2f"), _cell(*values, "server_cpu", ".1f"), x_cpu]
                cells += [_cell(*values, "redis_cpu", ".1f"), _cell(*values, "trips", ".3f")]
            else:
                cells += [_cell(*values, "server_cpu", ".1f"), _cell(*values, "trips", ".3f")]
            row += cells
        rows.append(row)
    return _aligned(rows)


def _cell(results: Results, app: str, connections: int, what: str, form: str) -> str:
    return _show(results.values(what, app, connections), form)


def _show(values: Sequence[float], form: str) -> str:
    return format(median(values), form) if values else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised, and what each round made of it."""

    text: str
    at_least: bool
    bound: float
    measured: Sequence[float]
    unit: str = ""
    others: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the median of the rounds keeps it;
        with a question mark when other work disturbed them.
        """
        if not self.measured:
            return "not measured"
        figure = median(self.measured)
        kept = figure >= self.bound if self.at_least else figure <= self.bound
        return ("ok" if kept else "MISSED") + ("?" if self.others is not None and self.others > TOLERATED else "")

    def row(self) -> list[str]:
        """The promise as a row of the printed table."""
        bound = f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}".strip()
        spread = f"{min(self.measured):.3f} .. {max(self.measured):.3f}" if len(self.measured) > 1 else ""
        others = "" if self.others is None else f"{max(self.others, 0.0):.2f}"
        return [self.text, bound, _show(self.measured, ".3f"), spread, others, self.verdict]


def promises(results: Results, bytes_per_client: float) -> list[Promise]:
    """Every promise about rate limiting, as far as the apps it needs were measured."""

    def ratio(
        text: str, at_least: bool, bound: float, what: str, app: str, base: str, connections: int = MANY
    ) -> Promise:
        measured = results.ratios(what, app, base, connections)
        return Promise(text, at_least, bound, measured, others=results.others(connections, app, base))

    def trips(text: str, bound: float, app: str) -> Promise:
        return Promise(text, False, bound, results.values("trips", app), others=results.others(MANY, app))

    def best_peer(text: str, app: str) -> Promise:
        peers = [
            ratio(f"{text}, against the best peer ({name})", True, 2.0, "rate", app, name)
            for name in ("limits.aio", "throttled-py")
        ]
        return min(peers, key=lambda p: median(p.measured) if p.measured else math.inf)

    return [
        ratio("allowed, against the bare app", True, 0.7, "rate", "redis_asgi", "bare"),
        ratio("the same by server CPU", True, 0.7, "server_cpu", "bare", "redis_asgi"),
        trips("Redis trips per allowed request", 0.1, "redis_asgi"),
        best_peer("allowed", "redis_asgi"),
        best_peer("a service's three rules", "service"),
        trips("Redis trips with them", 0.1, "service"),
        ratio("three limits, against one", True, 0.9, "rate", "three", "redis_asgi"),
        trips("Redis trips with three limits", 0.1, "three"),
        ratio("refused, against the bare app's 200", True, 1.1, "rate", "refused", "bare"),
        trips("Redis trips per refused request", 0.02, "refused"),
        ratio("one connection, against one EVALSHA each", True, 1.0, "rate", "redis_asgi", "evalsha", 1),
        ratio("p99, against the bare app's", False, 1.5, "p99", "redis_asgi", "bare"),
        ratio("Redis dead, against memory://", True, 0.9, "rate", "dead", "memory"),
        # Bytes for each are megabytes for a million.
        Promise("a million limited clients in Redis", False, MEMORY_LIMIT, [bytes_per_client], "MB"),
    ]


def promise_table(found: Sequence[Promise]) -> list[str]:
    """The promises as Markdown: bound, median and range over the rounds,
    cores that others used, verdict.
    """
    head = ["promise", "bound", "median", "min .. max", "others", "verdict"]
    return _aligned([head, ["---"] + ["---:"] * (len(head) - 1), *(promise.row() for promise in found)])
