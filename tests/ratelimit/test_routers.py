"""Whatever spelling of a path reaches an endpoint,
its rule counts the request: on real routers and servers.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from ..embeddings.clients import needed
from ..kit.processes import clean_environment
from ..kit.servers import free_port, wait_until
from . import routers
from .routers import ROUTES, Answer, ask, limited, started, targets

# As servers set it: without and with a final slash, and one that is in every path.
ROOTS = ("", "", "/api", "/api/", "/")


def check_every_spelling(app: Any, examples: int = 250, **options: Any) -> None:
    """Ask *app* in many spellings for each of its endpoints;
    where one answers, the rule for it has counted.
    """
    rules = {name: limited(app, pattern, **options) for name, (_, pattern) in ROUTES.items()}
    served = set()

    with asyncio.Runner() as runner:
        life = started(app)
        runner.run(_enter(life))
        for name, (path, _) in ROUTES.items():
            assert Answer(200, name, counted=True) == runner.run(ask(rules[name], path))

        def reach_as(name: str, target: str, root: str = "", method: str = "GET") -> None:
            answer = runner.run(ask(rules[name], target, root=root, method=method))
            if answer.status == 200 and answer.endpoint == name:
                served.add((name, target))
                assert answer.counted

        # Whichever a router forgives: what is drawn need not hit it.
        for name, (path, _) in ROUTES.items():
            for target in (f"{path}\n", f"{path}/", f"/{path}", f"http://test{path}"):
                reach_as(name, target)

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(data=st.data(), name=st.sampled_from(list(ROUTES)), root=st.sampled_from(ROOTS))
        def reach(data: st.DataObject, name: str, root: str) -> None:
            target = data.draw(targets(ROUTES[name][0]))
            reach_as(name, target, root, data.draw(st.sampled_from(["GET", "GET", "get", "Get"])))

        reach()
        runner.run(life.__aexit__(None, None, None))
    assert served - {(name, path) for name, (path, _) in ROUTES.items()}  # else no other spelling has reached anything


async def _enter(life: contextlib.AbstractAsyncContextManager[None]) -> None:
    await life.__aenter__()


def test_starlette() -> None:
    """Nested mounts included, whose regular expressions forgive in their own way."""
    check_every_spelling(routers.starlette_app())


@pytest.mark.parametrize("root", ["", "/api"])
def test_fastapi(root: str) -> None:
    """Nested routers, and a root that the app sets by itself after the limiter has looked."""
    check_every_spelling(routers.fastapi_app(root))


def test_fastapi_with_a_root_below_a_mount() -> None:
    """The limiter stands before an app that has the one with a root in it."""
    check_every_spelling(Starlette(routes=[Mount("/", routers.fastapi_app("/api"))]))


@pytest.mark.parametrize("hidden", ["app", "_app", "asgi_app", "application", "wrapped"])
def test_fastapi_with_a_root_within_a_wrapper(hidden: str) -> None:
    """A wrapper keeps its app in an attribute of one of the usual names."""

    class Wrapper:
        def __init__(self) -> None:
            setattr(self, hidden, routers.fastapi_app("/api"))

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await getattr(self, hidden)(scope, receive, send)

    answer = asyncio.run(ask(limited(Wrapper(), "/login"), "/api/login"))
    assert Answer(200, "login", counted=True) == answer


def test_static_files_are_files() -> None:
    """Dots lead to the same file, and so to the same rule."""
    from starlette.staticfiles import StaticFiles

    folder = os.path.dirname(__file__)  # noqa: PTH120 - StaticFiles takes a string
    app = limited(Starlette(routes=[Mount("/files", StaticFiles(directory=folder))]), "/files/harness.py")
    spelled = ["harness.py", "./harness.py", "x/../harness.py", "/harness.py", "%2e/harness.py", ".//harness.py"]

    async def asked() -> list[Answer]:
        return [await ask(app, f"/files/{path}") for path in spelled]

    answers = asyncio.run(asked())
    assert {200} == {answer.status for answer in answers[:3]}
    assert not [
        path for path, answer in zip(spelled, answers, strict=True) if answer.status == 200 and not answer.counted
    ]


def test_newline_behind_every_kind_of_route() -> None:
    """A regular expression's ``$`` forgives one, at the end of plain paths,
    parameters, mounts and numbers.
    """

    async def page(_request: Any) -> PlainTextResponse:
        return PlainTextResponse("page")

    routes = [Route(path, page) for path in ("/plain", "/n/{n:int}", "/u/{u:uuid}", "/f/{f:float}", "/s/{s}")]
    app = Starlette(routes=[*routes, Mount("/m", routes=[Route("/x", page)])])
    paths = ("/plain", "/n/5", "/u/00000000-0000-0000-0000-000000000000", "/f/1.5", "/s/x", "/m/x")

    async def asked() -> list[tuple[str, bool]]:
        answers = [(path, await ask(limited(app, path), f"{path}%0A")) for path in paths]
        return [(path, answer.counted) for path, answer in answers if answer.status == 200]

    found = asyncio.run(asked())
    assert {"/plain", "/n/5"} <= {path for path, _ in found}
    assert all(counted for _, counted in found)


FRAMEWORKS = ("litestar", "quart", "falcon", "sanic", "blacksheep")
# BlackSheep's router is the one that does not tell case.
OPTIONS: dict[str, dict[str, Any]] = {"blacksheep": {"case_sensitive": False}}


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_other_frameworks(framework: str) -> None:
    """Those forgive slashes, roots anywhere, fragments, case, or what is no path at all."""
    needed(framework)
    check_every_spelling(getattr(routers, f"{framework}_app")(), examples=1_000, **OPTIONS.get(framework, {}))


TARGETS = (
    "/login", "/login/", "//login", "///login", "/login//", "/login%0A", "/login%0a", "/login/%0A", "/login%2F",
    "/LOGIN", "/%6Cogin", "/%256cogin", "/./login", "/x/../login", "/login/.", "/login;x", "/login%3Bx", "/login?x",
    "/login%3Fx", "/login#x", "/login%23x", "\\login", "/login%00", "/login%20", "http://x/login", "http://x//login",
    "HTTP://u@x:1/login", "http:/login", "http:login", "login", "x:80/login", "*", "//x/login", "http://x/lo%0Agin",
    "%20/login", "%0A/login",
)  # fmt: skip
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "--app-dir", ".", "served:app", "--port", "{port}", "--log-level", "critical"],
    "hypercorn": ["-m", "hypercorn", "served:app", "--bind", "127.0.0.1:{port}"],
    "granian": ["-m", "granian", "--interface", "asgi", "--port", "{port}", "served:app"],
}


def _ask_raw(port: int, method: str, target: str) -> tuple[int, bool, bytes]:
    """Status, whether a rule counted,
    and body of an answer to a request line that no library would write.
    """
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(5)
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(65_536):
                answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, b"\r\nratelimit:" in head.lower(), body


@pytest.fixture
def serve(tmp_path: Any) -> Iterator[Callable[[str, str], int]]:
    """Serves a framework's app, behind a rule for its login, by a server of that name; its port."""
    running: list[subprocess.Popen[bytes]] = []

    def start(server: str, framework: str) -> int:
        options = "".join(f", {name}={value!r}" for name, value in OPTIONS.get(framework, {}).items())
        (tmp_path / "served.py").write_text(
            f"from tests.ratelimit import routers\napp = routers.{framework}_app()\n"
            f"app = routers.limited(app, '/login'{options})\n"
        )
        port = free_port()
        command = [sys.executable, *(each.format(port=port) for each in SERVERS[server])]
        environment = clean_environment(PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd()]))  # noqa: PTH109
        running.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

        def answers() -> bool:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True

        wait_until(answers, f"{server} with {framework}", within=30)
        return port

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def _check_served(port: int) -> None:
    asked = [(method, target) for target in TARGETS for method in ("GET", "get")]
    answers = {each: _ask_raw(port, *each) for each in asked}
    served = {each: answer for each, answer in answers.items() if answer[0] == 200 and b"login" in answer[2]}

    assert ("GET", "/login") in served
    assert not [each for each, (_, counted, _body) in served.items() if not counted]
    # Nothing a client writes is an error of the limiter's.
    assert {200} == {_ask_raw(port, "GET", "/login")[0]}


def test_starlette_under_uvicorn(serve: Callable[[str, str], int]) -> None:
    """Request lines as no client library writes them."""
    _check_served(serve("uvicorn", "starlette"))


@pytest.mark.clients
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "granian"])
@pytest.mark.parametrize("framework", ["starlette", "fastapi", *FRAMEWORKS])
def test_other_frameworks_and_servers(framework: str, server: str, serve: Callable[[str, str], int]) -> None:
    """What a server passes on differs as much as what a router makes of it."""
    needed(framework)
    needed(server)
    _check_served(serve(server, framework))
