"""`RateLimitMiddleware`: pure ASGI; guard, read the request, decide, wrap ``send``.

``http``/``websocket`` request → its rules become charges (partition and cost) → one decision for
all of them → refused here, or on to the app with the fields added to its response → what the
response changes is settled after it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, get_args

from starlette.types import ASGIApp, Receive, Scope, Send

from ..asgi.offer import OFFER, Offer
from ..asgi.scope import Addressing
from ..connection.lifespan import live
from ..connection.redis_argument import RedisArgument, resolve_manager
from ..event_loop import running_loop
from ..misuse import Uncalled, check_app, constructor_says_what_was_meant, only_called_as
from ..settings import HeaderStyle, OnRedisError, Settings, StrategyName
from .answers.dialects import AnswerStyle, plain_style
from .answers.headers import dialect_fields, fields_of, renderer_of
from .answers.limited_response import LimitedResponse, UncoveredResponse
from .answers.refusal_response import (
    OnExceeded,
    adding,
    answer_to,
    check_on_exceeded,
    refuse_identity,
    send_again,
    send_refusal,
)
from .answers.request_decision import STANDBY, RequestDecision, Undecided, decision_of, keep_decision, put_decision
from .answers.rewording import REWORDING, Rewording, rewording_in
from .counting.engine import Engine
from .counting.verdict import Verdict
from .limits.refusal_memory import Known
from .overview import Protection
from .pricing import Ahead
from .rules.checks import check_choice
from .rules.compiled import compile_rules
from .rules.coverage import Coverage, Covering
from .rules.exemptions import Exempt, Exemptions
from .rules.misconfiguration import Linter
from .rules.partition import MissingIdentity, PartitionBy
from .rules.plan import PlanCache, Plans, charges_kept
from .rules.routing import Routing
from .rules.rule import Limits, Rule
from .styles import Dialects, Styles, dialect_paths

_ADD = "A middleware is added as a class: write app.add_middleware(RateLimitMiddleware, limits='100/minute')."
_NO_DEPENDENCY = Uncalled(f"RateLimitMiddleware is no dependency. {_ADD} Or Depends(RateLimit('5/minute')).")


@constructor_says_what_was_meant("RateLimitMiddleware(app, '100/minute', rules=[Rule('5/minute', name='login')])")
class RateLimitMiddleware(Covering):
    """Refuses what is over quota, and tells every client how it stands.

    ``RateLimitMiddleware(app)`` alone is configured by the environment. Streaming, background
    tasks, WebSockets and messages it does not know pass through untouched.

    Args:
        app: The ASGI app to protect.
        limits: Notation such as ``"20/second; 1000/hour"``, or a callable that returns it for a
            request: the rule ``default``, for every path. *limits* and *rules* replace the
            environment's limits.
        rules: More rules. Every rule that matches applies, and all are decided together: the
            request is charged under each, or refused and charged under none.
        partition_by: Who shares a counter: `client_ip`, ``by_header(name)``, `by_user` or your own
            callable; ``None`` = ``RATE_LIMIT_PARTITION``.
        strategy: ``None`` = ``RATE_LIMIT_STRATEGY``.
        on_redis_error: When Redis does not answer: ``local``, ``open`` or ``closed``; ``None`` =
            ``RATE_LIMIT_ON_REDIS_ERROR``.
        exempt: Path patterns that are never counted, or a callable that says so; in addition to
            ``RATE_LIMIT_EXEMPT_PATHS`` and to the pages of the package's own sub-apps (health,
            metrics) in *app*.
        on_exceeded: Given the connection and the `Decision`,
            may return another response than the 429.
        headers: ``ietf``, ``legacy``, ``both`` or ``none``; ``None`` = ``RATE_LIMIT_HEADERS``.
        dialect: Adds the fields of ``openai`` or ``anthropic``, of the rules that are called
            ``requests`` and ``tokens``, and gives refusals the body that their clients, or for
            ``mcp`` those of MCP, understand. Or a mapping of path patterns to these, of which the
            first that covers a path counts. ``None`` = problem documents. WebSockets have none.
        redis: A ``RedisManager``, a URL or a ``redis.asyncio`` client;
            ``None`` = the shared default.
        settings: ``None`` = from the environment.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """

    def __init__(
        self,
        app: Annotated[ASGIApp, _NO_DEPENDENCY],
        limits: Limits | None = None,
        *,
        rules: Iterable[Rule] | None = None,
        partition_by: PartitionBy | None = None,
        strategy: StrategyName | None = None,
        on_redis_error: OnRedisError | None = None,
        exempt: Exempt | None = None,
        on_exceeded: OnExceeded | None = None,
        headers: HeaderStyle | None = None,
        dialect: Dialects | None = None,
        redis: RedisArgument = None,
        settings: Settings | None = None,
    ) -> None:
        check_app(app, "RateLimitMiddleware(app, '100/minute')")
        self.app = app
        self._manager, self._owned = resolve_manager(redis, settings)
        settings = settings if settings is not None else self._manager.settings
        self._addressing = Addressing(settings)
        compiled = compile_rules(
            limits,
            rules,
            settings,
            self._addressing,
            strategy=strategy,
            on_redis_error=on_redis_error,
            partition_by=partition_by,
        )
        if headers is not None:
            check_choice("headers", headers, get_args(HeaderStyle))
        headers = headers or settings.RATE_LIMIT_HEADERS
        self._style = plain_style(headers)
        self._offer = Offer(self._manager, addressing=self._addressing, style=self._style)
        self._dialects = dialect_paths(dialect)
        self._engine = Engine(self._manager, timeout=settings.RATE_LIMIT_TIMEOUT, settings=settings)
        self._counts = self._engine.counts
        if any(rule.on_redis_error == "closed" for rule in compiled):
            self._manager.fails_closed = True
        self._rules, self._routing = compiled, Routing(app)
        self._styles = Styles(self._dialects, self._routing, headers, settings.RATE_LIMIT_BODY_CAP)
        self._engine.plans = PlanCache(self._addressing, self._manager.per_process(charges_kept), renderer_of(headers))
        self._plans = Plans(compiled, self._routing, self._engine.plans)
        self._is_new = True  # has seen no request
        self._exemptions = Exemptions(self._routing, exempt, settings)
        if on_exceeded is not None:
            check_on_exceeded(on_exceeded)
        self._on_exceeded = on_exceeded
        self._linter = Linter(self._addressing, self._routing, self._rules)

    @only_called_as(_ADD)
    async def __call__(self, scope: Scope, receive: Annotated[Receive, _NO_DEPENDENCY], send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await (self._lifespan if kind == "lifespan" else self.app)(scope, receive, send)
            return
        outer: RequestDecision | None = None
        style = self._style
        # Before any callable of the user's: `client_ip` looks there.
        if OFFER in scope or self._dialects:
            outer = decision_of(scope)
            style, send = self._spoken(scope, send)
        else:
            scope[OFFER] = self._offer
        if (self._exemptions.any or self._linter.looks) and await self._is_exempt(scope):
            await self._pass(scope, receive, send)
            return

        verdict: Verdict | None = None
        try:
            plan = self._plans.of(scope)
            known = plan.known(scope)
            charges = known if known is not None else await plan.charges(scope)
            if charges.is_ready and outer is None:
                # Looked at once: a loop in another thread may put others there meanwhile.
                refusals: Known | None = charges.known
                if refusals is not None and kind == "http" and (said := self._engine.again(refusals, style)):
                    # Of a flood: as the request before was answered.
                    put_decision(scope, said.decision)
                    self._counts.request("refused", "refusal_memory", refusals.counters)
                    await send_again(said, scope, send)
                    return
                verdict = self._engine.ask(charges)
                if verdict.is_asked:
                    await verdict.future
            elif charges.counters or plan.behind is not None:
                ahead = Ahead(self._engine, outer, self._linter, scope, receive, send)
                try:
                    verdict = await ahead.decide(plan, charges)
                finally:
                    receive, send = ahead.receive, ahead.send
        except MissingIdentity as missing:
            self._counts.request("refused", "none")
            await refuse_identity(missing.what, style, scope, receive, send)
            return

        if outer is not None:
            await self._join(outer, verdict, style, scope, receive, send)
        elif verdict is None:  # no rule covers it
            await self._stand_by(style, scope, receive, send)
        elif verdict.allowed:
            response = LimitedResponse(keep_decision(scope, verdict), style, send)
            try:
                await self.app(scope, receive, response.send)
            except BaseException as error:
                response.failed(error)
                raise
            verdict.settle(response.status)
        else:
            await self._refuse(verdict, style, scope, receive, send)

    def in_force(self) -> Protection:
        """The limits in force, for those who ask from outside of a request."""
        return Protection(self._engine, self._rules, self._routing, self._exemptions, self._dialects)

    def coverage(self) -> Coverage:
        """Its rules, and what they leave alone; `document_limits` asks for it."""
        headers = self._style.headers
        return Coverage(self._rules, self._exemptions.paths, self._engine.settings, headers, self._dialects)

    def _spoken(self, scope: Scope, send: Send) -> tuple[AnswerStyle, Send]:
        """The style for a request, told to those below, and where its response goes.

        It is the outermost middleware's, or the outermost one's that has a dialect,
        so that all of an answer is in one.
        """
        offer = scope[OFFER] = self._offer.below(scope.get(OFFER))
        outermost: AnswerStyle = offer.style
        if outermost.dialect is not None:
            return outermost, send
        style = self._styles.of(scope) if self._dialects and scope["type"] == "http" else self._style
        if style.dialect is None:
            return style, send
        if style.headers != outermost.headers:
            style = replace(style, headers=outermost.headers)
        scope[OFFER] = offer.in_style(style)
        rewording = scope[REWORDING] = Rewording(style, send)
        return style, rewording.send

    async def _is_exempt(self, scope: Scope) -> bool:
        """Whether a request is left alone; the linter looks at those that are not."""
        exemptions = self._exemptions
        if self._is_new:
            running_loop()
            exemptions.look()
            self._is_new = False
        if exemptions.any and (exemptions.cover_path(scope) or (exemptions.asks and await exemptions.ask(scope))):
            return True
        if self._linter.looks:
            self._linter.look(scope)
        return False

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through that is exempt."""
        self._counts.request("exempt", "none")
        scope[STANDBY] = Undecided(self._engine, sees_end=False)
        await self.app(scope, receive, send)

    async def _stand_by(self, style: AnswerStyle, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through that no rule covers; a per-route limit may."""
        standby = scope[STANDBY] = Undecided(self._engine, sees_end=True)
        response = UncoveredResponse(standby, style, send)
        try:
            await self.app(scope, receive, response.send)
        except BaseException as error:
            response.end(error)
            raise
        response.end()

    async def _refuse(self, verdict: Verdict, style: AnswerStyle, scope: Scope, receive: Receive, send: Send) -> None:
        decision = keep_decision(scope, verdict)
        verdict.count()
        # What ``on_exceeded`` answers with may have limits of its own,
        # which are settled as those of any app are.
        response = None if self._on_exceeded is None else LimitedResponse(decision, style, send)
        try:
            known = verdict.known
            if response is not None:
                send = response.send
            elif known is not None and len(known) == 1 and scope["type"] == "http" and not style.names_request:
                await send_again(answer_to(known, decision, style), scope, send)
                return
            fields = fields_of(verdict, style)
            await send_refusal(verdict, fields, style, self._on_exceeded, scope, receive, send)
        finally:
            if response is not None:
                verdict.settle(response.status)
            verdict.is_over = True

    async def _join(
        self,
        outer: RequestDecision,
        verdict: Verdict | None,
        style: AnswerStyle,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer within an outer instance: it writes the fields of both, counts and settles."""
        if verdict is not None:  # else it has put the request to all there is
            outer.join(verdict)
            rewording = rewording_in(scope)
            if rewording is not None and send == rewording.send:  # that one has no dialect
                send = adding(dialect_fields(verdict.decision, style.dialect), send)
        if verdict is None or verdict.allowed:
            await self.app(scope, receive, send)
        else:
            await send_refusal(verdict, [], style, self._on_exceeded, scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the shared manager open while the app lives;
        the last app that ends in this loop closes it.
        """
        manager = self._manager if self._owned else None
        await live(self.app, manager, scope, receive, send, at_end=self._engine.until_ended)
