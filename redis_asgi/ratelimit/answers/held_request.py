"""A request that is in flight under a concurrency limit, where it ends before its app returns."""

from starlette.types import Message, Receive, Send

from ..counting.verdict import Verdict


def until_ended(verdict: Verdict, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """The receive and send of a held request's app, by which *verdict* is released at its end.

    That is when a WebSocket is closed, beside the last part of a body, which settles all of a
    request. The app may go on after that.
    """

    async def receiving() -> Message:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            verdict.release()
        return message

    async def sending(message: Message) -> None:
        await send(message)
        if message["type"] == "websocket.close":
            verdict.release()

    return receiving, sending
