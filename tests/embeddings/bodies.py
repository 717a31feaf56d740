"""Bodies that are sent as they are, and apps that say what they got."""

import gzip

from starlette.types import ASGIApp, Receive, Scope, Send

from ..kit.embedding_apps import read, respond

JSON = {"content-type": "application/json"}


# 10 MB in 10 kB, as often behind itself as one likes:
# what gzip unpacks is what all its members held.
ZEROS = gzip.compress(bytes(10**7), 9)


def echo(seen: list[bytes]) -> ASGIApp:
    """An app that keeps the bytes it got and answers 400, as most do to nonsense."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await read(receive))
        await respond(send, b'{"error":"bad"}', 400)

    return app
