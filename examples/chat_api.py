r"""A chat endpoint that streams, limited as model providers limit theirs: requests,
tokens, and streams in flight.

Each key has 20 requests and 4,000 tokens a minute for each kind of model, and two streams at a
time::

    python examples/chat_api.py
    curl -N -H 'Authorization: Bearer ada' -H 'Content-Type: application/json' \
        -d '{"model": "tiny-1", "stream": true, "messages": [{"role": "user", "content": "Tell me a story"}]}' \
        http://127.0.0.1:8000/v1/chat/completions
    curl -i -H 'Authorization: Bearer ada' -H 'Content-Type: application/json' \
        -d '{"model": "tiny-1", "max_tokens": 10, "messages": [{"role": "user", "content": "Hello"}]}' \
        http://127.0.0.1:8000/v1/messages

Clients of OpenAI and Anthropic understand the refusals:
`OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="ada")`.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from redis_asgi import RateLimitMiddleware, Rule, Settings, by_header, by_json, tokens

SETTINGS = Settings(**({} if Settings().names_redis else {"REDIS_URL": "memory://"}))
KEY = by_header("authorization")
# What is no model of ours shares one bucket,
# so that nobody gets a fresh counter by making up a name.
MODEL = by_json("model", {"tiny-*": "small", "grand-*": "large"})
PACE = float(os.environ.get("SECONDS_PER_WORD", "0.02"))  # of the fake model below

RULES = [
    Rule("20/minute", name="requests", paths="/v1/*", partition_by=[KEY, MODEL]),
    Rule("4000/minute", name="tokens", paths="/v1/*", partition_by=[KEY, MODEL], cost=tokens()),
    Rule(concurrency=2, name="streams", paths="/v1/*", partition_by=KEY),
]
app = FastAPI()
app.add_middleware(
    RateLimitMiddleware,
    rules=RULES,
    dialect={"/v1/messages": "anthropic", "/v1/*": "openai"},
    settings=SETTINGS,
)


async def words(asked: dict[str, Any]) -> AsyncIterator[str]:
    """A model in place of yours: it says what it was told, word by word."""
    said = " ".join(str(message["content"]) for message in asked["messages"])
    for word in said.split()[: asked.get("max_tokens") or 1000]:
        await asyncio.sleep(PACE)
        yield word + " "


def used(asked: dict[str, Any], answer: str) -> tuple[int, int]:
    """Tokens of the question and of the answer; a word is one here."""
    return sum(len(str(message["content"]).split()) for message in asked["messages"]), len(answer.split())


async def chunks(asked: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a streamed chat completion; the last one says what it has used."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": int(time.time()), "model": asked["model"]}
    answer = ""
    async for word in words(asked):
        answer += word
        choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
        yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    stop = {"index": 0, "delta": {}, "finish_reason": "stop"}
    yield f"data: {json.dumps({**head, 'choices': [stop]})}\n\n"
    prompt, completion = used(asked, answer)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    asked = await request.json()
    if asked.get("stream"):
        return StreamingResponse(chunks(asked), media_type="text/event-stream")
    answer = "".join([word async for word in words(asked)])
    prompt, completion = used(asked, answer)
    message = {"role": "assistant", "content": answer}
    return JSONResponse(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }
    )


@app.post("/v1/messages")
async def messages(request: Request) -> Response:
    asked = await request.json()
    answer = "".join([word async for word in words(asked)])
    prompt, completion = used(asked, answer)
    return JSONResponse(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": asked["model"],
            "content": [{"type": "text", "text": answer}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": prompt, "output_tokens": completion},
        }
    )


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
