"""Random apps and histories for them, as hypothesis draws and shrinks them."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from ...kit.embedding_apps import FORMATS
from ...kit.proxy import Mode
from .asks import CREDENTIALS, Ask, Request
from .judge import Config
from .quirks import UNWELCOME, WELCOME, App, Quirks
from .world import Cut, Deploy, Down, Forget, Mend, Refuse, Retrain, Send, Step, Tick, Together

TEXTS = ["a", "bb", "c c", "a text that is rather long", "é"]
TOKENS = [[1], [1, 2], [3]]
WHO = ["alice", "bob", "carol", "mallory"]
CALLERS = [*WHO[:3], *WHO[:3], "mallory", ""]  # the fourth is known nowhere, the last says nothing
OWNERS = ["a", "b", "a", "b", ""]
WATCHED = ["", "origin", "user-agent", "x-forwarded-proto", "accept", "scheme"]
TENANTS = ["", "header:host", "header:x-tenant", "header:x-base-url", "header:openai-organization"]
TENANTS += ["field:adapter", "field:options.adapter", "header:accept-language", "query:"]
BESIDE = ["", "lora_path", "options.instructions", "overrides"]
FORWARDED = ["198.51.100.1", "198.51.100.2"]
# What changes nothing in an answer here, whatever it is to the cache.
HARMLESS = [("traceparent", "00-1"), ("traceparent", "00-2"), ("x-request-id", "7"), ("accept-encoding", "gzip")]
HARMLESS += [("user-agent", "curl"), ("origin", "https://a"), ("x-forwarded-proto", "https"), ("accept", "*/*")]
HARMLESS += [("cache-control", value) for value in ("no-cache", "no-store", "max-age=10", "only-if-cached")]
ANSWERED = ["accept-encoding", "origin", "x-tenant", "accept", "*"]


# One that no list knows is as good.
_KEY_HEADERS = st.lists(st.sampled_from([*CREDENTIALS, "x-unheard-of"]), min_size=1, max_size=2, unique=True).map(tuple)


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * (len(others) + 1) + list(others))


def _seldom(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    # Apart from few quirks an app is well, or nothing would ever be stored.
    return st.sampled_from([usual] * (8 * len(others)) + list(others))


@st.composite
def quirks(draw: st.DrawFn) -> Quirks:
    """An app with a few quirks."""
    headers = draw(
        _seldom(
            (),
            *[(("vary", name),) for name in ANSWERED],
            *[(("cache-control", value),) for value in ("no-store", "private", "max-age=60", "max-age=0")],
            (("set-cookie", "a=1"),),
        )
    )
    return Quirks(
        door=draw(st.sampled_from(["open", "key", "certificate", "address"])),
        key_headers=draw(_KEY_HEADERS),
        watched=draw(_seldom(*WATCHED)),
        tenant=draw(st.sampled_from(TENANTS)),
        private=draw(st.booleans()),
        beside=draw(_seldom(*BESIDE)),
        names_model=draw(st.booleans()),
        numbers=draw(_seldom("plain", "integers", "nested", "ragged", "null")),
        index=draw(_seldom("plain", "missing", "zero-missing", "shifted", "permuted", "zeros")),
        extra=draw(_seldom(False, True)),
        usage=draw(_seldom("plain", "none", "null", "cost", "floats")),
        status=draw(_seldom(200, 201, 202)),
        headers=headers,
        gzip=draw(_seldom("never", "asked", "always")),
        refuses=draw(_seldom("", "float", "base64")),
        ignores_base64=draw(_seldom(False, True)),
        warns=draw(_seldom(False, True)),
        most=draw(_seldom(100, 3)),
        keeps=draw(_seldom("", "scope", "state")),
    )


@st.composite
def doors(draw: st.DrawFn) -> Quirks:
    """An app that lets in whom it knows, and has no other quirks."""
    return Quirks(
        door=draw(st.sampled_from(["key", "key", "certificate", "address"])),
        key_headers=draw(_KEY_HEADERS),
        watched=draw(st.sampled_from(WATCHED)),
        tenant=draw(st.sampled_from(TENANTS)),
        private=draw(st.booleans()),
    )


def configs() -> st.SearchStrategy[Config]:
    """How the middleware may be set up."""
    return st.builds(
        Config,
        share=st.booleans(),
        partition=st.booleans(),
        lease=_mostly(300.0, 0.0, 30.0),
        local=st.booleans(),
        usage=_mostly("original", "billed"),
    )


@st.composite
def asks(draw: st.DrawFn, app: Quirks) -> Ask:
    """A request that touches what *app* looks at, from small pools, so that requests meet."""
    # What only one format has shows only there.
    special = app.beside or app.extra or {app.numbers, app.index, app.usage} != {"plain"}
    name = "openai" if special else draw(_mostly("openai", *FORMATS))
    path, field, _ = FORMATS[name]
    tokens = name in ("openai", "tei") and draw(_mostly(False, False, True))
    pool: list[Any] = TOKENS if tokens else [*TEXTS, "bad"] if draw(_mostly(False, True)) else TEXTS
    items: Any = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
    body: dict[str, Any] = {field: items[0] if name == "ollama_prompt" else items}
    if name != "tei":
        body["model"] = draw(_mostly("m", "m2"))
    if name.startswith("cohere"):
        body |= {"input_type": "search_query", "embedding_types": ["float"]}
    if name == "openai":
        body |= draw(st.sampled_from([{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]))
        if app.beside and draw(_mostly(True, False)):
            body |= _beside(app.beside, draw(st.lists(st.sampled_from("pq"), min_size=1, max_size=4)), len(items))
    body |= draw(_mostly({}, {"user": "u"}, {"user": "v"}))
    ask = Ask(body, (("x-tenant", "t"),) if draw(_mostly(True, False)) else (), path)  # for a partition by it
    ask = _for_tenant(app, ask, draw(st.sampled_from(OWNERS)))
    usual = CALLERS if app.door != "open" else ["", *CALLERS]
    ask = _from(app, ask, draw(st.sampled_from(app.key_headers)), draw(st.sampled_from(usual)))
    if draw(_seldom(False, True)):
        ask = with_header(ask, draw(st.sampled_from([*app.key_headers, "x-api-key"])), draw(st.sampled_from(WHO)))
    ask = _watched(app, ask, well=draw(st.booleans()))
    if draw(_seldom(False, True)):
        name, value = draw(st.sampled_from(HARMLESS))
        ask = ask if name == app.watched else with_header(ask, name, value)
    ask = with_header(ask, "x-forwarded-for", draw(_seldom("", *FORWARDED)))
    return replace(ask, address=draw(st.sampled_from(["192.0.2.1", "192.0.2.2"])))


def _beside(dotted: str, values: list[str], n: int) -> dict[str, Any]:
    listed = (values * 4)[:n]
    if dotted == "overrides":
        return {dotted: {str(at): value for at, value in enumerate(listed)}}
    first, _, second = dotted.partition(".")
    return {first: {second: listed}} if second else {first: listed}


def with_header(ask: Ask, name: str, value: str) -> Ask:
    """*ask* with another header, or (empty) without it."""
    kept = tuple(pair for pair in ask.headers if pair[0] != name)
    return replace(ask, headers=(*kept, (name, value)) if value else kept)


def with_field(ask: Ask, dotted: str, value: Any) -> Ask:
    """*ask* with another body field, or (empty) without it."""
    first, _, second = dotted.partition(".")
    body = {name: old for name, old in ask.body.items() if name != first}
    return replace(ask, body=body | ({first: {second: value} if second else value} if value else {}))


def _for_tenant(app: Quirks, ask: Ask, tenant: str) -> Ask:
    kind, _, name = app.tenant.partition(":")
    if kind == "header":
        return with_header(ask, name, tenant)
    if kind == "query":
        return replace(ask, query=tenant)
    return with_field(ask, name, tenant) if kind else ask


def _from(app: Quirks, ask: Ask, place: str, who: str) -> Ask:
    if app.door == "certificate":
        return replace(ask, certificate=who)
    return with_header(ask, place, f"Bearer {who}" if who and place == "authorization" else who)


def _watched(app: Quirks, ask: Ask, *, well: bool) -> Ask:
    if app.watched == "scheme":
        return replace(ask, scheme="https" if well else "http")
    return with_header(ask, app.watched, WELCOME if well else UNWELCOME) if app.watched else ask


@st.composite
def variants(draw: st.DrawFn, app: Quirks, pool: st.SearchStrategy[Ask]) -> Ask:
    """One of *pool*, with a thing or two changed: what differs in little finds most."""
    ask = draw(pool)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        ask = _changed(draw, app, ask, draw(pool))
    return ask


def _changed(draw: st.DrawFn, app: Quirks, ask: Ask, other: Ask) -> Ask:
    change = draw(st.sampled_from(["inputs", "tenant", "who", "caller", "caller", "watched", "address", "another"]))
    if change == "inputs":
        field = FORMATS[_format_of(ask)][1]
        items = ask.body[field]
        if not isinstance(items, list):
            return ask
        some = [items[::-1], items[:1], items[1:] or items, [*items, items[0]], [*items, draw(st.sampled_from(TEXTS))]]
        return with_field(ask, field, draw(st.sampled_from(some if isinstance(items[0], str) else some[:4])))
    if change in ("tenant", "caller"):
        ask = _for_tenant(app, ask, draw(st.sampled_from(OWNERS)))
    if change in ("who", "caller"):
        ask = _from(app, ask, draw(st.sampled_from(app.key_headers)), draw(st.sampled_from(CALLERS)))
    if change in ("tenant", "who", "caller"):
        return ask
    if change == "watched":
        return _watched(app, ask, well=draw(st.booleans()))
    if change == "address":
        ask = with_header(ask, "x-forwarded-for", draw(st.sampled_from(["", *FORWARDED])))
        return replace(ask, address=other.address)
    name, value = draw(st.sampled_from([*other.headers, *HARMLESS]))
    return with_header(ask, name, draw(st.sampled_from([value, ""])))


def _format_of(ask: Ask) -> str:
    return next(name for name, entry in FORMATS.items() if entry[0] == ask.path)


@st.composite
def histories(draw: st.DrawFn, app: Quirks, workers: int) -> list[Step]:
    """What happens, in order; requests are alike, so that they meet."""
    first = [draw(asks(app)) for _ in range(draw(st.sampled_from([1, 1, 2])))]
    pool = first + [draw(variants(app, st.sampled_from(first))) for _ in range(3)]
    ask = variants(app, st.sampled_from(pool))
    worker = st.integers(0, workers - 1)
    fates = st.sampled_from(["stays", "stays", "leaves", "cancelled"])
    request = st.builds(Send, ask, worker)
    rare: list[st.SearchStrategy[Step]] = [
        st.builds(Tick, st.sampled_from([0.0, 1.0, 4.0, 6.0, 29.0, 31.0, 280.0, 301.0])),
        st.builds(Refuse, st.sampled_from([*WHO, "192.0.2.1", "198.51.100.1"]), st.sampled_from([401, 403, 0, 0])),
        st.builds(Down, st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 500, 503, 429, -1])),
        st.builds(Together, st.lists(st.tuples(ask, fates), min_size=2, max_size=4).map(tuple), worker),
        st.sampled_from([Retrain(), Retrain(), Forget()]),
    ]
    if app.names_model:
        rare += [st.builds(Deploy)] * 4
    # Not a union of all: that would be one of their parts, each as often.
    kinds = [*["request"] * 12, *["other"] * 4, "revocation"] if app.door != "open" else ["request"] * 3 + ["other"]
    parts = {"request": request, "other": st.one_of(rare), "revocation": revocations(app, ask, workers)}
    step = st.sampled_from(kinds).flatmap(lambda kind: parts[kind])
    steps = draw(st.lists(step, min_size=16, max_size=60))
    return [one for some in steps for one in (some if isinstance(some, tuple) else (some,))]


@st.composite
def revocations(draw: st.DrawFn, app: Quirks, asks_: st.SearchStrategy[Ask], workers: int) -> tuple[Step, ...]:
    """Somebody whom the app has let in is let in no more,
    hears that of another request, and asks as before.
    """
    workers_ = st.integers(0, workers - 1)
    ask = _watched(app, with_header(draw(asks_), "cache-control", ""), well=True)
    for place in app.key_headers:
        ask = _from(app, ask, place, "" if app.door == "address" else "carol")
    who = App(app).who(Request(ask.scope(), ask.raw)) or "carol"
    other = draw(st.sampled_from([with_field(ask, "dimensions", 3), with_field(ask, "user", "w"), ask]))
    other = with_header(other, "cache-control", draw(st.sampled_from(["", "no-cache"])))
    here, there = draw(workers_), draw(workers_)
    return (
        Send(ask, here),
        Refuse(who, draw(st.sampled_from([401, 401, 403]))),
        Send(other, there),
        Tick(draw(st.sampled_from([0.0, 6.0]))),
        Send(ask, here),
        Refuse(who, 0),
        Send(ask, draw(workers_)),
    )


@st.composite
def cuts(draw: st.DrawFn, steps: list[Step], workers: int) -> list[Step]:
    """The same history, in which a worker's Redis is away for a while."""
    first, last = sorted(draw(st.tuples(st.integers(0, len(steps)), st.integers(0, len(steps)))))
    worker = draw(st.integers(0, workers - 1))
    modes: list[Mode] = ["refuse", "reset", "cut_replies"]
    mode = draw(st.sampled_from(modes))
    return [*steps[:first], Cut(worker, mode), *steps[first:last], Mend(worker), *steps[last:]]


@dataclass(frozen=True)
class Play:
    """A whole example; its text is Python and repeats it."""

    app: Quirks
    config: Config
    workers: int
    steps: list[Step]


@st.composite
def plays(
    draw: st.DrawFn, apps: st.SearchStrategy[Quirks], setups: st.SearchStrategy[Config], *, one_in: int = 8
) -> Play:
    """Everything at once; in *one_in* of so many a worker's Redis is away for a while."""
    app, config, workers = draw(apps), draw(setups), draw(st.integers(1, 2))
    if app.door == "open" and not app.watched and draw(_seldom(False, True)):
        config = replace(config, lease="off")
    steps = draw(histories(app, workers))
    if draw(st.integers(1, one_in)) == one_in:
        steps = draw(cuts(steps, workers))
    return Play(app, config, workers, steps)
