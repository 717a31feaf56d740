"""Every setting: what it may be and means,
as the documentation's table has it; and what it is now, and why.
"""

import math
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from ..errors import ConfigurationError
from ..settings import Settings
from ..settings.environment import unknown_name
from ..settings.locations import redact

_WORDS = {bool: "`true` or `false`", str: "text", int: "whole number", float: "number", SecretStr: "secret"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as it is in force.

    Attributes:
        name: Its variable, without a prefix.
        value: As one would write it into the environment; ``None`` for none; secrets are ``***``.
        default: The same of its default.
        source: ``default``, ``argument``, ``environment``, or the name of a file.
        type: What a value may be, in words.
        example: A value that works.
        meaning: What it is for.
    """

    name: str
    value: str | None
    default: str | None
    source: str
    type: str
    example: str
    meaning: str


def settings_in_force(settings: Settings, names: Collection[str] = ()) -> list[Setting]:
    """Every setting of *settings*, or those of *names* in any case,
    in the order of the documentation.

    Raises:
        ConfigurationError: For names of no setting.
    """
    fields = type(settings).model_fields
    wanted = {name.upper() for name in names}
    if not wanted <= fields.keys():
        raise ConfigurationError(*(unknown_name(name, fields) for name in names if name.upper() not in fields))
    return [
        Setting(
            name,
            _shown(name, getattr(settings, name)),
            _shown(name, field.default),
            settings.origin_of(name),
            type_in_words(field),
            example_of(field),
            field.description or "",
        )
        for name, field in fields.items()
        if not wanted or name in wanted
    ]


def reference() -> Iterator[tuple[str, str, str, str, str]]:
    """The rows of the documentation's table in Markdown: variable, type, default,
    example, meaning; first its head.
    """
    yield "variable", "type", "default", "example", "meaning"
    for name, field in Settings.model_fields.items():
        default, example = _shown(name, field.default), example_of(field)
        yield (
            f"`{name}`",
            type_in_words(field),
            "none" if default is None else f"`{default}`",
            example if example.startswith("(") else f"`{example}`",
            field.description or "",
        )


def example_of(field: FieldInfo) -> str:
    """A value that works."""
    return str(field.examples[0] if field.examples else field.default)


def _shown(name: str, value: object) -> str | None:
    if value is None or value in ("", ()):
        return None
    if isinstance(value, SecretStr):
        # Of a URL only the user and the password are secret;
        # where it leads is what one wants to see.
        return redact(value.get_secret_value())[1:-1] if name.endswith("REDIS_URL") else "***"
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.floor(value) == value:
        value = int(value)
    return str(value)


def type_in_words(field: FieldInfo) -> str:
    """The values that are possible, such as ``whole number, 1 to 65,535``."""
    members = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    kinds = [kind for kind in members or (field.annotation,) if kind is not type(None)]
    return ", or ".join(_word_for(kind, field.metadata) for kind in kinds)


def _word_for(kind: Any, metadata: list[Any]) -> str:
    """One of the types that a value may have."""
    # What a member of a union is annotated with is about that member alone.
    for about in getattr(kind, "__metadata__", ()):
        metadata = about.metadata if isinstance(about, FieldInfo) else metadata
    kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return _WORDS.get(kind, "list") + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    """The range of a number, such as ``, 1 to 65,535``."""
    least = next((f"{m.ge:,}" for m in metadata if isinstance(m, Ge)), None)
    above = next((f"{m.gt:,}" for m in metadata if isinstance(m, Gt)), None)
    most = next((f"{m.le:,}" for m in metadata if isinstance(m, Le)), None)
    if above is not None:
        return f", above {above}, {most} at most"
    if least is not None:
        return f", {least} to {most}" if most else f", {least} or more"
    return ""
