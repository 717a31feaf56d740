"""A certificate authority for one test run, made by the ``openssl`` binary."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, as paths of PEM files."""

    cert: str
    key: str


@dataclass(frozen=True, slots=True)
class Certificates:
    """Everything a TLS test needs.

    Attributes:
        ca: The authority that signed the rest.
        server: For ``localhost`` and ``127.0.0.1``.
        stranger: A server's, signed by the same authority for a name we do not connect to.
        client: A client's.
        other_ca: An authority that signed none of them.
    """

    ca: Pair
    server: Pair
    stranger: Pair
    client: Pair
    other_ca: Pair

    def server_arguments(self, pair: Pair) -> tuple[str, ...]:
        """What makes a server speak TLS only, as *pair*, and ask its clients for certificates."""
        where = ("--port", "0", "--tls-port", "{port}", "--tls-ca-cert-file", self.ca.cert)
        return (*where, "--tls-cert-file", pair.cert, "--tls-key-file", pair.key)

    def client_options(self) -> dict[str, Any]:
        """What a client of ``redis`` needs that looks at such a server from outside."""
        return {
            "ssl_ca_certs": self.ca.cert,
            "ssl_check_hostname": False,
            "ssl_certfile": self.client.cert,
            "ssl_keyfile": self.client.key,
        }

    def settings(self) -> dict[str, Any]:
        """What the package needs."""
        return {
            "REDIS_SSL": True,
            "REDIS_SSL_CA_CERTS": self.ca.cert,
            "REDIS_SSL_CERTFILE": self.client.cert,
            "REDIS_SSL_KEYFILE": self.client.key,
        }

    @classmethod
    def make(cls, folder: Path) -> "Certificates":
        """Write all of them into *folder*; needs the ``openssl`` binary."""
        ca = _authority(folder, "ca")
        return cls(
            ca=ca,
            server=_signed(folder, "server", ca, "DNS:localhost,IP:127.0.0.1"),
            stranger=_signed(folder, "stranger", ca, "DNS:elsewhere.test"),
            client=_signed(folder, "client", ca, "DNS:client.test"),
            other_ca=_authority(folder, "other-ca"),
        )


def _authority(folder: Path, name: str) -> Pair:
    pair = Pair(str(folder / f"{name}.crt"), str(folder / f"{name}.key"))
    extensions = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    _openssl(
        *("req", "-x509", *_KEY, "-keyout", pair.key, "-out", pair.cert, "-days", "2"),
        *("-subj", f"/CN=redis-asgi test {name}", *extensions),
    )
    return pair


def _signed(folder: Path, name: str, ca: Pair, names: str) -> Pair:
    pair = Pair(str(folder / f"{name}.crt"), str(folder / f"{name}.key"))
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
    _openssl("req", *_KEY, "-keyout", pair.key, "-out", str(request), "-subj", f"/CN={name}")
    _openssl(
        *("x509", "-req", "-in", str(request), "-CA", ca.cert, "-CAkey", ca.key, "-CAcreateserial"),
        *("-out", pair.cert, "-days", "2", "-extfile", str(extensions)),
    )
    return pair


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
