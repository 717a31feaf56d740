"""Wire formats by themselves: what they read in requests and answers."""

from typing import Any

import orjson
import pytest

from redis_asgi.embeddings.wire import WIRE_FORMATS, Answer, Batch

from .servers import FORMATS, Spy


def batch_of(name: str, items: Any = ("a", "b"), **fields: Any) -> Batch:
    """A request of one format."""
    given = items[0] if name == "ollama_prompt" and isinstance(items, tuple) else items
    body = orjson.dumps({"model": "asked", FORMATS[name][1]: given, **fields})
    batch = WIRE_FORMATS[name].split(orjson.loads(body), None)
    assert isinstance(batch, Batch), batch
    return batch


def answer_to(batch: Batch, name: str, more: dict[str, Any]) -> Answer | None:
    """What a format reads in its server's answer with *more* fields."""
    items = [item.canonical.decode() for item in batch.inputs]
    document = orjson.loads(orjson.dumps(FORMATS[name][2]({"model": "asked", **batch.fields}, items, Spy())))
    if isinstance(document, dict):
        document |= more
    return WIRE_FORMATS[name].read(batch, batch.inputs, document)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "tei"])
@pytest.mark.parametrize(("named", "model"), [("other", "other"), ("", ""), (None, ""), (5, "")])
def test_an_answer_names_its_own_model(name: str, named: Any, model: str) -> None:
    """Whatever was asked for; one that names none has the empty one."""
    answer = answer_to(batch_of(name), name, {"model": named})
    assert answer is not None
    assert model == answer.model


def test_tei_names_no_model() -> None:
    """Its answer is a bare list."""
    answer = answer_to(batch_of("tei"), "tei", {})
    assert answer is not None
    assert ("", True) == (answer.model, answer.repeatable)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "tei"])
@pytest.mark.parametrize(
    ("more", "repeatable"),
    [
        ({}, True),
        ({"meta": {"api_version": {"version": "2"}, "warnings": ["input 0 was truncated"]}}, False),
        ({"meta": {"warnings": []}}, True),
        ({"warnings": ["truncated"]}, False),
        ({"warning": "truncated"}, False),
        ({"warnings": None}, True),
        ({"meta": "x"}, True),
    ],
)
def test_what_an_answer_warns_of_is_not_to_be_repeated(name: str, more: dict[str, Any], repeatable: bool) -> None:
    """It is about this request's inputs, and its frame is for no other."""
    answer = answer_to(batch_of(name), name, more)
    assert answer is not None
    assert repeatable == answer.repeatable
