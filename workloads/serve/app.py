"""The HTTP front of the engine, in OpenAI's shapes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from workloads.serve.engine import Answer, Engine
from workloads.serve.errors import BadInput
from workloads.serve.payload import Payload, parse

MAX_BODY = 16 * 1024 * 1024


class Server:
    """The application; `engine` is set once the model is loaded."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.engine: Engine | None = None
        self.created = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/predict", self.predict, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            exception_handlers={BadInput: bad_input, Exception: surprise},
        )

    async def health(self, request: Request) -> Response:
        if self.engine is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        entry = {"id": self.model, "object": "model", "created": self.created, "owned_by": "mini-studio"}
        return JSONResponse({"object": "list", "data": [entry], "has_more": False})

    async def metrics(self, request: Request) -> Response:
        """Names as vLLM's, so the same autoscaling rules read both."""
        engine = self.engine
        values = {
            ("num_requests_running", "gauge"): engine.running if engine else 0,
            ("num_requests_waiting", "gauge"): engine.waiting if engine else 0,
            ("prompt_tokens_total", "counter"): engine.prompt_tokens if engine else 0,
            ("generation_tokens_total", "counter"): engine.generation_tokens if engine else 0,
            ("request_success_total", "counter"): engine.finished if engine else 0,
        }
        label = json.dumps(self.model)
        lines = [
            f"# TYPE vllm:{n} {kind}\nvllm:{n}{{model_name={label}}} {value}" for (n, kind), value in values.items()
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def predict(self, request: Request) -> Response:
        return await self._answer(request, None)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, True)

    async def _answer(self, request: Request, chat: bool | None) -> Response:
        if self.engine is None:
            raise BadInput("the model is still loading; try again shortly", status=503, code="loading")
        payload = parse(await read(request), self.model, chat=chat)
        if payload.messages is not None:
            prompts = [self.engine.encode_chat(payload.messages)]
        else:
            prompts = [self.engine.encode_prompt(prompt) for prompt in payload.prompts]
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers += [self.engine.submit(prompt, payload.sampling.nth(index)) for index in range(payload.n)]
        except BadInput:
            cancel(answers)
            raise
        shape = Shape(self.model, payload, sum(map(len, prompts)))
        if payload.stream:
            return StreamingResponse(
                stream(answers, shape), media_type="text/event-stream", background=BackgroundTask(cancel, answers)
            )
        return await whole(request, answers, shape)


class Shape:
    """How pieces look as chat or completion objects."""

    def __init__(self, model: str, payload: Payload, prompt_tokens: int) -> None:
        self.chat = payload.messages is not None
        self.include_usage = payload.include_usage
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, generated: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    def whole(self, texts: list[tuple[str, str | None]], generated: int) -> dict[str, Any]:
        def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
            body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            return {"index": index, **body, "logprobs": None, "finish_reason": reason}

        choices = [choice(index, text, reason) for index, (text, reason) in enumerate(texts)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage(generated)}

    def chunk(self, index: int, text: str | None, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            body: dict[str, Any] = {"delta": {**delta, "content": text or ""} if text or first else delta}
        else:
            body = {"text": text or ""}
        choice = {"index": index, **body, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def last(self, generated: int) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage(generated)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


async def whole(request: Request, answers: list[Answer], shape: Shape) -> Response:
    """Wait for all answers; a client that hangs up ends them."""
    gone: asyncio.Future[Any] = asyncio.create_task(hung_up(request))
    collecting: asyncio.Future[Any] = asyncio.gather(*(collect(answer) for answer in answers))
    try:
        await asyncio.wait([gone, collecting], return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)
        parts = collecting.result()
        return JSONResponse(shape.whole([(text, reason) for text, reason, _ in parts], sum(n for *_, n in parts)))
    finally:
        gone.cancel()
        collecting.cancel()
        cancel(answers)


async def collect(answer: Answer) -> tuple[str, str | None, int]:
    texts = []
    while True:
        piece = await answer.next()
        texts.append(piece.text)
        if piece.finish_reason:
            return "".join(texts), piece.finish_reason, piece.tokens


async def hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(answers: list[Answer], shape: Shape) -> AsyncIterator[bytes]:
    """Server-sent events of all answers, as they come."""
    merged: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(maxsize=64)
    generated = [0] * len(answers)

    async def follow(index: int, answer: Answer) -> None:
        try:
            await merged.put(shape.chunk(index, None, None, first=True))
            while True:
                piece = await answer.next()
                generated[index] = piece.tokens
                if piece.text:
                    await merged.put(shape.chunk(index, piece.text, None))
                if piece.finish_reason:
                    await merged.put(shape.chunk(index, None, piece.finish_reason))
                    break
        except Exception as error:
            await merged.put(error)
        await merged.put(None)

    tasks = [asyncio.create_task(follow(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            event = await merged.get()
            if event is None:
                left -= 1
            elif isinstance(event, Exception):
                yield sse({"error": {"message": str(event), "type": "server_error", "param": None, "code": None}})
            else:
                yield sse(event)
        if shape.include_usage:
            yield sse(shape.last(sum(generated)))
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        cancel(answers)


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


def cancel(answers: list[Answer]) -> None:
    for answer in answers:
        answer.cancel()


async def read(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise BadInput(f"the body is larger than {MAX_BODY} bytes", status=413)
    except ClientDisconnect:
        raise BadInput("the client hung up") from None
    return bytes(body)


async def bad_input(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadInput)  # noqa: S101
    headers = {"Retry-After": "2"} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers=headers)


async def surprise(request: Request, error: Exception) -> Response:
    return JSONResponse(BadInput(f"the model server failed: {error}", status=500).body(), 500)
