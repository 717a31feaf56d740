"""Writing an answer's body: vectors as JSON, in the order of the request, and a frame around them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...time_slice import TimeSlice
from ..records.codec import Value
from ..records.vectors import Encoding, text_of
from ..records.warnings import Warnings
from ..requests.question import Question
from ..storage.l1 import L1Cache
from ..wire import WIRE_FORMATS, FreshFields, Usage


async def rendered(
    local: L1Cache,
    warnings: Warnings,
    question: Question,
    values: Mapping[bytes, Value],
    frame: dict[str, Any],
    encodings: Sequence[Encoding],
    usage: Usage,
    fresh: FreshFields | None,
    time_slice: TimeSlice,
) -> list[bytes] | None:
    """The body in pieces, for the caller to take apart; ``None`` when the wire format fails.

    Args:
        local: Where the middleware's process keeps vectors, and how they are written.
        warnings: What the middleware has warned of.
        question: What is answered.
        values: A vector for each of its inputs, by key.
        frame: What an answer of the app had around its vectors.
        encodings: The representations of the answer.
        usage: What it reports.
        fresh: What it has as new; ``None`` = the frame is of the app's answer to this request.
        time_slice: Of the request.
    """
    wire = question.wire
    texts = await _texts(local, question, values, encodings, time_slice)
    pieces: object
    try:
        pieces = wire.render(question.batch, frame, texts, usage, fresh)
    except Exception as error:
        pieces = error
    # Looking at each piece is a thirtieth of a hit from the process, so ours are believed.
    ours = WIRE_FORMATS.get(wire.name) is wire
    if isinstance(pieces, list) and (ours or {*map(type, pieces)} == {bytes}):
        return list(pieces)
    warnings.wire_format_fails(wire.name, "render", pieces)
    return None


async def _texts(
    local: L1Cache,
    question: Question,
    values: Mapping[bytes, Value],
    encodings: Sequence[Encoding],
    time_slice: TimeSlice,
) -> dict[Encoding, list[bytes]]:
    keep = local.on or len(question.slots) > len(question.inputs)
    texts: dict[Encoding, list[bytes]] = {encoding: [] for encoding in encodings}
    for encoding, listed in texts.items():
        for name in question.slots:
            value = values[name]
            text = value.texts.get(encoding)
            if text is None:
                text = text_of(value, encoding, keep=keep)
                local.weigh(name, value)
                if time_slice.expired:
                    await time_slice.checkpoint()
            listed.append(text)
    return texts
