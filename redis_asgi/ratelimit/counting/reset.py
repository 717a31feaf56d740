"""Resets in Redis: a partition's counters forgotten, or those of one rule."""

import re
from collections.abc import Sequence

from ...connection.manager import RedisManager
from ...errors import OddReply
from ..limits.policy import Partition, log_key


async def reset_in_redis(manager: RedisManager, partition: Partition, name: str | None) -> bool:
    """Forget the counters of *partition*, or those of the rule *name*; whether there were any.

    Raises:
        redis.exceptions.RedisError: When Redis does not take it.
    """
    key = partition.key
    client = await manager.get_connection()
    reply = await client.execute_command("HKEYS", key)
    if not isinstance(reply, list):
        raise OddReply(f"HKEYS was answered by {type(reply).__name__}")
    fields = [field if isinstance(field, bytes) else field.encode() for field in reply]
    chosen = fields if name is None else fields_of_rule(fields, name)
    if not chosen:
        return False
    # A log without its field is not read, and gone with the next charge: the order is safe.
    if name is None:
        gone = await client.execute_command("UNLINK", key)
    else:
        gone = await client.execute_command("HDEL", key, *chosen)
    logs = [log_key(key, field) for field in chosen if _is_log(field)]
    if logs:
        await client.execute_command("UNLINK", *logs)
    return bool(gone)


def fields_of_rule(fields: Sequence[bytes], name: str) -> list[bytes]:
    """The *fields* that hold a policy of the rule *name*."""
    belongs = re.compile(rb"%s(?:-\d+s)?:" % re.escape(name.encode()))
    return [field for field in fields if belongs.match(field)]


def _is_log(field: bytes) -> bool:
    return field.split(b":")[1][:1] in b"mc"
