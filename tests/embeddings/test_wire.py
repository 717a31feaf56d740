"""Wire formats by themselves: what they read in requests and answers."""

import base64
import textwrap
from typing import Any

import orjson
import pytest

from redis_asgi.embeddings.wire import WIRE_FORMATS, Answer, Batch, TokenArray
from redis_asgi.embeddings.wire.content import is_inline, names_media
from redis_asgi.embeddings.wire.format import read_inputs

from ..kit.embedding_apps import FORMATS, Spy


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


@pytest.mark.parametrize(
    ("indexes", "order"),
    [
        ([0, 1, 2], "abc"),
        ([2, 0, 1], "bca"),
        ([None, 1, 2], "abc"),
        ([None, None, None], "abc"),
        ([2, None, 0], "cba"),
        ([None, 0, 1], None),
        ([1, None, 2], None),
        ([1, 1, 2], None),
        ([0, 1, 3], None),
        ([0, 1, "2"], None),
        ([0, 1, True], None),
    ],
)
@pytest.mark.parametrize("absent", [True, False])
def test_a_missing_index_is_the_position(indexes: list[Any], order: str | None, absent: bool) -> None:
    """Unless another item has that index: then nobody knows which vector is whose."""
    batch = batch_of("openai", ("a", "b", "c"))
    data = [
        {"embedding": letter, **({} if index is None and absent else {"index": index})}
        for index, letter in zip(indexes, "abc", strict=True)
    ]
    answer = WIRE_FORMATS["openai"].read(batch, batch.inputs, {"data": data})
    assert (None if answer is None else next(iter(answer.values.values()))) == (None if order is None else [*order])


def test_token_arrays_are_of_one_kind_however_they_were_parsed() -> None:
    """Long ones are read by themselves, short ones with the rest of the body."""
    long = TokenArray.of([1, 2, 3])
    assert isinstance(long, TokenArray)
    for arrays in ([long, [4]], [[4], long]):
        read = read_inputs(arrays)
        assert read is not None
        assert {(b"t", b"[1,2,3]", 3), (b"t", b"[4]", 1)} == {(i.kind, i.canonical, i.tokens) for i in read[0]}
    assert (b"[1,2,3]", True) == ((one := read_inputs(long)) and one[0][0].canonical, one and one[1])
    assert read_inputs([long, "a"]) is None


def test_empty_lists_of_other_inputs_are_none() -> None:
    """Cohere's clients may send all three names; a list with something in it is no text."""
    fields = {"model": "m", "texts": ["a"], "images": [], "inputs": None}
    assert isinstance(WIRE_FORMATS["cohere"].split(fields, None), Batch)
    assert not isinstance(WIRE_FORMATS["cohere"].split({**fields, "inputs": [{}]}, None), Batch)


@pytest.mark.parametrize("items", [[], [True], [1, 0.5], [1, None], [1, "2"], [1, [2]]], ids=repr)
def test_other_lists_are_no_token_arrays(items: list[Any]) -> None:
    """All of its items are integers, and there are some."""
    assert not isinstance(TokenArray.of(items), TokenArray)
    assert read_inputs([items]) is None


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "tei"])
@pytest.mark.parametrize(
    ("fields", "path_model", "model"),
    [
        ({}, None, ""),
        ({"model": None}, None, ""),
        ({}, "ada", "ada"),
        ({"model": "m"}, "ada", "m"),
        ({"model": 5}, None, None),
        ({"model": 5}, "ada", None),
    ],
)
def test_a_missing_model_is_the_empty_one(
    name: str, fields: dict[str, Any], path_model: str | None, model: str | None
) -> None:
    """Many servers have only one; what is no text is not understood."""
    items = "a" if name == "ollama_prompt" else ["a"]
    batch = WIRE_FORMATS[name].split({FORMATS[name][1]: items, **fields}, path_model)
    assert model == (batch.model if isinstance(batch, Batch) else None)


IMAGES: dict[str, bytes] = {
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1",
    "JPEG of a camera": b"\xff\xd8\xff\xe1\x12\x34Exif\0\0",
    "JPEG without a header": b"\xff\xd8\xff\xdb\0\x43",
    "GIF": b"GIF89a\1\0\1\0",
    "WebP": b"RIFF\x24\0\0\0WEBPVP8 ",
    "BMP": b"BM\x3a\0\0\0\0\0\0\0\x36\0\0\0",
    "TIFF": b"II*\0\x08\0\0\0",
    "TIFF, big endian": b"MM\0*\0\0\0\x08",
    "AVIF": b"\0\0\0\x20ftypavif",
    "HEIC": b"\0\0\0\x18ftypheic",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
}


@pytest.mark.parametrize("name", IMAGES)
def test_base64_of_a_known_image_is_inline(name: str) -> None:
    """Also with lines, or in the alphabet of URLs;
    of the same bytes behind others, or cut short, it is not.
    """
    image = IMAGES[name] + bytes(range(256)) * 4
    text = base64.b64encode(image).decode()
    assert is_inline(text)
    assert is_inline(textwrap.fill(text, 20))
    assert is_inline(base64.urlsafe_b64encode(image).decode())
    assert not is_inline(base64.b64encode(b"x" + image).decode())
    assert not is_inline(text[:16])
    assert not is_inline(text + ".png")


PATH = "images/of/a/cat/on/a/mat/in/the/sun"
NAMES = ["", "cat", "images/cat", "/uploads/8c1f", f"/world/{PATH}", f"BM/{PATH}", "blob-42", "YWJj", "A" * 100, "é"]


@pytest.mark.parametrize("content", [*NAMES, "https://x/y.png", "file:///cat"])
def test_names_of_content_are_not_inline(content: str) -> None:
    """Paths and ids are of letters and slashes, as base64 is."""
    assert not is_inline(content)


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "DATA:,x"])
def test_a_data_url_is_inline(url: str) -> None:
    """Whatever is in it, it is there."""
    assert is_inline(url)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modality": "image"}, True),
        ({"modalities": ["text", "VIDEO"]}, True),
        ({"media_type": "audio/wav"}, True),
        ({"input_type": "image_url"}, True),
        ({"modality": "text", "input_type": "search_query"}, False),
        ({"modalities": [1, None], "modality": {"image": 1}}, False),
        ({"task": "image"}, False),
    ],
)
def test_a_body_may_say_that_its_strings_are_media(fields: dict[str, Any], named: bool) -> None:
    """By any of the names that servers have for it."""
    assert named == names_media(fields)
