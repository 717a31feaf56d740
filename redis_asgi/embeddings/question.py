"""What a request asks, once it is understood: each of its inputs under the key of its vector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.types import Scope

from .core import Core
from .head import Head
from .identity import Identity
from .pace import Pace
from .wire import Batch, Input, WireFormat

_NAMES_AT_ONCE = 64  # keys made between two looks at the clock


@dataclass(frozen=True, slots=True)
class Question:
    """One request's.

    Attributes:
        wire: The format it is in.
        batch: What it says.
        identity: Whose it is.
        slots: One key per input sent.
        inputs: Different inputs by key, in the order sent.
    """

    wire: WireFormat
    batch: Batch
    identity: Identity
    slots: Sequence[bytes]
    inputs: Mapping[bytes, Input]


async def question_of(
    core: Core, scope: Scope, head: Head, wire: WireFormat, batch: Batch, partition: str | None, pace: Pace
) -> Question:
    """Name the inputs of *batch*; raises whatever a user's wire format has put into it."""
    identity = core.identities.identify(scope, head.told, wire, batch, partition)
    slots: list[bytes] = []
    inputs: dict[bytes, Input] = {}
    for start in range(0, len(batch.inputs), _NAMES_AT_ONCE):
        items = batch.inputs[start : start + _NAMES_AT_ONCE]
        names = core.identities.input_names(identity, items)
        slots += names
        inputs.update(zip(names, items, strict=True))
        if pace.due:
            await pace.rest()
    return Question(wire, batch, identity, slots, inputs)


def say_broken(core: Core, wire: WireFormat, step: str, result: object) -> None:
    """A wire format may be the user's, and its mistake is no error of the app."""
    core.say_once("redis_asgi.embedding_wire_format_fails", wire_format=wire.name, step=step, got=type(result).__name__)
