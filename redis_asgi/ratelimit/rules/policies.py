"""Policies of a rule, made of notation, each with a name of its own."""

import logging
import re
from functools import lru_cache

from ...errors import ConfigurationError
from ...events import say
from ...keys import digest
from ...settings import StrategyName
from ...settings.notation import parse_limits
from ..limits.policy import Partition, Policy, PolicySet
from .checks import check_concurrency

logger = logging.getLogger("redis_asgi.ratelimit")

LONGEST_NAME = 40
MOVING_WINDOW_MAX = 10_000


def fit_name(name: str, ending: str = "") -> str:
    """*name* and *ending* as a rule's name:
    letters that do not fit become ``_``, a long name is cut.

    What is cut or replaced stands in a digest behind it, so that different names stay different.
    """
    fitting = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
    room = LONGEST_NAME - len(ending)
    if fitting == name and len(name) <= room:
        return name + ending
    return f"{fitting[-(room - 9) :]}-{digest(name)[:8]}".replace("_-", "-").lstrip(".") + ending


@lru_cache(maxsize=4096)
def make_policies(
    name: str,
    notation: str,
    strategy: StrategyName,
    shadow: bool = False,
    *,
    least: int = 1,
    ending: str | None = None,
) -> PolicySet:
    """The policies of the rule *name*: of its name for one limit,
    ``name-<window>s`` each for several.

    Args:
        least: The smallest quota.
        ending: What stands behind the name of each instead,
            with ``{quota}`` and ``{window}`` filled in.

    Raises:
        ConfigurationError: For bad notation, or a moving window with a quota above 10,000.
    """
    limits = parse_limits(notation, least=least)
    policies = []
    for limit in limits:
        if strategy == "moving-window" and limit.quota > MOVING_WINDOW_MAX:
            raise ConfigurationError(
                f"limits={notation!r}: moving-window keeps one stamp per unit, so its quota is at most "
                f"{MOVING_WINDOW_MAX}. Try strategy='sliding-window-counter'."
            )
        if ending is not None:
            full = fit_name(name, ending.format(quota=limit.quota, window=limit.window))
        else:
            full = name if len(limits) == 1 else f"{name}-{limit.window}s"
        policies.append(Policy(full, limit.quota, limit.window, strategy, shadow))
    return PolicySet(tuple(policies))


@lru_cache(maxsize=4096)
def make_concurrency(name: str, quota: int, shadow: bool = False) -> PolicySet:
    """The one policy of the rule *name* that admits so many requests in flight."""
    return PolicySet((Policy(name, quota, 0, "concurrency", shadow),))


def warns_of_cost(rule: str, policies: PolicySet, cost: int) -> bool:
    """Whether *cost* is more than a quota of *policies* can ever admit,
    which is warned of; a quota of 0 means to.
    """
    quota = min((policy.quota for policy in policies if not policy.shadow), default=0)
    if not 0 < quota < cost:
        return False
    say(logger, "cost_never_fits", rule=rule, cost=cost, quota=quota)
    return True


def warns_of_small_quotas(policies: PolicySet) -> bool:
    """Whether one of *policies*, all of `sliding-window-counter`,
    has a quota below 10; each that has is warned of.
    """
    small = [policy for policy in policies if 0 < policy.quota < 10]
    for policy in small:
        wait = f"{policy.window * (1 + 1 / policy.quota):g}"
        say(logger, "small_sliding_quota", policy=policy.name, quota=policy.quota, wait=wait)
    return bool(small)


class ConcurrencyReader:
    """A reader of the number of requests that a rule's callable lets be in flight; see
    `LastLimits`.
    """

    def __init__(self, rule: str, shadow: bool) -> None:
        self._rule = rule
        self._shadow = shadow

    def read(self, said: object, _partition: Partition) -> PolicySet:
        """The policy that the callable's number stands for.

        Raises:
            ConfigurationError: If it is none: the callable is at fault, not the request.
        """
        try:
            return make_concurrency(self._rule, check_concurrency(said, least=0), self._shadow)
        except ValueError as error:
            text = (
                f"The rule {self._rule!r}, whose concurrency= is a callable: {error} Return one, or None for no limit."
            )
            raise ConfigurationError(text) from None
