"""Fields beside the inputs of a request: which of them are in the key,
and which belong to inputs one by one.

Names of fields in settings are dotted (``metadata.tags``), and name all that is below. Pure.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import orjson

from ..wire import Batch, TokenArray, Uncacheable

_MAX_DEPTH = 8  # of lists and objects; nothing deeper is looked at, so nothing deeper is cached
_MAX_VALUES = 64  # each is hashed at every request
_SMALL = 8 * 1024
_BEYOND_INTEGERS = 2.0**63
_OPEN = (dict, list, TokenArray)

# Names by their first part; ``None`` = this field, whatever is in it.
FieldTree = Mapping[str, "FieldTree | None"]
_NONE: FieldTree = {}
_CANONICAL = orjson.OPT_SORT_KEYS


def names_of(dotted: tuple[str, ...]) -> FieldTree:
    """*dotted* names of a setting, as a tree."""
    tree: dict[str, Any] = {}
    for name in dotted:
        *above, last = name.split(".")
        at: dict[str, Any] | None = tree
        for part in above:
            at = at.setdefault(part, {}) if at is not None else None
        if at is not None:
            at[last] = None
    return tree


def scope_of(batch: Batch, ignored: FieldTree) -> bytes:
    """Canonical JSON of all that may change a vector, except the inputs:
    every field that is not known better.
    """
    kept = _without(batch.fields, ignored)
    for name in (batch.input_field, *batch.represented):
        kept.pop(name, None)
    return orjson.dumps(kept, option=_CANONICAL)


def _without(fields: Mapping[str, Any], names: FieldTree) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        below = names.get(name, _NONE)
        if below is not None:
            kept[name] = _without(value, below) if below and type(value) is dict else value
    return kept


def values(batch: Batch, ignored: FieldTree) -> Iterator[tuple[str, object]]:
    """The texts and numbers of *batch* that are in its scope, in objects of objects, and where that
    is small the lists, each whole, by dotted name; the first 64.
    """
    return islice(_values(batch, ignored), _MAX_VALUES)


def _values(batch: Batch, ignored: FieldTree) -> Iterator[tuple[str, object]]:
    kinds = (str, int, float, list) if len(batch.scope) <= _SMALL else (str, int, float)
    level: list[tuple[str, Mapping[str, Any], FieldTree]] = [("", batch.fields, ignored)]
    own = {batch.input_field, *batch.represented}
    while level:
        below: list[tuple[str, Mapping[str, Any], FieldTree]] = []
        for above, fields, names in level:
            for name, value in fields.items():
                known = names.get(name, _NONE)
                if known is None or (not above and name in own):
                    continue
                if type(value) in kinds:
                    yield above + name, value
                elif type(value) is dict:
                    below.append((f"{above}{name}.", value, known))
        level = below


def refusal_beside(batch: Batch, request_lists: FieldTree) -> Uncacheable | None:
    """The reason why what stands beside the inputs makes a request uncacheable; ``None`` when it
    does not.

    A list as long as the inputs, or an object with as many members all named by numbers, may belong
    to them one by one; of *request_lists* it is known that they belong to the whole request, and a
    format knows its own. Also looked at: a number that may have lost digits, as an integer beyond
    64 bits is read as a float, and forwarded as one.
    """
    count = 0 if batch.bare else len(batch.inputs)
    own = batch.represented
    level: list[tuple[str, Any, FieldTree | None]] = [
        (name, value, None if name in own else request_lists.get(name, _NONE))
        for name, value in batch.fields.items()
        if type(value) in _OPEN or type(value) is float
    ]
    if not level:
        return None
    for _ in range(_MAX_DEPTH):
        below: list[tuple[str, Any, FieldTree | None]] = []
        for name, value, known in level:
            if type(value) is float:
                if abs(value) >= _BEYOND_INTEGERS:
                    return Uncacheable("not-understood")
                continue
            if known is not None and count > 1 and len(value) == count and _is_listed(value):
                return Uncacheable("item-lists", name)
            if type(value) is dict:
                below += [
                    (f"{name}.{key}", item, None if known is None else known.get(key, _NONE))
                    for key, item in value.items()
                    if type(item) in _OPEN or type(item) is float
                ]
            # A long list of texts or numbers in one step.
            elif not {*map(type, value)}.isdisjoint((*_OPEN, float)):
                below += [(name, item, known) for item in value if type(item) in _OPEN or type(item) is float]
        if not below:
            return None
        level = below
    deeper = any(type(value) in _OPEN or abs(value) >= _BEYOND_INTEGERS for _, value, _ in level)
    return Uncacheable("not-understood") if deeper else None


def _is_listed(value: list[Any] | dict[str, Any]) -> bool:
    return not isinstance(value, dict) or all(name.isdecimal() for name in value)
