"""Hand-written services: ``{"texts": [...]}`` -> ``{"embeddings": [[...], ...]}``, under a few
usual names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from ...errors import ConfigurationError
from ..records.vectors import Encoding
from .format import (
    Answer,
    Batch,
    FreshFields,
    Input,
    Uncacheable,
    Usage,
    array,
    count,
    held,
    members,
    model_of,
    read_inputs,
    read_model,
    recounted,
    refusal_of,
    shrink,
    vector_list,
    warns,
    without_warnings,
)

_INPUTS = ("texts", "inputs", "sentences", "input")
_VECTORS = ("embeddings", "vectors", "data")
_TOKENS = ("prompt_tokens", "total_tokens", "tokens", "num_tokens", "token_count")
_NUMBERED = ("texts", "inputs", "sentences", "embeddings", "vectors")
_COUNTS = frozenset({"count", "n", "total", "size", "length", "batch_size", *(f"num_{name}" for name in _NUMBERED)})
_LENGTHS = frozenset({"vector_size", "embedding_size"})  # and whatever has "dim" in its name
_MAX_DEPTH = 4  # of objects around the vectors


class Simple:
    """A list of texts in, a list of vectors out, with or without a model;
    other fields may stand around both.

    Of those around the vectors a hit repeats texts and flags, the length of a vector and an echo of
    the texts; it counts inputs and tokens anew, and leaves every other number and list out, as they
    may be about one request.

    Args:
        inputs: The field of the texts; ``None`` = ``texts``,
            ``inputs``, ``sentences`` or ``input``.
        vectors: The field of the vectors; ``None`` = ``embeddings``, ``vectors`` or ``data``.

    Raises:
        ConfigurationError: For a name that is no text.
    """

    def __init__(self, *, inputs: str | None = None, vectors: str | None = None) -> None:
        for argument, given in (("inputs", inputs), ("vectors", vectors)):
            if given is not None and not (isinstance(given, str) and given):
                raise ConfigurationError(f"Simple({argument}={given!r}) is not the name of a field. Try 'texts'.")
        # Other vectors of the same answers must not be found under the same keys.
        self.name = "simple" if inputs is vectors is None else f"simple:{inputs or ''}:{vectors or ''}"
        self._inputs = (inputs,) if inputs else _INPUTS
        self._vectors = (vectors,) if vectors else _VECTORS
        self._any_inputs = frozenset({*_INPUTS, *self._inputs})

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`; a body with two names of inputs is not understood."""
        refusal = refusal_of(fields)
        if refusal is not None:
            return refusal
        present = [name for name in fields if name in self._any_inputs and fields[name] is not None]
        if len(present) != 1 or present[0] not in self._inputs:
            return Uncacheable("not-understood")
        model, inputs = read_model(fields, path_model), read_inputs(fields[present[0]])
        if model is None or inputs is None or any(item.kind != b"s" for item in inputs[0]):
            return Uncacheable("not-understood")
        return Batch(model, *inputs, held(fields, present[0]), present[0])

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`; an answer with two names of vectors is not understood."""
        if not isinstance(document, dict):
            return None
        present = [name for name in self._vectors if name in document]
        values = vector_list(document.pop(present[0]), len(inputs)) if len(present) == 1 else None
        if values is None:
            return None
        usage = document.get("usage")
        counted = {**document, **usage} if isinstance(usage, dict) else document
        tokens = next((found for name in _TOKENS if (found := count(counted.get(name))) is not None), None)
        texts = [item.canonical.decode() for item in inputs]
        echoes = [name for name, value in document.items() if value == texts]
        frame = {"vectors": present[0], "fields": document, "echoes": echoes, "inputs": len(inputs)}
        return Answer({Encoding.FLOAT: values}, frame, tokens, model_of(document), not warns(document))

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        fields = dict(frame["fields"])
        if usage.tokens is not None:
            fields = _of_any_request(without_warnings(fields, usage), usage, frame["inputs"], len(batch.inputs))
        for name in frame["echoes"]:
            fields[name] = [orjson.Fragment(item.json) for item in batch.inputs]
        if fresh is not None:
            fields |= {name: fresh.unique for name in ("id", "request_id") if isinstance(fields.get(name), str)}
        before = (piece + b"," for piece in members(fields))
        return [b"{", *before, orjson.dumps(frame["vectors"]), b":", *array(vectors[Encoding.FLOAT]), b"}"]


def _of_any_request(fields: Mapping[str, Any], usage: Usage, was: int, now: int, depth: int = 1) -> dict[str, Any]:
    """The fields of an answer for *was* inputs that also hold for a request for *now* of them."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or isinstance(value, bool | str):
            kept[name] = value
        elif isinstance(value, dict):
            if name == "usage":
                kept[name] = recounted(value, _TOKENS, usage)
            elif depth < _MAX_DEPTH:
                kept[name] = _of_any_request(value, usage, was, now, depth + 1)
        elif isinstance(value, list):
            continue
        elif name in _TOKENS:
            kept[name] = usage.tokens
        elif name in _COUNTS:
            if value == was:
                kept[name] = now
        elif "dim" in name or name in _LENGTHS:
            kept[name] = value
    return kept
