"""The proxy that most people write: FastAPI and httpx. `UPSTREAM=http://... uvicorn benchmarks.proxies.fastapi_httpx:app`."""

import contextlib
import os
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

UPSTREAM = os.environ["UPSTREAM"]


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/inference/infer/{model}")
async def infer(model: str, request: Request) -> StreamingResponse:
    client: httpx.AsyncClient = request.app.state.client
    content = await request.body()
    upstream = client.build_request(
        "POST", UPSTREAM + "/predict", content=content, headers={"content-type": "application/json"}
    )
    answer = await client.send(upstream, stream=True)
    kept = {name: value for name, value in answer.headers.items() if name in ("content-type", "content-length")}
    return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))
