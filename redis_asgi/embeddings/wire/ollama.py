"""Ollama's ``/api/embed`` and the older ``/api/embeddings``: one input, not normalised."""

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
    count,
    held,
    members,
    model_of,
    read_inputs,
    read_model,
    refusal_of,
    shrink,
    vector_list,
    warns,
    without_warnings,
)

_NOT_ZERO = frozenset("123456789")


def _split(fields: dict[str, Any], path_model: str | None, input_field: str) -> Batch | Uncacheable:
    refusal = refusal_of(fields)
    if refusal is not None:
        return refusal
    model, inputs = read_model(fields, path_model), read_inputs(fields.get(input_field))
    if model is None or inputs is None or _unloads(fields.get("keep_alive")):
        return Uncacheable("not-understood")
    if any(item.kind != b"s" for item in inputs[0]):
        return Uncacheable("not-understood")
    return Batch(model, *inputs, held(fields, input_field), input_field)


def _unloads(keep_alive: object) -> bool:
    """Whether no whole second or duration is left (``0``, ``0.5``, ``"0m"``):
    a client that asks for it means it.
    """
    if isinstance(keep_alive, str):
        return not set(keep_alive) & _NOT_ZERO
    return isinstance(keep_alive, int | float) and 0 <= keep_alive < 1


def _of_any_request(frame: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    """*frame* without what was measured of one request."""
    kept = without_warnings(frame, usage)
    if usage.tokens is not None:
        for name in [name for name in kept if name.endswith("_duration")]:
            del kept[name]
    return kept


class Ollama:
    """``{"model", "input", ...}`` -> ``{"model", "embeddings": [[...]], "prompt_eval_count"}``."""

    name = "ollama"

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`."""
        return _split(fields, path_model, "input")

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`."""
        values = vector_list(document.pop("embeddings", None), len(inputs)) if isinstance(document, dict) else None
        if values is None or not isinstance(document, dict):
            return None
        tokens = count(document.get("prompt_eval_count"))
        return Answer({Encoding.FLOAT: values}, document, tokens, model_of(document), not warns(document))

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        fields = _of_any_request(frame, usage)
        if usage.tokens is not None and count(fields.get("prompt_eval_count")) is not None:
            fields["prompt_eval_count"] = usage.tokens
        before = (piece + b"," for piece in members(fields))
        return [b"{", *before, b'"embeddings":', *array(vectors[Encoding.FLOAT]), b"}"]


class OllamaPrompt:
    """``{"model", "prompt", ...}`` -> ``{"embedding": [...]}``."""

    name = "ollama_prompt"

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`."""
        batch = _split(fields, path_model, "prompt")
        return batch if isinstance(batch, Uncacheable) or batch.bare else Uncacheable("not-understood")

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`."""
        value = document.pop("embedding", None) if isinstance(document, dict) else None
        if not value or not isinstance(document, dict):
            return None
        return Answer({Encoding.FLOAT: [value]}, document, None, model_of(document), not warns(document))

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        [text] = vectors[Encoding.FLOAT]
        before = (piece + b"," for piece in members(_of_any_request(frame, usage)))
        return [b"{", *before, b'"embedding":', text, b"}"]
