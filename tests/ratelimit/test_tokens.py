"""What a request is taken to cost in tokens, and what it has cost once its answer has ended."""

import json
import math
import random
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redis_asgi.errors import ConfigurationError
from redis_asgi.ratelimit.budgets.estimates import Estimate, Outputs, asked_output, input_tokens
from redis_asgi.ratelimit.budgets.tokens import Tokens, tokens
from redis_asgi.ratelimit.budgets.usage import Usage, UsageReader

from .usages import JSON as JSON_TYPE
from .usages import answer_of, parts_of, read

PLAIN = tokens()
LARGE = 10**9


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tokens(weights={"prompt": 1}), "Try {'input': 1}"),
        (lambda: tokens(weights={"outptu": 2}), "Try {'output': 2}"),
        (lambda: tokens(weights={3: 1}), "none of input, cached, cache_write, output, reasoning"),  # type: ignore[dict-item]  # on purpose
        (lambda: tokens(weights={"input": -1}), "'input': -1"),
        (lambda: tokens(weights={"input": math.nan}), "not a finite number"),
        (lambda: tokens(weights={"input": math.inf}), "not a finite number"),
        (lambda: tokens(weights={"input": True}), "not a finite number"),
        (lambda: tokens(weights={"input": "1"}), "not a finite number"),  # type: ignore[dict-item]  # on purpose
        (lambda: tokens(weights={"input": 0, "output": 0.0}), "every token free"),
        (lambda: tokens(weights=[1]), "no mapping"),  # type: ignore[arg-type]  # on purpose
        (lambda: tokens(-1), "estimate=-1"),
        (lambda: tokens(True), "estimate=True"),
        (lambda: tokens(1.5), "estimate=1.5"),  # type: ignore[arg-type]  # on purpose
        (lambda: tokens(lambda: 5), "Try estimate=lambda request: 500"),  # type: ignore[arg-type]  # on purpose
        (lambda: tokens(weight={}), "Did you mean weights?"),  # type: ignore[call-arg]  # on purpose
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Tokens], said: str) -> None:
    """Where it is written, with what would work."""
    with pytest.raises(ConfigurationError) as error:
        make()
    assert said in str(error.value)


def test_weights_of_parts_that_have_none() -> None:
    """Thinking is output, and what a cache reads or writes is input."""
    made = tokens(weights={"output": 4, "input": 2, "cached": 0.1})
    assert {"input": 2, "cached": 0.1, "cache_write": 2, "output": 4, "reasoning": 4} == made.weights
    assert set(tokens(weights={}).weights.values()) == {1}
    assert tokens(weights={"input": 0, "output": 0, "cached": 1}).weights["cached"] == 1
    assert "_factors" not in repr(made)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"messages": [{"role": "user", "content": "x" * 40}]}, 11),
        ({"input": "é€😀"}, 9 / 4),
        ({"input": "\ud83d"}, 3 / 4),
        ({"input": [1, 2, 3]}, 3),
        ({"input": [[1, 2], [3]], "prompt": [4, True, 5.5, None]}, 4),
        ({"max_tokens": 100, "temperature": 0.5, "stream": True, "stop": None}, 0),
        ({"url": "data:image/png;base64," + "A" * 600_000}, 1000),
        ({"url": "DATA:;base64,A"}, 1000),
        ({"url": "data: the following are words"}, 29 / 4),
        ({"source": {"type": "base64", "media_type": "image/png", "data": "A" * 600_000}}, 1000 + 15 / 4),
        ({"input_audio": {"data": "A" * 600_000, "format": "wav"}}, 1000 + 3 / 4),
        ({"inline_data": {"mime_type": "a/b", "data": "data:a/b;base64,A"}}, 1000 + 3 / 4),
        ({"images": ["A" * 600_000, "B" * 9, {"url": "abcd"}, "https://a.b/c.png"]}, 2001 + 17 / 4),
        ({"data": "A" * 40, "images": "abcd"}, 11),
        ("x" * 8, 2),
        ([1, [2, [3, "abcd"]]], 4),
        (None, 0),
        (5, 0),
    ],
)
def test_what_is_read(document: object, expected: float) -> None:
    """Bytes of texts by four, tokens by one, media at a flat price;
    names of members are not the user's to write.
    """
    assert expected == input_tokens(document)


def test_depth_and_size_do_not_matter() -> None:
    """A body deeper than any stack is read, and a large one in its turn."""
    deep: Any = "abcd"
    for _ in range(200_000):
        deep = [deep]
    assert 1 == input_tokens(deep)
    while isinstance(deep, list):  # its own end would need a deep stack too
        deep = deep.pop()
    assert 100_000 == input_tokens({"input": [7] * 100_000})


def test_what_only_begins_as_a_medium_takes_no_room() -> None:
    """A text of a million parameters is a text."""
    text = "data:" + ";a" * 1_000_000
    tracemalloc.start()
    read = input_tokens({"content": text})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) / 4 == read
    assert peak < 100_000


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_tokens": 1, "max_completion_tokens": 10_000}, 10_000),
        ({"max_output_tokens": 7, "n": 3}, 21),
        ({"options": {"num_predict": 5}, "max_tokens": 4}, 5),
        ({"options": {"num_predict": -1}}, None),
        ({"options": [5]}, None),
        ({"max_tokens": 5.0, "n": 2.0}, 10),
        ({"n": 4}, None),
        ({}, None),
        ([], None),
        ("max_tokens", None),
        (None, None),
        ({"max_tokens": 10**30, "n": 10**30}, 2**53),
        *(
            ({"max_tokens": value, "max_output_tokens": 3, "n": value}, 3)
            for value in (0, -1, 1.5, "100", [100], {"a": 1}, True, None, math.inf, -math.inf, math.nan, -(10**30))
        ),
        (json.loads('{"max_tokens": 1e400}'), None),
    ],
)
def test_what_is_asked_for(document: object, expected: int | None) -> None:
    """The largest that is a whole number above 0, as often as ``n`` says;
    anything else is as if it were not there.
    """
    assert expected == asked_output(document)


def outputs_of(*numbers: int) -> Outputs:
    outputs = Outputs()
    for number in numbers:
        outputs.note(Usage(output=number))
    return outputs


@given(st.lists(st.integers(0, 50), max_size=300))
def test_likely_output_is_what_nine_of_ten_are_no_longer_than(numbers: list[int]) -> None:
    """Of the last 128, once there are 20."""
    last = sorted(numbers[-128:])
    expected = None
    if len(last) >= 20:
        expected = next(n for n in last if 10 * sum(each <= n for each in last) >= 9 * len(last))
    assert expected == outputs_of(*numbers).likely


def test_outputs_are_bounded_whoever_notes_them() -> None:
    """Loops in several threads may share one rule."""
    outputs = Outputs()

    def note_many(first: int) -> None:
        for number in range(first, first + 20_000):
            outputs.note(Usage(output=number))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(note_many, range(4)))
    finally:
        sys.setswitchinterval(interval)

    assert sorted(outputs._last) == outputs._sorted
    assert 128 == len(outputs._sorted)


def test_outputs_count_what_was_thought_and_leave_out_what_is_not_known() -> None:
    """An answer that does not say is no answer of length 0."""
    outputs = Outputs()
    for _ in range(20):
        outputs.note(Usage(output=5, reasoning=7))
        outputs.note(Usage(input=5))
    assert 12 == outputs.likely
    assert 23 == outputs_of(*range(1, 26)).likely


@pytest.mark.parametrize(
    ("document", "outputs", "quota", "expected"),
    [
        ({"m": "x" * 400}, None, LARGE, 1100),
        ({"m": "x" * 401}, None, LARGE, 1101),
        ({"m": "x" * 400, "max_tokens": 50}, None, LARGE, 150),
        ({"m": "x" * 400, "max_tokens": 8000}, outputs_of(*[500] * 20), LARGE, 600),
        ({"m": "x" * 400, "max_tokens": 8000}, outputs_of(*[500] * 19), LARGE, 8100),
        ({"m": "x" * 400, "max_tokens": 50}, outputs_of(*[500] * 20), LARGE, 150),
        ({"m": "x" * 400}, outputs_of(*[500] * 20), LARGE, 600),
        ({"m": "x" * 400, "max_tokens": 10**9}, None, 1000, 350),
        ({"m": "x" * 40_000, "max_tokens": 10**9}, None, 1000, 1000),
        ({"m": "x"}, None, 10, 3),  # 0.25 and 2.5
        ({}, outputs_of(*[0] * 20), 1000, 1),
        ({}, None, 1, 1),
        ({}, None, 0, 1),
    ],
)
def test_estimate(document: object, outputs: Outputs | None, quota: int, expected: int) -> None:
    """What is read and what may be written,
    the latter a quarter of the quota at most; from 1 to the quota.
    """
    assert expected == PLAIN.estimated(document, quota=quota, outputs=outputs).cost


@pytest.mark.parametrize(
    ("length", "quota", "expected"),
    [(400, LARGE, 100), (401, LARGE, 101), (10**9, 1000, 250), (0, 1000, 1), (None, 1000, 250), (-5, 1000, 250)],
)
def test_estimate_of_what_cannot_be_read(length: int | None, quota: int, expected: int) -> None:
    """By its length, a quarter of the quota at most,
    which it is as well where nobody says the length.
    """
    assert expected == PLAIN.estimated_unread(length, quota=quota).cost


@pytest.mark.parametrize(("units", "quota", "expected"), [(5, 100, 5), (0, 100, 1), (500, 100, 100), (10**40, 9, 9)])
def test_estimate_of_the_app_itself(units: int, quota: int, expected: int) -> None:
    """It is in units, as the app says, and what is missing of the usage keeps its part of it."""
    own = PLAIN.estimated_as(units, {"m": "x" * 8}, quota=quota)
    assert expected == own.cost
    assert min(2, units) + 7 == PLAIN.cost_of(Usage(output=7), own)


def test_weights_bear_on_estimates() -> None:
    """Each part by its own, and the quarter is one of units."""
    made = tokens(weights={"output": 4, "input": 0.5})
    assert 50 + 400 == made.estimated({"m": "x" * 400, "max_tokens": 100}, quota=LARGE).cost
    assert 50 + 250 == made.estimated({"m": "x" * 400, "max_tokens": 100}, quota=1000).cost
    assert 50 == made.estimated_unread(400, quota=LARGE).cost


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(10, 20, 30, 40, 50), 10 + 2 + 30 + 160 + 200),
        (Usage(0, 0, 0, 0, 0), 0),
        (Usage(cached=70, input=0, output=0), 7),  # a tenth is exact
        (Usage(cached=71, input=0, output=0), 8),
        (Usage(input=10), 10 + 400),
        (Usage(output=10), 100 + 40),
        (Usage(reasoning=10), 100 + 400 + 40),
        (Usage(2**53, 2**53, 2**53, 2**53, 2**53), 2**53),
    ],
)
def test_cost_of_usage(usage: Usage, expected: int) -> None:
    """Each part by its weight, rounded up once;
    what is not known keeps its estimate of 100 read and 400 written.
    """
    made = tokens(weights={"output": 4, "cached": 0.1})
    estimate = made.estimated({"m": "x" * 400, "max_tokens": 100}, quota=LARGE)
    assert 500 == estimate.cost
    assert expected == made.cost_of(usage, estimate)


NUMBERS = st.none() | st.integers(0, 2**53) | st.integers(0, 100)
WEIGHTS = st.dictionaries(
    st.sampled_from(["input", "cached", "cache_write", "output", "reasoning"]),
    st.integers(0, 10) | st.floats(0, 1e300) | st.decimals(0, 5, places=2).map(float),
)


@given(WEIGHTS, st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), st.integers(0, 10**9), st.text(max_size=40))
def test_cost_is_the_exact_sum_rounded_up_once(
    weights: dict[str, float], numbers: tuple[int | None, ...], quota: int, text: str
) -> None:
    """By fractions, as weights are written, what is estimated and what was used alike."""
    try:
        made = tokens(weights=weights)
    except ConfigurationError:
        return  # all of them 0
    exact = {part: Fraction(Decimal(repr(weight))) for part, weight in made.weights.items()}
    written = min(1000 * exact["output"], Fraction(quota, 4))
    read = min(Fraction(len(text.encode()), 4) * exact["input"], quota - written)
    estimate = made.estimated({"m": text}, quota=quota)
    assert max(1, math.ceil(read + written)) == estimate.cost
    missing = {"input": read, "output": written}
    total = sum(
        (missing.get(part, Fraction(0)) if number is None else number * exact[part])
        for number, part in zip(numbers, exact, strict=True)
    )
    assert min(2**53, math.ceil(total)) == made.cost_of(Usage(*numbers), estimate)


def reader_of(body: bytes, *, complete: bool, status: int = 200) -> UsageReader:
    reader = UsageReader(status, [(b"content-type", b"text/event-stream")])
    reader.feed(body)
    reader.close(complete)
    return reader


TEXT = b'data: {"t":"abcd"}\n\n'
USED = b'data: {"usage":{"prompt_tokens":30,"completion_tokens":900}}\n\n'
STARTED = b'data: {"type":"message_start","message":{"usage":{"input_tokens":30,"output_tokens":1}}}\n\n'


@pytest.mark.parametrize(
    ("body", "complete", "status", "expected"),
    [
        pytest.param(TEXT * 9, True, 200, 350, id="no usage keeps the estimate"),
        pytest.param(b"", True, 204, 350, id="so does no body"),
        pytest.param(TEXT * 9, True, 400, 0, id="an error costs nothing"),
        pytest.param(TEXT * 9, False, 503, 0, id="nor does one that was cut"),
        pytest.param(USED, True, 503, 930, id="but what it says it used"),
        pytest.param(TEXT * 9, False, 200, 109, id="a cut stream costs its events"),
        pytest.param(b"", False, 200, 100, id="or only what was read"),
        pytest.param(TEXT * 5000, False, 200, 350, id="and no more than the estimate"),
        pytest.param(TEXT + USED, False, 200, 930, id="unless it says so itself"),
        pytest.param(STARTED + TEXT * 9, False, 200, 48, id="what was read is known from its start"),
        pytest.param(STARTED + TEXT * 5000, False, 200, 350, id="the guess is not above the estimate"),
        pytest.param(STARTED + TEXT * 9, True, 200, 30 + 250, id="a start says nothing of the end"),
        pytest.param(USED + TEXT * 9, True, 200, 930, id="usage first"),
        pytest.param(USED + TEXT * 9, False, 200, 930, id="what is known is never less"),
    ],
)
def test_each_end(body: bytes, complete: bool, status: int, expected: int) -> None:
    """Of a request estimated at 100 read and 250 written."""
    estimate = PLAIN.estimated({"m": "x" * 400, "max_tokens": 250}, quota=LARGE)
    assert expected == PLAIN.settled(estimate, reader_of(body, complete=complete, status=status))


@given(
    st.randoms(use_true_random=False),
    st.sampled_from(["json", "chat", "responses", "ollama"]),
    st.sampled_from([200, 404, 500]),
    st.booleans(),
)
def test_random_ends_cost_what_the_oracle_says(rng: random.Random, style: str, status: int, complete: bool) -> None:
    """Of any format, after any of its events, with usage anywhere or nowhere in it."""
    answer = answer_of(rng, style)
    number = len(answer.pieces) if complete else rng.randrange(len(answer.pieces) + 1)
    reader = read(b"".join(answer.pieces[:number]), answer.content_type, complete=complete, status=status)
    estimate = PLAIN.estimated({"m": "x" * 400, "max_tokens": rng.choice([5, 250, 10**6])}, quota=LARGE)
    quota_of_output = estimate.cost - 100

    says = [said is not None and any(n is not None for n in said.values()) for said in answer.said[:number]]
    found = [said for said, counts in zip(answer.said, says, strict=False) if counts and said is not None]
    usage = None
    if found:
        usage = parts_of({n: found[0][n] if found[-1][n] is None else found[-1][n] for n in found[-1]})
    sizes = [len(piece) for piece, counts in zip(answer.pieces[:number], answer.counts, strict=False) if counts]
    passed = sum(map(len, answer.pieces[:number])) if answer.content_type == JSON_TYPE else sum(sizes)
    guess = max(Fraction(len(sizes)), Fraction(passed - len(sizes) * min(sizes, default=0), 4))
    spoken = [said for said, counts in zip(says, answer.counts, strict=False) if counts]
    is_last = style != "chat" or spoken[-1:] == [True]
    if usage is None:
        whole = 0 if status >= 400 else estimate.cost
        cost = whole if complete or status >= 400 else min(whole, math.ceil(100 + guess))
    else:
        read_of_it = (100 if usage.input is None else usage.input) + (usage.cached or 0) + (usage.cache_write or 0)
        if complete or (is_last and usage.output is not None):
            output = quota_of_output if usage.output is None else usage.output
            cost = read_of_it + output + (usage.reasoning or 0)
        else:
            known = read_of_it + (usage.output or 0) + (usage.reasoning or 0)
            cost = max(known, min(estimate.cost, math.ceil(read_of_it + guess)))
    assert cost == PLAIN.settled(estimate, reader)


def test_nothing_that_began_costs_nothing() -> None:
    """Such as an exception before the start."""
    assert 0 == PLAIN.settled(Estimate(5, 5, 0), None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("data:a/b;base64,A"),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["max_tokens", "n", "options", "num_predict", "data", "type", "images"]), inner
        )
    ),
)


TEXTS = st.text() | st.sampled_from(
    ["data:image/png;base64,AAAA", "DATA:,x", "base64", "a:", "abcd:efg", "https://a/b.png"]
)


@given(st.lists(st.dictionaries(st.sampled_from(["role", "content", "data", "images", "type", "format"]), TEXTS)))
def test_objects_of_texts_are_read_in_one_go(objects: list[dict[str, str]]) -> None:
    """As they are one by one, where something else stands beside them."""
    assert input_tokens([*objects, None]) == input_tokens(objects)


@given(JSON, st.integers(0, 2000))
@example([{"a": "\x80", "b": None}], 100)
def test_no_body_raises(document: object, quota: int) -> None:
    """Whatever a client sends, its estimate is from 1 to the quota."""
    assert 1 <= PLAIN.estimated(document, quota=quota).cost <= max(1, quota)
