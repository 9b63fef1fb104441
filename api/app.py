"""The REST application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version

import httpx
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api import admin, errors, fine_tuning, inference
from api.deps import Feed, Routes, TheStudio
from api.requests import RequestContext
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.settings import Settings
from mini_studio.wiring import DECIDED_BY, ended, open_studio

MAX_CONNECTIONS = 1000
FIRST_ROUTES_S = 3.0
KEEP_IDLE_S = 2.0
"""Well below the 5 s after which uvicorn, our model servers' and vLLM's, closes an idle connection: it must not do so under a request."""


def create_app(settings: Settings) -> FastAPI:
    """The application; its parts open when it starts and close when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        timeout = httpx.Timeout(settings.api.upstream_read_s, connect=settings.api.upstream_connect_s, pool=5.0)
        limits = httpx.Limits(
            max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS, keepalive_expiry=KEEP_IDLE_S
        )
        # Only connecting is tried twice: a busy process may itself have let the time for it pass.
        transport = httpx.AsyncHTTPTransport(limits=limits, retries=1, trust_env=False)
        # One client serves every tenant: a cookie it kept would go to the next one's model.
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        async with (
            open_studio(settings, relayed=DECIDED_BY["api"]) as studio,
            httpx.AsyncClient(timeout=timeout, transport=transport, cookies=no_cookies, trust_env=False) as upstream,
        ):
            app.state.studio, app.state.upstream, app.state.routes = studio, upstream, RouteTable()
            app.state.feed = RouteFeed(settings.kafka, app.state.routes, studio.broker_epoch)
            feeding = asyncio.create_task(app.state.feed.run())
            # A restart must not answer a model's callers that it knows none.
            await app.state.feed.read_until(lambda table: table.loaded, FIRST_ROUTES_S)
            yield
            await ended(feeding)

    app = FastAPI(
        title="Mini Studio",
        version=version("mini-studio"),
        summary="Self-hosted fine-tuning and serving of language models, event-driven over Kafka.",
        lifespan=lifespan,
    )
    app.add_middleware(RequestContext, max_body_bytes=settings.api.max_body_bytes)
    errors.install(app)
    app.include_router(fine_tuning.router)
    app.include_router(inference.router)
    app.include_router(admin.router)
    app.add_api_route("/", welcome, tags=["studio"])
    app.add_api_route("/health", health, tags=["studio"])
    app.add_api_route("/metrics", metrics, tags=["studio"], response_class=Response)
    return app


async def welcome() -> dict[str, object]:
    """Where to go next."""
    return {"ok": True, "message": "Welcome to Mini Studio", "docs": "/docs", "health": "/health"}


async def health(studio: TheStudio, routes: Routes, feed: Feed) -> JSONResponse:
    """`ok`, or `degraded` with the reasons: requests are accepted all the same."""
    problems: dict[str, str] = {}
    if studio.relay.problem:
        problems["relay"] = studio.relay.problem
    if feed.problem or not routes.loaded:
        problems["routes"] = feed.problem or "the routes are still being read"
    try:
        await studio.store.read_journal(limit=1)
        await studio.store.journal([])  # a write of nothing needs the lock all the same
    except Exception as error:
        problems["records"] = str(error)
    status = "degraded" if problems else "ok"
    return JSONResponse({"ok": True, "status": status, "problems": problems})


async def metrics() -> Response:
    """Prometheus metrics of this process."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
