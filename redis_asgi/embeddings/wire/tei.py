"""Text Embeddings Inference's ``/embed``: a bare array of vectors, no model and no usage."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..records.vectors import Encoding
from .format import (
    Answer,
    Batch,
    FreshFields,
    Input,
    Uncacheable,
    Usage,
    array,
    held,
    read_inputs,
    refusal_of,
    shrink,
    vector_list,
)


class TEI:
    """``{"inputs", "normalize", ...}`` -> ``[[...], ...]``, also for one input."""

    name = "tei"

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`; a server has one model,
        so the path and the namespace stand for it.
        """
        refusal = refusal_of(fields)
        if refusal is not None:
            return refusal
        inputs = read_inputs(fields.get("inputs"))
        if inputs is None or any(item.kind == b"j" for item in inputs[0]):
            return Uncacheable("not-understood")
        return Batch(path_model or "", *inputs, held(fields, "inputs"), "inputs")

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`."""
        values = vector_list(document, len(inputs))
        return None if values is None else Answer({Encoding.FLOAT: values}, {})

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        return array(vectors[Encoding.FLOAT])
