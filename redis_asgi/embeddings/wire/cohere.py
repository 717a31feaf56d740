"""Cohere's ``/v2/embed`` and ``/v1/embed``: parallel arrays, one per type, and the texts echoed."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

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

_REPRESENTED = frozenset({"embedding_types"})
_OTHER_INPUTS = ("images", "inputs")


class Cohere:
    """``{"model", "texts", "input_type", "embedding_types"}`` ->
    ``{"embeddings": {"float": [[...]]}}``.

    Args:
        name: Part of every key.
        typed: Whether embeddings come by type although none was asked for, as in version 2.
    """

    def __init__(self, name: str, *, typed: bool) -> None:
        self.name = name
        self._typed = typed

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`."""
        refusal = refusal_of(fields)
        if refusal is not None:
            return refusal
        kinds = fields.get("embedding_types")
        if kinds is not None and not (isinstance(kinds, list) and kinds and all(isinstance(k, str) for k in kinds)):
            return Uncacheable("not-understood")
        if kinds and not {*kinds} <= {*Encoding}:
            return Uncacheable("integers")
        texts = fields.get("texts")
        model, inputs = (
            read_model(fields, path_model),
            read_inputs(texts) if isinstance(texts, list) else None,
        )
        if model is None or inputs is None or any(fields.get(name) for name in _OTHER_INPUTS):
            return Uncacheable("not-understood")
        if any(item.kind != b"s" for item in inputs[0]):
            return Uncacheable("not-understood")
        encodings = tuple(Encoding(kind) for kind in dict.fromkeys(kinds or ("float",)))
        return Batch(model, *inputs, held(fields, "texts"), "texts", encodings, _REPRESENTED)

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`."""
        if not isinstance(document, dict):
            return None
        found = document.pop("embeddings", None)
        by_type = found if self._by_type(batch) else {Encoding.FLOAT.value: found}
        if not isinstance(by_type, dict):
            return None
        values: dict[Encoding, Sequence[object]] = {}
        for kind, vectors in by_type.items():
            if vectors is None:  # vLLM names the types that were not asked for, too
                continue
            listed = vector_list(vectors, len(inputs))
            if listed is None or kind not in batch.encodings:
                return None
            values[Encoding(kind)] = listed
        if set(values) != set(batch.encodings):
            return None
        echoed = document.get("texts")
        if echoed is not None and echoed != [item.canonical.decode() for item in inputs]:
            return None
        if echoed is not None:
            document["texts"] = []
        tokens = count(_billed(document).get("input_tokens"))
        return Answer(values, document, tokens, model_of(document), not warns(document))

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        fields = without_warnings(frame, usage)
        by_type = self._by_type(batch)
        if "response_type" in fields:
            fields["response_type"] = "embeddings_by_type" if by_type else "embeddings_floats"
        if fresh is not None and isinstance(fields.get("id"), str):
            fields["id"] = fresh.unique
        if isinstance(fields.get("meta"), dict):
            fields["meta"] = _meta(fields["meta"], usage)
        if fields.get("texts") is not None:
            fields["texts"] = [orjson.Fragment(item.json) for item in batch.inputs]
        pieces = [b"{", *(piece + b"," for piece in members(fields)), b'"embeddings":']
        if not by_type:
            return [*pieces, *array(vectors[Encoding.FLOAT]), b"}"]
        for number, (kind, texts) in enumerate(vectors.items()):
            pieces += (b"," if number else b"{", b'"%b":' % kind.value.encode(), *array(texts))
        return [*pieces, b"}}"]

    def _by_type(self, batch: Batch) -> bool:
        return self._typed or batch.fields.get("embedding_types") is not None


def _billed(document: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = document.get("meta")
    units = meta.get("billed_units") if isinstance(meta, dict) else None
    return units if isinstance(units, dict) else {}


def _meta(meta: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    changed = recounted(meta, (), usage)
    if "api_version" in meta:
        changed["api_version"] = meta["api_version"]
    units = meta.get("billed_units")
    if isinstance(units, dict):
        changed["billed_units"] = recounted(units, ("input_tokens",), usage)
    if usage.cached is not None:
        changed["cached_tokens"] = usage.cached
    return changed
