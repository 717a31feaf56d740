"""Each example runs alone and does what its docstring says."""

import hmac
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from .kit.processes import ENDS_WITHIN, clean_environment
from .kit.servers import free_port, wait_until

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
ADA, BOB = {"X-API-Key": "ada"}, {"X-API-Key": "bob"}


class Example:
    """A running example: what it prints, and a client that asks it."""

    def __init__(self, client: httpx.Client, port: int, log: Path) -> None:
        self.get = client.get
        self.post = client.post
        self.put = client.put
        self.options = client.options
        self.delete = client.delete
        self.port = port
        self._log = log

    def printed(self) -> str:
        return self._log.read_text("utf-8")

    def statuses(self, times: int, path: str = "/", method: str = "GET", **headers: str) -> list[int]:
        """The statuses of so many equal requests, one after the other."""
        ask = self.post if method == "POST" else self.get
        return [ask(path, headers=headers).status_code for _ in range(times)]


@contextmanager
def serving(name: str, **environment: str) -> Iterator[Example]:
    """An example, started as ``python examples/<name>.py`` on a free port and ended by its process
    id.
    """
    port = free_port()
    command = [sys.executable, str(EXAMPLES[0].parent / f"{name}.py")]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as sink:
            environment = clean_environment(PORT=str(port), **environment)
            process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: _listens(port) or process.poll() is not None, f"{name} listens", within=30)
            assert process.poll() is None, log.read_text("utf-8")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
                yield Example(client, port, log)
        finally:
            process.terminate()
            process.wait(timeout=ENDS_WITHIN)


def _listens(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port), timeout=1).close()
    return True


def fields(answer: httpx.Response, name: str) -> dict[str, dict[str, int]]:
    """``"default";r=4;t=60`` as ``{"default": {"r": 4, "t": 60}}``."""
    found = {}
    for member in answer.headers[name].split(", "):
        policy, *parameters = member.split(";")
        found[json.loads(policy)] = {key: int(value) for key, _, value in (p.partition("=") for p in parameters)}
    return found


def remaining(answer: httpx.Response) -> dict[str, int]:
    """What remains of each policy."""
    return {name: values["r"] for name, values in fields(answer, "ratelimit").items()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_short(path: Path) -> None:
    """An example is read in one go."""
    # Half of these is a model.
    most = 160 if path.stem in ("chat_api", "embedding_server") else 80
    assert len(path.read_text("utf-8").splitlines()) < most


def test_quickstart_admits_five() -> None:
    """Five requests pass, the sixth waits, and the start says where the count is kept."""
    with serving("quickstart") as example:
        assert [200] * 5 + [429] == example.statuses(6)
        refused = example.get("/")
        assert "memory://" in example.printed()

    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["content-type"] == "application/problem+json"


def test_quickstart_believes_no_forwarding_header() -> None:
    """A client does not get a new quota by claiming to be somebody else."""
    with serving("quickstart") as example:
        addresses = (f"203.0.113.{last}" for last in range(6))
        assert [200] * 5 + [429] == [example.get("/", headers={"X-Forwarded-For": a}).status_code for a in addresses]


def test_quickstart_counts_in_the_configured_redis(redis_url: str, redis_client: redis.Redis) -> None:
    """With ``REDIS_URL`` two processes share one count, in Redis, and say nothing of memory."""
    with (
        serving("quickstart", REDIS_URL=redis_url) as one,
        serving("quickstart", REDIS_URL=redis_url) as other,
    ):
        assert [200] * 3 == one.statuses(3)
        assert [200, 200, 429] == other.statuses(3)
        assert "memory://" not in one.printed()

    assert [b"rate_limit:{127.0.0.1}"] == redis_client.keys()


def test_starlette_rules() -> None:
    """Attempts to log in are counted by both rules, and only they by the second."""
    with serving("starlette_app") as example:
        home = example.get("/")
        assert {"all": 999} == remaining(home)
        assert {"policy": "all", "remaining": 999} == home.json()
        assert [401, 401, 401, 429] == example.statuses(4, "/login", "POST")
        assert {"all": 995, "login": 0} | remaining(example.get("/")) == {"all": 995, "login": 0}


def test_starlette_decorators() -> None:
    """Sync and async endpoints have their own limits, and each search costs five of ten."""
    with serving("starlette_app") as example:
        assert [200, 200, 429] == example.statuses(3, "/report")
        assert [200, 200, 429] == example.statuses(3, "/search")
        assert {"all", "__main__.report-2-60s"} == set(remaining(example.get("/report")))


def test_starlette_websocket() -> None:
    """The third handshake in a minute is answered with a 429; messages are not counted."""
    with serving("starlette_app") as example:
        for _ in range(2):
            with connect(f"ws://127.0.0.1:{example.port}/echo", proxy=None) as websocket:
                websocket.send("hello")
                assert websocket.recv() == "hello"
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(f"ws://127.0.0.1:{example.port}/echo", proxy=None),
        ):
            pass

    assert refused.value.response.status_code == 429


def test_starlette_cors() -> None:
    """A script of the allowed origin may read a 429 and its fields."""
    with serving("starlette_app") as example:
        example.statuses(2, "/report")
        refused = example.get("/report", headers={"Origin": "https://example.com"})

    assert refused.status_code == 429
    assert refused.headers["access-control-allow-origin"] == "https://example.com"
    assert "RateLimit" in refused.headers["access-control-expose-headers"].split(", ")


def test_fastapi_plans() -> None:
    """A key has the quota of its plan; strangers have only that of their address."""
    with serving("fastapi_app") as example:
        assert {"plan": 4, "address": 59} == remaining(example.get("/", headers=BOB))
        assert {"plan-60s": 49, "plan-86400s": 9999, "address": 58} == remaining(example.get("/", headers=ADA))
        assert {"address": 57} == remaining(example.get("/", headers={"X-API-Key": "mallory"}))
        assert [200] * 4 + [429] == [example.get("/", headers=BOB).status_code for _ in range(5)]
        assert example.get("/", headers=ADA).status_code == 200


def test_fastapi_invented_keys_are_limited_by_address() -> None:
    """Whoever sends a new key with every request is stopped by the rule for addresses."""
    with serving("fastapi_app") as example:
        answers = [example.get("/", headers={"X-API-Key": f"key-{i}"}).status_code for i in range(61)]

    assert [200] * 60 + [429] == answers


def test_fastapi_cost_is_read_from_the_body() -> None:
    """Three texts cost three units, the app gets the body,
    and what is no JSON costs the whole quota.
    """
    with serving("fastapi_app") as example:
        body = json.dumps({"input": ["a", "b", "c"]})
        answers = [example.post("/embed", content=body, headers=ADA) for _ in range(4)]
        nonsense = example.post("/embed", content="nonsense", headers=BOB)

    assert [200, 200, 200, 429] == [answer.status_code for answer in answers]
    assert [7, 4, 1, 1] == [remaining(answer)["texts"] for answer in answers]
    assert {"bytes": len(body)} == answers[0].json()
    assert (200, 0) == (nonsense.status_code, remaining(nonsense)["texts"])


def test_fastapi_story_is_charged_by_its_words() -> None:
    """The second request finds eight units gone; the third is one too many for the route."""
    with serving("fastapi_app") as example:
        answers = [example.get("/story", headers=ADA) for _ in range(3)]

    assert [200, 200, 429] == [answer.status_code for answer in answers]
    assert [99, 91] == [remaining(answer)["words"] for answer in answers[:2]]
    assert answers[2].json()["detail"].startswith("Rate limit exceeded: 2 per 60 s.")


def test_fastapi_router_shares_a_counter() -> None:
    """Three requests to a router pass, whatever their path."""
    with serving("fastapi_app") as example:
        assert [200, 200, 200, 429] == [example.get(f"/archive/{volume}").status_code for volume in range(4)]


def test_behind_a_proxy() -> None:
    """The address that the proxy adds is counted,
    and what a client writes before it changes nothing.
    """
    with serving("behind_a_proxy") as example:

        def ask(forwarded: str) -> int:
            return example.get("/", headers={"X-Forwarded-For": forwarded}).status_code

        assert [200, 200, 200] == [ask("203.0.113.7"), ask("203.0.113.8"), ask("203.0.113.7")]
        assert [429, 429] == [ask("1.2.3.4, 203.0.113.7"), ask("203.0.113.9, 203.0.113.7")]
        assert [200, 429] == [ask("203.0.113.8, 10.1.2.3"), ask("203.0.113.8, 10.1.2.3")]


def test_saas_plans() -> None:
    """A key has its plan's quota, whoever sends it from wherever;
    one that is not known is let in by nobody.
    """
    with serving("saas_api") as example:

        def ask(key: str, address: str) -> httpx.Response:
            return example.get("/api/projects", headers={"X-API-Key": key, "X-Forwarded-For": address})

        bob = [ask("key-of-bob", f"203.0.113.{i}") for i in range(6)]
        ada = ask("key-of-ada", "203.0.113.1")
        stranger = ask("key-of-eve", "203.0.113.1")

    assert [200] * 5 + [429] == [answer.status_code for answer in bob]
    assert (["a project of ada"], {"plan-60s", "plan-86400s", "address"}) == (ada.json(), set(remaining(ada)))
    assert (401, {"address": 57}) == (stranger.status_code, remaining(stranger))


def test_saas_login_is_protected() -> None:
    """Three wrong passwords a minute from an address,
    ten an hour for an account; right ones cost nothing.
    """
    with serving("saas_api") as example:

        def log_in(user: str, password: str, address: str) -> httpx.Response:
            claim = {"user": user, "password": password}
            return example.post("/login", json=claim, headers={"X-Forwarded-For": address})

        assert [200] * 5 == [log_in("ada", "lovelace", "203.0.113.7").status_code for _ in range(5)]
        guesses = [log_in("ada", "", "203.0.113.7") for _ in range(4)]
        spread = [log_in("bob", "?", f"203.0.113.{i}") for i in range(10, 21)]
        assert [200, 401] == [log_in(*claim, "203.0.113.8").status_code for claim in (("ada", "lovelace"), ("eve", ""))]

    assert [401, 401, 401, 429] == [answer.status_code for answer in guesses]
    assert ["login-60s"] == guesses[-1].json()["violated-policies"]
    assert [401] * 10 + [429] == [answer.status_code for answer in spread]
    assert 3590 <= int(spread[-1].headers["retry-after"]) <= 3600


def test_saas_webhooks_are_checked_and_not_counted() -> None:
    """However many come, each is answered by whether it is signed, and carries no field of a limit."""
    body = b'{"paid": true}'
    signature = hmac.new(b"a secret", body, "sha256").hexdigest()
    with serving("saas_api", WEBHOOK_SECRET="a secret") as example:
        signed = [
            example.post("/webhooks/payments", content=body, headers={"X-Signature": signature}) for _ in range(70)
        ]
        forged = [example.post("/webhooks/payments", content=body, headers={"X-Signature": s}) for s in ("", "ab")]

    assert {200} == {answer.status_code for answer in signed}
    assert [401, 401] == [answer.status_code for answer in forged]
    assert not [answer for answer in signed + forged if "ratelimit" in answer.headers]


def test_saas_is_called_by_a_page() -> None:
    """A preflight costs nothing, and the page may read a refusal and its fields; other pages may
    not.
    """
    origin = {"Origin": "https://app.example.com", "X-API-Key": "key-of-bob"}
    asking = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "X-API-Key"}
    with serving("saas_api") as example:
        preflight = example.options("/api/projects", headers=origin | asking)
        first, *_, refused = [example.get("/api/projects", headers=origin) for _ in range(6)]
        other = example.get("/api/projects", headers=origin | {"Origin": "https://example.org"})

    assert (200, 4) == (preflight.status_code, remaining(first)["plan"])
    assert (429, "https://app.example.com") == (refused.status_code, refused.headers["access-control-allow-origin"])
    assert {"RateLimit", "Retry-After"} <= set(refused.headers["access-control-expose-headers"].split(", "))
    assert "access-control-allow-origin" not in other.headers


def test_context_service_computes_what_is_new() -> None:
    """Put, compare, change, delete; every answer carries the fields of the limits."""
    with serving("context_service") as example:
        assert example.put("/contexts/a", json={"text": "hello world"}).status_code == 204
        same = example.get("/contexts/a/similar", params={"text": "hello world"})
        assert {"default-1s", "default-3600s"} == set(remaining(same))
        assert example.put("/contexts/a", json={"text": "something else"}).status_code == 204
        other = example.get("/contexts/a/similar", params={"text": "hello world"})
        assert example.delete("/contexts/a").status_code == 204
        gone = example.get("/contexts/a/similar", params={"text": "hello world"})
        health, metrics, page = [example.get(path) for path in ("/health/", "/metrics/", "/status/")]

    assert [pytest.approx(1.0), 0.0, 404] == [same.json(), other.json(), gone.status_code]
    assert ("healthy", "memory") == (health.json()["status"], health.json()["mode"])
    assert 'redis_asgi_ratelimit_requests_total{outcome="allowed",source="memory"} 6.0' in metrics.text
    assert "text/html; charset=utf-8" == page.headers["content-type"]
    assert not [each for each in (health, metrics, page) if "ratelimit" in each.headers]


def test_context_service_shares_embeddings_in_redis(redis_url: str, redis_client: redis.Redis) -> None:
    """With ``REDIS_URL``, vectors are kept by id in Redis, beside the counters."""
    with serving("context_service", REDIS_URL=redis_url) as example:
        example.put("/contexts/a", json={"text": "hello world"})
        example.get("/contexts/a/similar", params={"text": "hello"})

    assert {b"embedding:a", b"rate_limit:{127.0.0.1}"} == set(redis_client.keys())
