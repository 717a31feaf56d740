"""Reading the environment: the origin of each value,
the words about one that cannot work, and misspelt names.

pydantic-settings does the reading. Noted beside it is where each value came from, and which
variables are no settings but look like one; `FromEnvironment` is the class that does so, whatever
its fields are.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AliasChoices, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails
from pydantic_settings import BaseSettings, DotEnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import EnvSettingsSource

from ..errors import ConfigurationError
from ..misuse import Uncalled
from .locations import redact, redact_url

# The value of ``<NAME>_PORT``, which Kubernetes sets for every Service;
# its other variables look like none of ours.
_LINK = re.compile(r"\s*(tcp|udp|sctp)://")
# How alike two names are, and two words of them,
# of which one is a typo of the other or another form (``PROXY``).
_NEAR, _NEAR_WORD = 0.88, 0.66
ENVIRONMENT, ARGUMENT = "environment", "argument"


@dataclass(slots=True)
class Reading:
    """The values that one construction of settings read.

    Attributes:
        origins: Where each value came from that is no default: ``argument``,
            ``environment``, a file's name.
        prefix: What stands before the name of each variable.
        others: Names of variables that are no settings, in whatever was read.
        values: What was read, as it was read; only until it is validated.
        reads: Whether anything but arguments is read.
        again: Whether this is only to hear what else is wrong.
    """

    origins: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    others: frozenset[str] = frozenset()
    values: Mapping[str, Any] = field(default_factory=dict)
    reads: bool = True
    again: bool = False


_reading: ContextVar[Reading] = ContextVar("redis_asgi.reading")
# What `BaseSettings` itself takes, such as ``_env_file``.
_OPTIONS = frozenset(name for name in inspect.signature(BaseSettings.__init__).parameters if name[0] == "_")


_NO_DEPENDENCY = Uncalled(
    "FastAPI would ask each request for settings, so that clients choose them. Make them once, as in settings = "
    "Settings(), and write Depends(lambda: settings)."
)


class _Conflicts(ValueError):
    """Settings that contradict each other: a sentence for each contradiction."""


class _Noted(PydanticBaseSettingsSource):
    """A source of values that notes what it gave; blank is unset, and what is no field is nothing."""

    def __init__(self, source: PydanticBaseSettingsSource, origin: str) -> None:
        super().__init__(source.settings_cls)
        self._source = source
        self._origin = origin

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        reading = _reading.get()
        source = self._source
        if not reading.reads:
            return {}
        # Past what a file's source does more: to hand on whatever else is in the file.
        found = EnvSettingsSource.__call__(source) if isinstance(source, EnvSettingsSource) else source()
        found = {name: value for name, value in found.items() if not (isinstance(value, str) and not value.strip())}
        for name in found:
            reading.origins.setdefault(name, self._origin)
        if isinstance(source, EnvSettingsSource):
            reading.prefix = source.env_prefix
            names = {source.env_prefix + name for name in self.settings_cls.model_fields}
            if not source.case_sensitive:
                names = {name.lower() for name in names}
            reading.others |= {name for name, value in source.env_vars.items() if _may_be_ours(name, value, names)}
        return found


def _may_be_ours(name: str, value: str | None, names: set[str]) -> bool:
    return (
        name not in names
        and bool(value and value.strip())
        and not (name.upper().endswith("_PORT") and _LINK.match(value or ""))
    )


class FromEnvironment(BaseSettings):
    """The base of `Settings`: reads the environment, and says in words what cannot work."""

    model_config = SettingsConfigDict(
        frozen=True, case_sensitive=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )
    # Beside the fields: where a value came from makes no other settings of it.
    __slots__ = ("_reading",)

    def __init__(self, *args: Annotated[Any, _NO_DEPENDENCY], **values: Any) -> None:
        if args:
            # Not shown: it may be a URL with a password, or a mapping of such.
            name = type(self).__name__
            raise ConfigurationError(f"{name} takes values by name. Try {name}(REDIS_URL='redis://localhost:6379/0').")
        fields = type(self).model_fields
        known = {*fields, *_OPTIONS, *(alias for field in fields.values() for alias in _aliases(field))}
        problems = [unknown_name(name, fields) for name in values if name not in known]
        values = {name: value for name, value in values.items() if name in known}
        around = _reading.get(None) or Reading()
        origins = dict.fromkeys((name for name in values if name in fields), ARGUMENT)
        reading = Reading(origins, reads=around.reads, again=around.again)
        token = _reading.set(reading)
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems += _explain(type(self), error, reading)
        finally:
            _reading.reset(token)
        reading.values = {}
        if problems:
            # Outside of the block above: pydantic would chain the rejected input into the
            # traceback.
            near = near_misses(reading, fields)
            problems += [f"{name} is not a setting. Did you mean {meant}?" for name, meant in near.items()]
            raise ConfigurationError(*problems)
        object.__setattr__(self, "_reading", reading)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields and type(self).model_config.get("frozen"):
            # As pydantic does, which however shows the value.
            frozen: InitErrorDetails = {"type": "frozen_instance", "loc": (name,), "input": None}
            raise ValidationError.from_exception_data(type(self).__name__, [frozen], hide_input=True)
        super().__setattr__(name, value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings gives it by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            _Noted(env_settings, ENVIRONMENT),
            _Noted(dotenv_settings, _file_of(dotenv_settings)),
            _Noted(file_secret_settings, "secrets directory"),
        )

    @model_validator(mode="before")
    @classmethod
    def _note(cls, values: dict[str, Any]) -> dict[str, Any]:
        _reading.get().values = values
        return values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        conflicts = tuple(self.conflicts())
        if conflicts:
            raise _Conflicts(*conflicts)
        return self

    def conflicts(self) -> Iterator[str]:
        """The settings that cannot be true together, and which of them to change."""
        yield from ()

    @property
    def near_misses(self) -> dict[str, str]:
        """Variables that are no settings, by name, with the setting that each looks like."""
        return near_misses(self._read, type(self).model_fields)

    def origin_of(self, name: str) -> str:
        """The origin of a field's value: ``default``, ``argument``,
        ``environment``, or a file's name.
        """
        if name not in self.model_fields_set:
            return "default"
        # What was taken apart, or read by a source of a subclass, has no note of its own.
        return self._read.origins.get(name, ENVIRONMENT)

    def but(self, **changes: Any) -> Self:
        """The same settings with *changes*; reads no environment again,
        and checks again that all agree.

        Raises:
            ConfigurationError: As at construction.
        """
        fields = type(self).model_fields
        given = {next(_aliases(fields[name]), name): getattr(self, name) for name in self.model_fields_set}
        token = _reading.set(Reading(reads=False))
        try:
            made = type(self)(**{**given, **changes})
        finally:
            _reading.reset(token)
        origins = {**self._read.origins, **dict.fromkeys(changes, ARGUMENT)}
        object.__setattr__(made, "_reading", replace(self._read, origins=origins))
        return made

    @property
    def _read(self) -> Reading:
        # A copy that pydantic or pickle has made was read nowhere.
        return getattr(self, "_reading", None) or Reading()


def _aliases(field: FieldInfo) -> Iterator[str]:
    """The names that a field of a subclass has from outside instead of its own."""
    alias = field.validation_alias
    for each in alias.choices if isinstance(alias, AliasChoices) else (alias,):
        if isinstance(each, str):
            yield each


def note_origin(name: str, *, of: str) -> None:
    """Of settings that are being read, *name* has come out of what was read for *of*."""
    origins = _reading.get().origins
    if of in origins:
        origins.setdefault(name, origins[of])


def _file_of(source: PydanticBaseSettingsSource) -> str:
    files = source.env_file if isinstance(source, DotEnvSettingsSource) else None
    several = files if isinstance(files, Sequence) and not isinstance(files, str) else [files]
    return ", ".join(Path(file).name for file in several if file) or ".env"


def near_misses(reading: Reading, fields: Mapping[str, object]) -> dict[str, str]:
    """Of the variables that are no settings those that look like one,
    with the variable that each looks like.

    ``REDIS_*`` is other programs' family too:
    there a name counts only while what it may mean is unset.
    """
    known = tuple(reading.prefix + name for name in fields)
    found = {}
    for name in sorted(reading.others):
        meant = _meant(name, known)
        if meant is None:
            continue
        its_field = meant.removeprefix(reading.prefix)
        is_told = its_field in reading.origins or ("REDIS_URL" in reading.origins and its_field in _SAID_BY_URL)
        if name.upper() == meant.upper() or not (its_field.startswith("REDIS_") and is_told):
            found[name] = meant
    return found


_SAID_BY_URL = ("REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_USERNAME", "REDIS_PASSWORD", "REDIS_SSL")


@lru_cache(maxsize=1024)
def _meant(name: str, known: tuple[str, ...]) -> str | None:
    """The one of *known* that a variable's *name* may mean."""
    likely = {each.upper(): each for each in known if _word_by_word(name.upper(), each.upper())}
    near = difflib.get_close_matches(name.upper(), likely, n=1, cutoff=_NEAR)
    return likely[near[0]] if near else None


def _word_by_word(name: str, known: str) -> bool:
    """Whether *name* has the words of *known*, each as it is or misspelt:
    another word is another program's name.
    """
    if name.replace("_", "") == known.replace("_", ""):
        return True
    words, known_words = re.split("[_-]", name), known.split("_")
    return len(words) == len(known_words) and all(map(_is_near_word, words, known_words))


def _is_near_word(word: str, known: str) -> bool:
    same_start = word[:1] == known[:1]
    return same_start and difflib.SequenceMatcher(None, word, known).ratio() >= _NEAR_WORD


def unknown_name(name: str, fields: Mapping[str, object]) -> str:
    """The words about a name that is no setting, and the one that is meant."""
    near = difflib.get_close_matches(name.upper(), fields, n=1)
    hint = f"Did you mean {near[0]}?" if near else "`redis-asgi settings` lists every one."
    return f"{name} is not a setting. {hint}"


def _explain(model: type[FromEnvironment], error: ValidationError, reading: Reading) -> list[str]:
    """A line for each problem: variable, redacted value, what is wrong, a value that works."""
    problems: dict[str, str] = {}
    for each in error.errors(include_url=False):
        conflicts = each.get("ctx", {}).get("error")
        if isinstance(conflicts, _Conflicts):
            return [_with_prefix(sentence, model, reading) for sentence in conflicts.args]
        # A union's members each have something to say; the first does.
        name = str(each["loc"][0]) if each["loc"] else ""
        why = each["msg"].removeprefix("Value error, ")
        problems.setdefault(name, f"{why[:1].lower()}{why[1:]}")
    said = [_say(model, name, why, reading) for name, why in problems.items()]
    return said if reading.again else said + _other_conflicts(model, reading, problems)


def _say(model: type[FromEnvironment], name: str, why: str, reading: Reading) -> str:
    field = model.model_fields.get(name)
    if field is None:
        return f"{name}: {why}." if name else why
    origin = reading.origins.get(name, ENVIRONMENT)
    variable = name if origin == ARGUMENT else reading.prefix + name
    where = "" if origin in (ARGUMENT, ENVIRONMENT) else f" ({origin})"
    if name not in reading.values:
        return f"{variable}: {why}."
    value = reading.values[name]
    value = value.get_secret_value() if isinstance(value, SecretStr) else value
    if name.endswith("REDIS_URL"):
        shown = redact_url(str(value))
    else:
        shown = "'***'" if "SecretStr" in str(field.annotation) else redact(value)
    example = field.examples[0] if field.examples else field.default
    return f"{variable}={shown}{where}: {_with_prefix(why, model, reading).rstrip('.')}. Try {example}."


def _with_prefix(text: str, model: type[FromEnvironment], reading: Reading) -> str:
    """*text* with the names of settings as those of their variables."""
    if not reading.prefix:
        return text
    fields = model.model_fields
    return re.sub(
        r"\b[A-Z][A-Z_0-9]+\b",
        lambda m: reading.prefix + m[0] if m[0] in fields and reading.origins.get(m[0]) != ARGUMENT else m[0],
        text,
    )


def _other_conflicts(model: type[FromEnvironment], reading: Reading, bad: Mapping[str, str]) -> list[str]:
    """The contradictions of the settings that can work, beside those that cannot."""
    values = {name: value for name, value in reading.values.items() if name in model.model_fields and name not in bad}
    token = _reading.set(Reading(reads=False, again=True))
    try:
        model(**values)
    except ConfigurationError as error:
        return [_with_prefix(each, model, reading) for each in error.problems if not any(name in each for name in bad)]
    finally:
        _reading.reset(token)
    return []
