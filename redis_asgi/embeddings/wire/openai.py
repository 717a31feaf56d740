"""OpenAI's ``/v1/embeddings``; Azure, vLLM, infinity, llama-cpp-python,
LiteLLM, Jina and Voyage speak it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
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
    count,
    held,
    members,
    model_of,
    read_inputs,
    read_model,
    recounted,
    refusal_of,
    shrink,
    warns,
    without_warnings,
)

_REPRESENTED = frozenset({"encoding_format"})
_NATIVE = (None, "little", "native")
# What else an item may say; anything more may be about its own input,
# and another's hit would repeat it.
_OF_EVERY_ITEM = frozenset({"object", "encoding_format"})


class OpenAI:
    """``{"input", "model", ...}`` -> ``{"data": [{"index", "embedding"}], "usage"}``."""

    name = "openai"

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """See `WireFormat.split`."""
        refusal = refusal_of(fields) or _other_representation(fields)
        if refusal is not None:
            return refusal
        model, inputs = read_model(fields, path_model), read_inputs(fields.get("input"))
        if model is None or inputs is None:
            return Uncacheable("not-understood")
        encoding = Encoding(fields.get("encoding_format") or "float")
        return Batch(model, *inputs, held(fields, "input"), "input", (encoding,), _REPRESENTED)

    def shrink(self, batch: Batch, inputs: Sequence[Input]) -> bytes:
        """See `WireFormat.shrink`."""
        return shrink(batch, inputs)

    def read(self, batch: Batch, inputs: Sequence[Input], document: object) -> Answer | None:
        """See `WireFormat.read`; vectors are placed by their ``index``,
        by position only where none is given.
        """
        if not isinstance(document, dict):
            return None
        items = document.get("data")
        if not isinstance(items, list) or len(items) != len(inputs):
            return None
        values: list[object] = [None] * len(items)
        extra: dict[str, Any] | None = None
        for at, item in enumerate(items):
            if not isinstance(item, dict):
                return None
            index, value = item.pop("index", None), item.pop("embedding", None)
            # Gemini's leaves 0 out. Where that is not its place,
            # another has it: twice one index is no answer.
            index = at if index is None else index
            if type(index) is not int or not 0 <= index < len(items) or values[index] is not None:
                return None
            # One frame has to fit every item.
            if value is None or (extra is not None and item != extra) or not item.keys() <= _OF_EVERY_ITEM:
                return None
            values[index] = value
            extra = item
        fields = {name: value for name, value in document.items() if name != "data"}
        usage, tokens = document.get("usage"), None
        if isinstance(usage, dict):
            del fields["usage"]
            tokens = count(usage.get("prompt_tokens"))
            tokens = tokens if tokens is not None else count(usage.get("total_tokens"))
        # Which representation it is, the values themselves say:
        # some servers ignore encoding_format.
        encoding = Encoding.BASE64 if isinstance(values[0], str) and values[0][:1] != "\0" else Encoding.FLOAT
        frame = {"fields": fields, "usage": usage, "item": extra or {}}
        return Answer({encoding: values}, frame, tokens, model_of(document), not warns(document))

    def render(
        self,
        batch: Batch,
        frame: Mapping[str, Any],
        vectors: Mapping[Encoding, Sequence[bytes]],
        usage: Usage,
        fresh: FreshFields | None,
    ) -> list[bytes]:
        """See `WireFormat.render`."""
        fields = without_warnings(frame["fields"], usage)
        if fresh is not None:
            if "created" in fields:
                fields["created"] = fresh.created
            if isinstance(fields.get("id"), str):
                kind, dash, _ = fields["id"].partition("-")
                fields["id"] = f"{kind}-{fresh.unique}" if dash else fresh.unique
        [(encoding, texts)] = vectors.items()
        extra = frame["item"]
        if "encoding_format" in extra:
            extra = {**extra, "encoding_format": encoding.value}
        pieces = [b"{", *(piece + b"," for piece in members(fields)), b'"data":']
        pieces += _items(extra, texts)
        if isinstance(frame["usage"], dict):
            pieces += (b',"usage":', orjson.dumps(_usage(frame["usage"], usage)))
        pieces.append(b"}")
        return pieces


def _other_representation(fields: Mapping[str, Any]) -> Uncacheable | None:
    if fields.get("encoding_format") not in (None, *Encoding):
        return Uncacheable("encoding")
    if fields.get("output_dtype") not in (None, "float"):
        return Uncacheable("integers")
    # Jina's name for it, and vLLM's other number formats:
    # what they mean as base64 is not ours to guess.
    if fields.get("embedding_type") not in (None, "float") or fields.get("embed_dtype") not in (
        None,
        "float32",
    ):
        return Uncacheable("encoding")
    return None if fields.get("endianness") in _NATIVE else Uncacheable("encoding")


def _items(extra: Mapping[str, Any], texts: Sequence[bytes]) -> list[bytes]:
    # Pieces, so that no vector is copied before the answer is put together.
    pieces = [b"}]"] * (2 * len(texts) + 1)
    pieces[:-1:2] = _before_vectors(b"".join(piece + b"," for piece in members(extra)), len(texts))
    pieces[1::2] = texts
    return pieces


@lru_cache(maxsize=16)
def _before_vectors(extra: bytes, n: int) -> list[bytes]:
    pattern = b"},{" + extra.replace(b"%", b"%%") + b'"index":%d,"embedding":'
    return [b"[" + (pattern % 0)[2:], *(pattern % index for index in range(1, n))]


def _usage(said: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
    changed = recounted(said, ("prompt_tokens", "total_tokens"), usage)
    if usage.cached is not None:
        details = changed.get("prompt_tokens_details")
        changed["prompt_tokens_details"] = {
            **(details if isinstance(details, dict) else {}),
            "cached_tokens": usage.cached,
        }
    return changed
