"""The reasons why Redis cannot be used, and what to do about them,
in words for an operator; no password is in them.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from redis.asyncio.connection import parse_url
from redis.exceptions import RedisClusterException, RedisError

from ..connection.client_factory import describe
from ..connection.resolver import names
from ..connection.sentinels import SentinelRefusal
from ..errors import Failure, classify, is_unknown_command
from ..events import REASONS
from ..settings import Settings
from .rights import user_of

# What a client raises when Redis, or the way to it, is at fault.
TROUBLE: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError)
_PROBE_TIMEOUT = 1.0  # seconds
# What OpenSSL says of files, before anything is sent.
_NO_PEM = ("pem lib", "no_certificate_or_crl_found", "no certificate or crl found", "key_values_mismatch")
_CHECK = "Check REDIS_URL, or REDIS_HOST and REDIS_PORT"


@dataclass(frozen=True, slots=True)
class Trouble:
    """A fault, and its cure."""

    text: str
    fix: str


async def explain(error: BaseException, settings: Settings) -> Trouble:
    """The trouble behind *error*, raised by a client of *settings*;
    may ask the port what it speaks.
    """
    # A cluster's client tells of its nodes' trouble in an error of its own.
    error = next((each for each in _chain(error) if classify(each) is not Failure.CLUSTER), error)
    refusal = next((each for each in _chain(error) if isinstance(each, SentinelRefusal)), None)
    if refusal is not None:
        return explain_refusal(refusal.__cause__ or refusal, settings, "the sentinels")
    failure = classify(error)
    where = describe(settings)
    if failure in (Failure.CONNECTION, Failure.TIMEOUT):
        certificate = next((e for e in _chain(error) if isinstance(e, ssl.SSLCertVerificationError)), None)
        if certificate is not None:
            return _bad_certificate(certificate, where)
        return await _unreachable(error, settings, where)
    return _refused(error, failure, settings, where)


def explain_refusal(error: BaseException, settings: Settings, who: str) -> Trouble:
    """The trouble behind *error*, with which one or more sentinels, *who*, refuse us."""
    denied = _denied(error)
    if denied is None:
        return _refused_login(error, who, "REDIS_SENTINEL_USERNAME", "REDIS_SENTINEL_PASSWORD")
    fix = f"On each of them: ACL SETUSER {settings.REDIS_SENTINEL_USERNAME or 'default'} +sentinel|master."
    return Trouble(f"{who} lets us in, but not run {denied}", fix)


def _denied(error: BaseException) -> str | None:
    """The command that an ACL does not allow us."""
    found = re.search(r"run the '([^']+)' command", str(error), re.IGNORECASE)
    return found[1] if found else None


def _refused_login(error: BaseException, who: str, username: str, password: str, others: str = "") -> Trouble:
    text = str(error).lower()
    if "without any password" in text or "no password is set" in text:
        return Trouble(f"{who} has no password, and we send one", f"Unset {password}.")
    if "authentication required" in text or "noauth" in text:
        return Trouble(
            f"{who} wants a password, and we have none", f"Set {password}, and {username} for a user of an ACL."
        )
    return Trouble(f"{who} refuses the user name or the password", f"Check {username} and {password}{others}.")


def _bad_certificate(error: ssl.SSLCertVerificationError, where: str) -> Trouble:
    why = (error.verify_message or "it is not valid").rstrip(".")
    if "mismatch" in why.lower() or "not valid for" in why.lower():
        fix = "Use the name that the certificate is made out to in the address."
    elif "expired" in why.lower():
        fix = "Renew the server's certificate."
    else:
        fix = "Set REDIS_SSL_CA_CERTS to the certificate of the authority that signed it."
    return Trouble(f"the certificate of {where} is refused: {why}", fix)


async def _unreachable(error: BaseException, settings: Settings, where: str) -> Trouble:
    text = " ".join(str(each) for each in _chain(error)).lower()
    if any(isinstance(each, socket.gaierror) for each in _chain(error)):
        return Trouble(f"the host name of {where} cannot be resolved", f"{_CHECK}, and the resolver of this host.")
    if any(isinstance(each, ConnectionRefusedError) for each in _chain(error)):
        return Trouble(f"{where} refuses connections", f"{_CHECK}, and that the server runs and listens there.")
    if any(said in text for said in _NO_PEM):
        fix = "Check REDIS_SSL_CA_CERTS, REDIS_SSL_CERTFILE and REDIS_SSL_KEYFILE, or those in REDIS_URL."
        return Trouble(f"a file for TLS with {where} holds no certificate, or not the key of one", fix)
    if any(isinstance(each, FileNotFoundError | PermissionError) for each in _chain(error)):
        return Trouble(
            f"{where} is no socket we may open", "Check the path in REDIS_URL and who may read and write it."
        )
    if "certificate required" in text or "handshake failure" in text:
        fix = "Set REDIS_SSL_CERTFILE and REDIS_SSL_KEYFILE."
        return Trouble(f"{where} asks for a client certificate", fix)
    encrypted = settings.is_encrypted
    speaks = await _spoken_at(settings)
    if speaks == "full" or "max number of clients" in text:
        return Trouble(f"{where} has no connection left", "Raise its maxclients, or lower REDIS_POOL_SIZE.")
    if speaks == "tls" and not encrypted:
        return Trouble(f"{where} speaks TLS, and we do not", "Use a rediss:// URL, or set REDIS_SSL=true.")
    if speaks == "plain" and encrypted:
        fix = "Use a redis:// URL, leave out REDIS_SSL, or take the port that the server has for TLS."
        return Trouble(f"{where} does not speak TLS, and we do", fix)
    if speaks == "tls" and encrypted and settings.REDIS_SSL_CERTFILE is None and classify(error) is Failure.CONNECTION:
        # Its alert is lost when it closes sooner than we read.
        fix = "If it asks for a client certificate, set REDIS_SSL_CERTFILE and REDIS_SSL_KEYFILE; else see its log."
        return Trouble(f"{where} closes the encrypted connection", fix)
    if classify(error) is Failure.TIMEOUT:
        fix = f"{_CHECK}, firewalls on the way, and that the server is not stopped or overloaded."
        return Trouble(f"{where} does not answer within {settings.REDIS_TIMEOUT:g} s", fix)
    if "[ssl" in text or any(isinstance(each, ssl.SSLError) for each in _chain(error)):
        return Trouble(f"TLS with {where} fails", "Check that both sides have a protocol version in common.")
    return Trouble(f"{where} closes the connection", f"{_CHECK}, and the server's log.")


def _refused(error: BaseException, failure: Failure, settings: Settings, where: str) -> Trouble:
    text = str(error).lower()
    if failure is Failure.AUTH:
        found = _refused_login(error, where, "REDIS_USERNAME", "REDIS_PASSWORD", ", or those in REDIS_URL")
        in_url = settings.REDIS_PASSWORD is None and found.fix == "Unset REDIS_PASSWORD."
        return replace(found, fix="Take the password out of REDIS_URL.") if in_url else found
    if "invalid database" in text or "db index" in text:
        return Trouble(
            f"{where} has no such database", "Set REDIS_DB, or the one in REDIS_URL, below the server's `databases`."
        )
    denied = _denied(error)
    if failure is Failure.PERMISSION and denied:
        fix = f"As an administrator: ACL SETUSER {user_of(settings)} +{denied}. `redis-asgi acl` prints all it takes."
        return Trouble(f"{where} lets us in, but not run {denied}", fix)
    if settings.REDIS_CLUSTER and any(words in text for words in ("not enabled", "disabled", "not allowed")):
        return Trouble(f"{where} is no cluster", "Unset REDIS_CLUSTER.")
    covered = re.search(r"(\d+) of (\d+)", text)
    if failure is Failure.CLUSTER and covered:
        fix = "Bring the missing primaries back, or assign their slots: CLUSTER INFO and CLUSTER SLOTS say which."
        return Trouble(f"only {covered[1]} of {covered[2]} slots of the cluster are covered", fix)
    if failure is Failure.CLUSTER and settings.REDIS_SENTINELS:
        fix = "Check REDIS_SENTINELS and REDIS_SENTINEL_MASTER, and that the sentinels run."
        return Trouble(f"no sentinel knows a {where.removeprefix('sentinel ')} that is up", fix)
    if failure is Failure.CLUSTER:
        fix = "Check the address, that the nodes run, and CLUSTER INFO."
        return Trouble(f"the cluster of {where} does not answer", fix)
    if is_unknown_command(error):
        fix = "Undo the rename-command of its configuration, or choose a server that has it."
        return Trouble(f"{where} does not know a command that it takes", fix)
    answers = {
        Failure.PERMISSION: "lets us in but not do this",
        Failure.READONLY: "takes no writes",
        Failure.LOADING: "is still reading its data from disk",
        Failure.BUSY: "is blocked by somebody's script",
        Failure.OOM: "has no memory left",
    }
    if failure not in answers:
        return Trouble(f"{where} answers with an error ({failure.value})", "Its log may say more.")
    return Trouble(f"{where} {answers[failure]}", REASONS[failure].fix)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """*error* and what it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


async def _spoken_at(settings: Settings) -> Literal["plain", "tls", "full"] | None:
    """The protocol of the port, or that it has no connection left;
    ``None`` where it does not say, or is no port.
    """
    if settings.REDIS_SENTINELS or settings.REDIS_CLUSTER_NODES:
        return None
    url = parse_url(settings.REDIS_URL.get_secret_value()) if settings.REDIS_URL else {}
    if "path" in url:
        return None
    host, port = url.get("host", settings.REDIS_HOST), url.get("port", settings.REDIS_PORT)
    first = await _first_bytes(host, port)
    if b"max number of clients" in first:
        return "full"
    if first[:1] in (b"+", b"-"):
        return "plain"
    # Only to learn whether it is TLS at all: nothing is sent that matters.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            _, writer = await names().reach(
                host, lambda address: asyncio.open_connection(address, port, ssl=context, server_hostname=host)
            )
    except ssl.SSLError as error:
        return "tls" if "alert" in str(error).lower() else None
    except OSError:
        return None
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return "tls"


async def _first_bytes(host: str, port: int) -> bytes:
    """The port's answer to a PING in the clear."""
    writer = None
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            reader, writer = await names().reach(host, lambda address: asyncio.open_connection(address, port))
            writer.write(b"PING\r\n")
            return await reader.read(64)
    except OSError:
        return b""
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
