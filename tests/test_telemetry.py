"""What is counted, and the short history of it."""

import asyncio
import os
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Counter

from redis_asgi.bulk_metrics import Histogram
from redis_asgi.count_buffer import Together
from redis_asgi.telemetry import SAMPLE_SECONDS, SAMPLES_KEPT, Sample, Telemetry, fresh_telemetry, telemetry

from .kit.fair_time import fair_time
from .kit.processes import run_python


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """The process's telemetry for this test alone, its history begun at monotonic second 0."""
    with fresh_telemetry(now=0.0) as mine:
        yield mine


PROMISED = {
    "redis_asgi_ratelimit_requests": ("counter", ("outcome", "source")),
    "redis_asgi_ratelimit_policy": ("counter", ("policy", "outcome")),
    "redis_asgi_ratelimit_fallback": ("counter", ("mode", "reason")),
    "redis_asgi_ratelimit_check_duration_seconds": ("histogram", ("source",)),
    "redis_asgi_ratelimit_used_units": ("counter", ("policy",)),
    "redis_asgi_ratelimit_estimate_error_units": ("histogram", ("policy", "was")),
    "redis_asgi_ratelimit_local_evictions": ("counter", ()),
    "redis_asgi_cache_requests": ("counter", ("result",)),
    "redis_asgi_cache_bypass": ("counter", ("reason",)),
    "redis_asgi_cache_items": ("counter", ("result",)),
    "redis_asgi_cache_lookup_duration_seconds": ("histogram", ()),
    "redis_asgi_cache_store_duration_seconds": ("histogram", ()),
    "redis_asgi_cache_origin_duration_seconds": ("histogram", ()),
    "redis_asgi_cache_stored_bytes": ("counter", ()),
    "redis_asgi_cache_served_bytes": ("counter", ()),
    "redis_asgi_cache_saved_tokens": ("counter", ()),
    "redis_asgi_cache_rejected": ("counter", ("reason",)),
    "redis_asgi_redis_commands": ("counter", ("op", "outcome")),
    "redis_asgi_redis_command_duration_seconds": ("histogram", ("op",)),
    "redis_asgi_redis_batch_size": ("histogram", ()),
    "redis_asgi_redis_script_loads": ("counter", ()),
    "redis_asgi_redis_reconnects": ("counter", ()),
    "redis_asgi_redis_pool_wait_seconds": ("histogram", ()),
    "redis_asgi_breaker_transitions": ("counter", ("to",)),
}


def test_metrics_are_those_promised(counted: Telemetry) -> None:
    """Every metric has its name, type and labels, and there is none beside them."""
    metrics = [value for value in vars(counted).values() if isinstance(value, Counter | Histogram)]

    assert {
        name: ("counter" if isinstance(metric, Counter) else "histogram", metric._labelnames)
        for metric in metrics
        for name in (next(iter(metric.describe())).name,)
    } == PROMISED
    assert {family.name for family in counted.registry.collect()} == set(PROMISED)


def test_attributes_are_named_as_their_metrics(counted: Telemetry) -> None:
    """``t.x`` is ``redis_asgi_x``, less its unit if that is seconds."""
    for attribute, metric in vars(counted).items():
        if isinstance(metric, Counter | Histogram):
            assert next(iter(metric.describe())).name.removesuffix("_seconds") == f"redis_asgi_{attribute}"


def test_a_process_has_one() -> None:
    """Threads that ask at once are given the same one."""
    seen: set[int] = set()
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        seen.add(id(telemetry()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {id(telemetry())} == seen


def test_it_is_made_at_first_use() -> None:
    """Neither the package nor the module makes one,
    or imports prometheus-client, before somebody asks.
    """
    script = """
import sys
import redis_asgi, redis_asgi.telemetry
assert "prometheus_client" not in sys.modules
first = redis_asgi.telemetry.telemetry()
assert "prometheus_client" in sys.modules
assert redis_asgi.telemetry.telemetry() is first
"""
    done = run_python(script)

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_global_registry_is_left_alone() -> None:
    """What the app exposes itself does not change, unless it registers ours,
    which then brings every metric.
    """
    script = """
from prometheus_client import REGISTRY, generate_latest
from redis_asgi.telemetry import telemetry
telemetry().cache_saved_tokens.inc(3)
assert b"redis_asgi" not in generate_latest()
REGISTRY.register(telemetry().registry)
assert b"redis_asgi_cache_saved_tokens_total 3.0" in generate_latest()
assert b"python_info" in generate_latest()
"""
    done = run_python(script)

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_fresh_telemetry_ends() -> None:
    """A test's counts are gone with it."""
    before = telemetry()
    with fresh_telemetry() as mine:
        assert telemetry() is mine
        assert mine is not before

    assert telemetry() is before


def admit(counted: Telemetry, n: int = 1) -> None:
    counted.ratelimit_requests.labels("allowed", "redis").inc(n)


def test_sample_says_what_was_counted(counted: Telemetry) -> None:
    """Each field is the sum over the labels that do not matter to it, since the sample before."""
    admit(counted, 3)
    counted.ratelimit_requests.labels("allowed", "local").inc(1)
    counted.ratelimit_requests.labels("refused", "refusal_memory").inc(5)
    counted.ratelimit_requests.labels("exempt", "none").inc(6)
    counted.ratelimit_requests.labels("unavailable", "none").inc(7)
    counted.ratelimit_fallback.labels("local", "timeout").inc(8)
    counted.ratelimit_fallback.labels("open", "auth").inc(1)
    counted.cache_items.labels("hit").inc(10)
    counted.cache_items.labels("miss").inc(11)
    counted.cache_items.labels("collapsed").inc(12)
    counted.ratelimit_policy.labels("a", "allowed").inc(13)
    counted.ratelimit_policy.labels("a", "refused").inc(14)
    counted.ratelimit_policy.labels("b", "shadow_refused").inc(15)
    counted.ratelimit_policy.labels("b", "allowed").inc(16)
    counted.tick(5.0)

    (sample,) = counted.history(5.0)
    assert (
        Sample(
            sample.at,
            5.0,
            allowed=4,
            refused=5,
            exempt=6,
            unavailable=7,
            hits=10,
            misses=11,
            fallbacks=9,
            policies={"a": (13, 14, 0), "b": (16, 0, 15)},
        )
        == sample
    )
    assert sample.at == pytest.approx(time.time(), abs=5)

    admit(counted)
    later = counted.history(10.0)
    assert [4, 1] == [each.allowed for each in later]
    assert {} == later[1].policies


def test_no_sample_before_its_time(counted: Telemetry) -> None:
    """An interval that has not ended is not in the history."""
    admit(counted)
    counted.tick(4.99)
    assert () == counted.history(4.99)

    counted.tick(5.0)
    counted.tick(5.01)
    assert 1 == len(counted.history(5.01))


def test_idle_time_is_zeros(counted: Telemetry) -> None:
    """After a gap, what was counted before it belongs to the interval that it was counted in."""
    admit(counted, 2)
    counted.tick(31.0)
    admit(counted, 9)

    history = counted.history(36.0)
    assert [2, 0, 0, 0, 0, 0, 9] == [sample.allowed for sample in history]
    assert [SAMPLE_SECONDS] * 6 == [b.at - a.at for a, b in pairwise(history)]
    assert {SAMPLE_SECONDS} == {sample.seconds for sample in history}


def test_history_goes_on_when_nobody_asks_for_anything_else(counted: Telemetry) -> None:
    """Reading alone fills the intervals that have ended: nothing has to run in the background."""
    admit(counted)
    assert [1] == [sample.allowed for sample in counted.history(5.0)]
    assert [1, 0, 0] == [sample.allowed for sample in counted.history(15.0)]


def test_history_is_ten_minutes(counted: Telemetry) -> None:
    """However long the process runs or was idle, the last 120 intervals are kept, at once."""
    for second in range(0, 700, 5):
        counted.tick(float(second))
        admit(counted)
    full = counted.history(700.0)
    assert [1] * SAMPLES_KEPT == [sample.allowed for sample in full]

    began = fair_time()
    idle = counted.history(30 * 24 * 3600.0)
    assert [0] * SAMPLES_KEPT == [sample.allowed for sample in idle]
    assert fair_time() - began < 1


def test_counters_that_start_again_do_not_count_backwards(counted: Telemetry) -> None:
    """A worker forked off a parent that had counted starts at zero in multi-process mode."""
    admit(counted, 10)
    counted.tick(5.0)
    counted.ratelimit_requests.clear()
    admit(counted, 2)

    assert [10, 2] == [sample.allowed for sample in counted.history(10.0)]


def test_threads_take_a_sample_once(counted: Telemetry) -> None:
    """Two loops in two threads that find it due at once add one sample, and lose nothing."""
    admit(counted, 3)
    barrier = threading.Barrier(8)

    def tick() -> None:
        barrier.wait()
        counted.tick(5.0)

    threads = [threading.Thread(target=tick) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [3] == [sample.allowed for sample in counted.history(5.0)]


def test_tick_is_nearly_free(counted: Telemetry) -> None:
    """While nothing is due a tick costs what a method that compares two numbers does (40 ns,
    measured alone).
    """

    class Bare:
        due = 5.0

        def compare(self, now: float) -> None:
            if now >= self.due:
                raise AssertionError

    def seconds(call: Callable[[float], None]) -> float:
        return min(timeit.repeat("call(1.0)", globals={"call": call}, number=20_000, repeat=7))

    assert seconds(counted.tick) < 3 * seconds(Bare().compare)


def test_files_of_several_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In multi-process mode the counts go to files,
    whose sum is that of all processes, and history stays one's own.
    """
    folder = tmp_path_factory.mktemp("multiproc")
    script = """
from redis_asgi.telemetry import telemetry
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
import time
t = telemetry()
t.ratelimit_requests.labels("allowed", "redis").inc(2)
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(registry.get_sample_value("redis_asgi_ratelimit_requests_total", {"outcome": "allowed", "source": "redis"}))
print([s.allowed for s in t.history(time.monotonic() + 5)])
"""
    outputs = []
    for _ in range(2):
        # Without -X dev: prometheus-client leaves its files to the end of the process.
        done = run_python(script, flags=(), env={"PROMETHEUS_MULTIPROC_DIR": str(folder)})
        assert ("", 0) == (done.stderr, done.returncode)
        outputs.append(done.stdout.split("\n")[:2])

    assert [["2.0", "[2]"], ["4.0", "[2]"]] == outputs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("child", ["asyncio.run", "loop.run_until_complete"])
def test_what_a_fork_finds_noted_is_its_parents_to_tell(tmp_path: Path, child: str) -> None:
    """Three requests noted before the fork and one after it are four in all,
    and the child tells its own in time.
    """
    script = f"""
import asyncio, os
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from redis_asgi import RedisManager, Settings
from redis_asgi.count_buffer import FLUSHED_WITHIN
from redis_asgi.telemetry import telemetry

manager = RedisManager(Settings(REDIS_URL="memory://"))
loop = asyncio.new_event_loop()

async def count(times, wait):
    for _ in range(times):
        telemetry().buffer.count(telemetry().ratelimit_requests.labels("allowed", "memory"))
        telemetry().buffer.add((telemetry().redis_batch_size, 1))
    await asyncio.sleep(wait)

loop.run_until_complete(count(3, 0))
pid = os.fork()
if pid == 0:
    {child}(count(1, 4 * FLUSHED_WITHIN))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
loop.run_until_complete(asyncio.sleep(4 * FLUSHED_WITHIN))
loop.close()
registry = CollectorRegistry()
MultiProcessCollector(registry)
labels = {{"outcome": "allowed", "source": "memory"}}
print(registry.get_sample_value("redis_asgi_ratelimit_requests_total", labels))
print(registry.get_sample_value("redis_asgi_redis_batch_size_count"))
"""
    # Without -X dev: prometheus-client leaves its files to the end of the process.
    done = run_python(script, flags=(), env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})

    assert ("4.0\n4.0\n", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_missing_folder_is_a_configuration_error() -> None:
    """``PROMETHEUS_MULTIPROC_DIR`` that is not there is said at construction,
    with what to do, and not its path.
    """
    script = """
from redis_asgi import ConfigurationError
from redis_asgi.telemetry import telemetry
try:
    telemetry()
except ConfigurationError as error:
    print(error)
"""
    done = run_python(script, env={"PROMETHEUS_MULTIPROC_DIR": "/nonexistent/folder"})

    assert ("", 0) == (done.stderr, done.returncode)
    assert done.stdout.startswith("PROMETHEUS_MULTIPROC_DIR is not a directory that can be written to (FileNotFoundE")
    assert "before the first worker starts" in done.stdout


def total(counter: Counter) -> float:
    """What *counter* was told."""
    return counter._value.get()  # type: ignore[no-any-return]  # prometheus-client's


async def noted(counted: Telemetry, times: int) -> tuple[Counter, Counter]:
    """Note an admission by two policies so many times."""
    both = tuple(counted.ratelimit_policy.labels(name, "allowed") for name in ("a", "b"))
    together = Together(both)
    for _ in range(times):
        counted.buffer.count(together)
    return both[0], both[1]


@pytest.mark.anyio
async def test_notes_are_told_in_time(counted: Telemetry) -> None:
    """Nobody asks, and they are told all the same; once."""
    first, second = await noted(counted, 3)
    before = total(first)
    deadline = time.monotonic() + 5
    while not total(second) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    counted.buffer.flush()

    assert [0, 3, 3] == [before, total(first), total(second)]


@pytest.mark.anyio
async def test_whoever_reads_is_told_all(counted: Telemetry) -> None:
    """The registry and the history are up to date when they are read."""
    await noted(counted, 2)
    counted.buffer.add((counted.redis_batch_size, 7))
    (policies,) = [f for f in counted.registry.collect() if f.name == "redis_asgi_ratelimit_policy"]
    (sizes,) = [f for f in counted.registry.collect() if f.name == "redis_asgi_redis_batch_size"]
    await noted(counted, 1)
    last = counted.history(counted._due)[-1]

    assert {"a": 2, "b": 2} == {s.labels["policy"]: s.value for s in policies.samples if s.name.endswith("_total")}
    assert [1, 7] == [s.value for s in sizes.samples if s.name.endswith(("_count", "_sum"))]
    assert {"a": (3, 0, 0), "b": (3, 0, 0)} == dict(last.policies)


@pytest.mark.anyio
async def test_notes_do_not_pile_up(counted: Telemetry) -> None:
    """A loop that never gets to its timers, or is gone, keeps a bounded number of them."""
    first, _ = await noted(counted, 10_000)
    told = total(first)
    for _ in range(10_000):
        counted.buffer.add((counted.redis_batch_size, 1))
    counted.buffer.flush()

    assert 8192 == told
    assert 10_000 == total(first)
    assert 10_000 == counted.redis_batch_size._sum.get()


@pytest.mark.anyio
async def test_amounts_add_up_until_they_are_told(counted: Telemetry) -> None:
    """Of several counters at once; told once, and forgotten where somebody else tells them."""
    bytes_, tokens = counted.cache_served_bytes, counted.cache_saved_tokens
    for amount in (1, 2, 0):
        counted.buffer.add((bytes_, 10 * amount), (tokens, amount))
    before = total(bytes_)
    counted.buffer.flush()
    counted.buffer.flush()

    assert (0, 30, 3) == (before, total(bytes_), total(tokens))
    counted.buffer.add((tokens, 5))
    counted.buffer.discard()
    counted.buffer.flush()
    assert 3 == total(tokens)


@pytest.mark.parametrize("is_known", [True, False])
def test_values_told_together_are_those_told_one_by_one(counted: Telemetry, is_known: bool) -> None:
    """In the same buckets, on and beside their bounds, whatever the histogram keeps them in."""
    together = counted.ratelimit_estimate_error_units.labels("a", "together")
    alone = counted.ratelimit_estimate_error_units.labels("a", "alone")
    values = [value for bound in together._upper_bounds[:-1] for value in (bound - 1, bound, bound + 1)] + [10**12]
    told: Any = together if is_known else SimpleNamespace(observe=together.observe)
    Histogram.tell(told, values * 2)
    for value in values * 2:
        alone.observe(value)

    one_by_one, in_one_go = (
        [s.value for s in each._child_samples() if s.name != "_created"] for each in (alone, together)
    )
    assert one_by_one == in_one_go
