"""The place of usage in each wire format: pure functions of what has been parsed.

============================  =========================================  ===================================
format                        whole answer                               stream
============================  =========================================  ===================================
OpenAI chat, completions      ``usage``                                  the same
OpenAI embeddings             ``usage``
OpenAI responses              ``usage``                                  ``response.usage`` of an ending event
Anthropic messages            ``usage``                                  ``message.usage``, then ``usage``
Cohere v2                     ``usage``; embeddings ``meta``             ``delta.usage`` of ``message-end``
Ollama                        ``prompt_eval_count``, ``eval_count``      the same of the line with ``done``
============================  =========================================  ===================================

Nothing is looked for elsewhere: texts, arguments of tools and echoed schemas are a client's or a
model's to write. What is made for each answer are named tuples, which take a fifth of the time that
frozen dataclasses do.
"""

from typing import NamedTuple

# Above it a JSON number is not exact in every reader.
MOST = 2**53
# Events of a stream that hold it one level down, and where.
_NESTED = {
    "message_start": "message",
    "message-end": "delta",
    "response.completed": "response",
    "response.failed": "response",
    "response.incomplete": "response",
}
_ANTHROPIC = frozenset(("message", "message_start", "message_delta"))


class Usage(NamedTuple):
    """The tokens of one answer in parts that do not overlap, whatever the format includes in which.

    Attributes:
        input: Tokens read that no cache had.
        cached: Tokens read from the provider's cache of prompts.
        cache_write: Tokens read and written to that cache.
        output: Tokens of the answer but for *reasoning*.
        reasoning: Tokens thought, and not shown.

    ``None`` where the answer did not say; an explicit 0 is 0.
    """

    input: int | None = None
    cached: int | None = None
    cache_write: int | None = None
    output: int | None = None
    reasoning: int | None = None


PARTS = Usage._fields


class Said(NamedTuple):
    """The usage in one document, in the format's own terms.

    Attributes:
        read: All tokens read, or, where those of the cache stand *beside*, the others.
        cached: Tokens read from a cache.
        cache_write: Tokens written to it.
        written: All tokens of the answer.
        reasoning: Those of them that were thought.
        beside: Whether *read* leaves *cached* and *cache_write* out, as Anthropic's does.
        is_final: Whether nothing of the answer's output can follow.
    """

    read: int | None = None
    cached: int | None = None
    cache_write: int | None = None
    written: int | None = None
    reasoning: int | None = None
    beside: bool = False
    is_final: bool = False

    def __bool__(self) -> bool:
        """Whether there is any number."""
        return not (self.read is self.cached is self.cache_write is self.written is self.reasoning is None)

    def then(self, later: "Said") -> "Said":
        """This, and what *later* says instead; numbers are replaced, never added."""
        return Said(
            _last(self.read, later.read),
            _last(self.cached, later.cached),
            _last(self.cache_write, later.cache_write),
            _last(self.written, later.written),
            _last(self.reasoning, later.reasoning),
            beside=self.beside or later.beside,
            is_final=later.is_final,
        )

    def usage(self) -> Usage | None:
        """Its disjoint parts; ``None`` if it has no number at all."""
        read, cached, cache_write, written, reasoning, beside, _ = self
        if not beside:
            # What is missing keeps its estimate, and that is of all that is read.
            if read is None:
                cached = cache_write = None
            elif cached or cache_write:
                read = _less(read, (cached or 0) + (cache_write or 0))
        if written is None:
            reasoning = None
        elif reasoning:
            written = _less(written, reasoning)
        usage = Usage(read, cached, cache_write, written, reasoning)
        return None if usage == _NOTHING else usage


_NOTHING = Usage()
_NO_MEMBERS: dict[str, object] = {}


def _last(before: int | None, now: int | None) -> int | None:
    return before if now is None else now


def _less(whole: int, inside: int) -> int:
    """*whole* without what is *inside* of it.

    Some servers count the parts beside the whole: so they do where those are more than it.
    """
    return whole - inside if inside <= whole else whole


def find_usage(document: object, *, streamed: bool) -> Said | None:
    """The usage in *document*, an answer or an event or line of one, at its format's place.

    Args:
        document: Whatever JSON made of it.
        streamed: Whether it is one of several.
    """
    if not isinstance(document, dict):
        return None
    kind = document.get("type")
    kind = kind if isinstance(kind, str) else ""
    holder: object = document
    if streamed and kind in _NESTED:
        holder = document.get(_NESTED[kind])
    usage = holder.get("usage") if isinstance(holder, dict) else None
    if isinstance(usage, dict):
        return _of_usage(usage, document, kind)
    if holder is not document:
        return None
    if "prompt_eval_count" in document or "eval_count" in document:
        return _of_ollama(document) if not streamed or document.get("done") is True else None
    billed = _member(_member(document, "meta"), "billed_units")
    if not streamed and billed:
        # Cohere's embeddings, which have no output.
        return Said(read=_whole(billed, "input_tokens"), written=_whole(billed, "output_tokens") or 0, is_final=True)
    return None


def _of_usage(usage: dict[str, object], document: dict[str, object], kind: str) -> Said:
    tokens = billed = _NO_MEMBERS
    if "tokens" in usage or "billed_units" in usage:
        tokens, billed = _member(usage, "tokens"), _member(usage, "billed_units")
    if tokens or billed:
        return Said(
            _last(_whole(billed, "input_tokens"), _whole(tokens, "input_tokens")),
            cached=_whole(usage, "cached_tokens"),
            written=_last(_whole(billed, "output_tokens"), _whole(tokens, "output_tokens")),
            is_final=True,
        )
    if "prompt_tokens" in usage or "completion_tokens" in usage:
        return _of_chat(usage, document)
    is_anthropic = kind in _ANTHROPIC or "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
    if is_anthropic:
        is_start = kind == "message_start"
        return Said(
            _whole(usage, "input_tokens"),
            _whole(usage, "cache_read_input_tokens"),
            _whole(usage, "cache_creation_input_tokens"),
            # At its start it says how many tokens there are so far.
            None if is_start else _whole(usage, "output_tokens"),
            beside=True,
            is_final=not is_start,
        )
    details = _member(usage, "input_tokens_details")
    return Said(
        _whole(usage, "input_tokens"),
        _whole(details, "cached_tokens"),
        _whole(details, "cache_write_tokens"),
        _whole(usage, "output_tokens"),
        _whole(_member(usage, "output_tokens_details"), "reasoning_tokens"),
        is_final=kind in _NESTED,
    )


def _of_chat(usage: dict[str, object], document: dict[str, object]) -> Said:
    read, written = _whole(usage, "prompt_tokens"), _whole(usage, "completion_tokens")
    cached = cache_write = reasoning = None
    if "prompt_tokens_details" in usage:
        details = _member(usage, "prompt_tokens_details")
        cached, cache_write = _whole(details, "cached_tokens"), _whole(details, "cache_write_tokens")
    if "completion_tokens_details" in usage:
        reasoning = _whole(_member(usage, "completion_tokens_details"), "reasoning_tokens")
    if written is None and read is not None and "completion_tokens" not in usage:
        # Embeddings have no output. Of a long answer only the end is there.
        is_all = read == _whole(usage, "total_tokens") or isinstance(document.get("data"), list)
        written = 0 if is_all else None
    return Said(read, cached, cache_write, written, reasoning)


def _of_ollama(document: dict[str, object]) -> Said:
    written = _whole(document, "eval_count")
    if "eval_count" not in document and "done" not in document:
        written = 0  # embeddings
    return Said(
        _whole(document, "prompt_eval_count"),
        _whole(document, "prompt_eval_cached_count"),
        written=written,
        is_final=True,
    )


def _member(holder: dict[str, object], name: str) -> dict[str, object]:
    """The object that *holder* has under *name*; empty if that is none."""
    member = holder.get(name)
    return member if isinstance(member, dict) else {}


def _whole(holder: dict[str, object], name: str) -> int | None:
    """The whole number from 0 to 2^53 that *holder* has under *name*,
    ``5.0`` included; ``None`` for all else.
    """
    number = holder.get(name)
    if type(number) is int:
        return number if 0 <= number <= MOST else None
    if type(number) is float and 0 <= number <= MOST and number.is_integer():
        return int(number)
    return None
