"""Whether a command may have keys of several clients,
and lands where they live: asked, not believed.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import ResponseError

from ..errors import is_crossslot
from ..keys import partition_key
from ..settings import Settings
from .findings import Finding
from .rights import Run
from .trouble import TROUBLE

_PARTITIONS = 8  # of two, both might be at home on the same of two shards
# It ends by itself where it cannot be taken away: a proxy may have put it where nothing looks.
_WRITE = """
for i = 1, #KEYS do
  redis.call('HSET', KEYS[i], 'check', '1')
  redis.call('PEXPIRE', KEYS[i], 2000)
end
return #KEYS
"""


async def batch_finding(run: Run, settings: Settings) -> Finding | None:
    """Write for several partitions by one command and look for each by one of its own; which mode
    that means.

    ``None`` when something else is wrong, which other findings say.
    """
    if settings.REDIS_CLUSTER:
        return Finding("batch", "ok", "a command for each partition, as a cluster wants")
    if settings.REDIS_BATCH == "key":
        return Finding("batch", "ok", "a command for each partition and each vector, as REDIS_BATCH=key says")
    names = [f"check-{secrets.token_hex(12)}" for _ in range(_PARTITIONS)]
    keys = [partition_key(settings.REDIS_KEY_PREFIX, name) for name in names]
    try:
        return await _try(run, keys)
    except ResponseError as error:
        if is_crossslot(error):
            text = "the server enforces slots: a command for each partition and each vector, once it has refused one"
            return Finding("batch", "ok", text)
        return None
    finally:
        for key in keys:
            with suppress(*TROUBLE):
                await run("UNLINK", key)


async def _try(run: Run, keys: Sequence[bytes]) -> Finding:
    await run("EVAL", _WRITE, len(keys), *keys)
    lost = 0
    for key in keys:
        lost += not await run("HGET", key, "check")
    if lost:
        text = f"{lost} of {len(keys)} counters of one command are not found again: a proxy goes by its first key"
        return Finding("batch", "fail", text, "Set REDIS_BATCH=key.")
    return Finding("batch", "ok", "one command for all that waits")
