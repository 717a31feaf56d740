"""A request that is in flight under a concurrency limit, where it ends before its app returns."""

from starlette.types import Message, Receive, Send

from ..counting.verdict import Verdict

# What ends a request beside the last part of its body, which settles it.
_ENDS = frozenset(("http.response.pathsend", "websocket.close"))


def until_ended(verdict: Verdict, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """The receive and send of a held request's app, by which *verdict* is released at its end.

    The app may go on after that, with background tasks or with what it does when a WebSocket is
    closed.
    """

    async def receiving() -> Message:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            verdict.release()
        return message

    async def sending(message: Message) -> None:
        await send(message)
        if message["type"] in _ENDS:
            verdict.release()

    return receiving, sending
