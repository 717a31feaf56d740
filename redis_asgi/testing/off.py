"""No limits, for tests of everything else."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..ratelimit.counting.engine import Engine
from ..ratelimit.counting.verdict import Verdict
from ..ratelimit.limits.charge import Charges, counters_of
from ..ratelimit.limits.reply import Numbers, reply_of
from .replaced import replaced


@contextmanager
def limits_off() -> Iterator[None]:
    """Admit every request, whatever limits apply to it; nothing is counted, and Redis is not asked.

    ``request.state.rate_limit`` and the header fields are there, as of a client that has its whole
    quota. A request without the identity that ``RATE_LIMIT_MISSING_IDENTITY=refuse`` asks for is
    still answered with 400.
    """
    with ExitStack() as off:
        off.enter_context(replaced(Engine, "ask", lambda _: _admit))
        off.enter_context(replaced(Engine, "remembered", lambda _: _nothing))
        off.enter_context(replaced(Engine, "again", lambda _: _nothing))
        off.enter_context(replaced(Engine, "settle", lambda _: _nothing))
        off.enter_context(replaced(Engine, "reset", _unasked))
        yield


def _admit(engine: Engine, charges: Charges, _mode: str = "consume") -> Verdict:
    numbers = [Numbers(1, policy.quota, 0, 0, 0) for _, policy in counters_of(charges)]
    verdict = Verdict(engine, charges)
    verdict.source, verdict.reply = "memory", reply_of(admitted=True, numbers=numbers)
    return verdict


def _nothing(*_args: Any) -> None:
    return None


def _unasked(_reset: Callable[..., Any]) -> Callable[..., Any]:
    async def reset(*_args: Any, **_options: Any) -> bool:
        return False

    return reset
