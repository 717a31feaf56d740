"""Diagnosis where connecting fails: addresses, passwords, TLS."""

from pathlib import Path
from typing import Any

import pytest

from redis_asgi import Settings
from redis_asgi.inspection.diagnosis import diagnose

from ..conftest import StartServer
from ..kit.certificates import Certificates
from ..kit.proxy import FaultProxy
from ..kit.servers import Server
from .diagnosing import PASSWORD, findings, levels, the_only

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("values", "text", "fix"),
    [
        pytest.param({"REDIS_URL": "redis://127.0.0.1:1"}, "refuses connections", "server runs", id="refused"),
        pytest.param(
            {"REDIS_URL": "redis://127.0.0.1:1", "REDIS_CLUSTER": True},
            "refuses connections",
            "server runs",
            id="cluster refused",
        ),
        pytest.param({"REDIS_HOST": "host.invalid"}, "cannot be resolved", "REDIS_HOST", id="unknown host"),
        pytest.param({"REDIS_URL": "unix:///nowhere/redis.sock"}, "no socket", "path", id="no socket"),
    ],
)
async def test_unreachable(values: dict[str, Any], text: str, fix: str) -> None:
    """A server that cannot be reached, and why."""
    found = await the_only(**values)

    assert ("connection", "fail") == (found.check, found.level)
    assert text in found.text
    assert fix in found.fix


@pytest.mark.parametrize("cluster_mode", [False, True])
async def test_passwords(cluster_mode: bool, private_server: StartServer) -> None:
    """No password where one is wanted, a wrong one, and one too many are told apart."""
    more = {"REDIS_CLUSTER": True} if cluster_mode else {}
    locked = private_server("--requirepass", "right", *(["--cluster-enabled", "yes"] if cluster_mode else []))
    wanted = await the_only(REDIS_URL=locked.url, **more)
    refused = await the_only(REDIS_URL=locked.url, REDIS_PASSWORD=PASSWORD, **more)
    in_url = await the_only(REDIS_URL=locked.url.replace("//", f"//app:{PASSWORD}@"), **more)

    assert "wants a password" in wanted.text
    assert "refuses the user name or the password" in refused.text
    assert "REDIS_PASSWORD" in wanted.fix
    assert "refuses the user name or the password" in in_url.text


async def test_a_password_too_many(redis_url: str) -> None:
    """A password for a server that has none."""
    found = await the_only(REDIS_URL=redis_url, REDIS_PASSWORD=PASSWORD)

    assert "no password" in found.text
    assert found.fix == "Unset REDIS_PASSWORD."


async def test_a_password_too_many_in_the_url(redis_url: str) -> None:
    """Then it is there that it must go."""
    found = await the_only(REDIS_URL=redis_url.replace("//", f"//:{PASSWORD}@"))

    assert found.fix == "Take the password out of REDIS_URL."


async def test_no_such_database(redis_url: str) -> None:
    """A database that the server does not have."""
    found = await the_only(REDIS_URL=f"{redis_url}/999")

    assert "no such database" in found.text


async def test_a_hung_server(private_server: StartServer) -> None:
    """A server that is stopped is waited for as long as the setting says."""
    server = private_server()
    server.pause()
    try:
        found = await the_only(REDIS_URL=server.url, REDIS_TIMEOUT=0.2)
    finally:
        server.resume()

    assert "does not answer within 0.2 s" in found.text


async def test_a_server_lost_on_the_way(private_server: StartServer) -> None:
    """Losing the server in the middle is a finding too, after those before it."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        got = diagnose(Settings(REDIS_URL=proxy.url, REDIS_TIMEOUT=1))
        found = []
        async for finding in got:
            found.append(finding)
            if finding.check == "connection" and finding.level == "ok":
                await proxy.set("refuse")

    assert levels(found) == [("settings", "ok"), ("connection", "ok"), ("connection", "fail")]
    assert "Lost" in found[-1].text


async def test_no_connection_left(private_server: StartServer) -> None:
    """A server that is full says so."""
    server = private_server("--maxclients", "1")
    server.client().ping()
    found = await the_only(REDIS_URL=server.url)

    assert "no connection left" in found.text


# TLS


@pytest.mark.parametrize("name", ["REDIS_SSL_CA_CERTS", "REDIS_SSL_CERTFILE"])
async def test_a_file_without_a_certificate(name: str, tmp_path: Path) -> None:
    """It is told as what it is, and not as a server that speaks otherwise."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    found = await the_only(REDIS_URL="rediss://127.0.0.1:1", **{name: str(empty)})

    assert "holds no certificate" in found.text
    assert name in found.fix


async def test_tls_is_well(tls_server: Server, certificates: Certificates) -> None:
    """With all certificates right, TLS is said to be verified."""
    pair = certificates.client
    values = {
        "REDIS_SSL_CA_CERTS": certificates.ca.cert,
        "REDIS_SSL_CERTFILE": pair.cert,
        "REDIS_SSL_KEYFILE": pair.key,
    }
    found = await findings(REDIS_URL=tls_server.url, **values)
    assert ("tls", "ok") in levels(found)
    assert {finding.level for finding in found} == {"ok"}

    unsafe = await the_only(REDIS_URL=f"{tls_server.url}?ssl_cert_reqs=none", **values)
    assert ("tls", "warn") == (unsafe.check, unsafe.level)


async def test_plain_to_a_tls_port(tls_server: Server) -> None:
    """A client without TLS at a port that has it."""
    found = await the_only(REDIS_URL=tls_server.url.replace("rediss", "redis"))

    assert "speaks TLS, and we do not" in found.text
    assert "rediss://" in found.fix


@pytest.mark.parametrize("how", ["rediss", "REDIS_SSL"])
async def test_tls_to_a_plain_port(how: str, private_server: StartServer) -> None:
    """A client with TLS at a port without it."""
    server = private_server()
    values: dict[str, Any] = {"REDIS_URL": server.url.replace("redis:", "rediss:")}
    if how == "REDIS_SSL":
        values = {"REDIS_HOST": server.host, "REDIS_PORT": server.port, "REDIS_SSL": True}
    found = await the_only(**values)

    assert "does not speak TLS, and we do" in found.text


async def test_certificates(tls_server: Server, stranger_server: Server, certificates: Certificates) -> None:
    """An unknown authority, another host's certificate and a missing client certificate are told
    apart.
    """
    unknown = await the_only(REDIS_URL=tls_server.url, REDIS_SSL_CA_CERTS=certificates.other_ca.cert)
    name = await the_only(REDIS_URL=stranger_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert)
    missing = await the_only(REDIS_URL=tls_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert)

    assert "REDIS_SSL_CA_CERTS" in unknown.fix
    assert "ismatch" in name.text
    assert "name that the certificate is made out to" in name.fix
    assert "REDIS_SSL_CERTFILE" in missing.fix
