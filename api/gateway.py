"""The gateway: what proxies requests to the models, in the API's process and in processes of its own.

It knows the routes from the log alone, so it starts and serves while the record store is away.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version

import httpx
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api import errors, infer
from api.deps import Feed, Routes
from api.holding import Holding
from api.load import Load
from api.requests import RequestContext
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.settings import Settings
from mini_studio.wiring import broker_epoch, ended

MAX_CONNECTIONS = 1000
FIRST_ROUTES_S = 3.0
KEEP_IDLE_S = 2.0
"""Well below the 5 s after which uvicorn, our model servers' and vLLM's, closes an idle connection: it must not do so under a request."""


def create_gateway(settings: Settings) -> FastAPI:
    """The application of a gateway that is nothing else."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with proxying(app, settings):
            app.state.leave = app.state.holding.leave
            yield

    app = FastAPI(
        title="Mini Studio gateway",
        version=version("mini-studio"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    surround(app, settings)
    app.include_router(infer.router)
    app.add_api_route("/", welcome)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics, response_class=Response)
    return app


def surround(app: FastAPI, settings: Settings) -> None:
    """What every request goes through, and how every failure is answered."""
    app.add_middleware(RequestContext, max_body_bytes=settings.api.max_body_bytes)
    errors.install(app)


@contextlib.asynccontextmanager
async def proxying(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """What the proxy needs, in the application's state: the routes, kept up to date, and a client for the models."""
    timeout = httpx.Timeout(settings.api.upstream_read_s, connect=settings.api.upstream_connect_s, pool=5.0)
    # Behind a Service of Kubernetes a connection that is kept would stay with its pod, and a new replica would have no request.
    kept = 0 if settings.serving.driver == "kubernetes" else MAX_CONNECTIONS
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=kept, keepalive_expiry=KEEP_IDLE_S)
    # Only connecting is tried twice: a busy process may itself have let the time for it pass.
    transport = httpx.AsyncHTTPTransport(limits=limits, retries=1, trust_env=False)
    # One client serves every tenant: a cookie it kept would go to the next one's model.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    app.state.routes = RouteTable()
    app.state.feed = RouteFeed(settings.kafka, app.state.routes, lambda: broker_epoch(settings))
    app.state.holding, app.state.load = Holding(app.state.routes, settings.api), Load()
    async with httpx.AsyncClient(timeout=timeout, transport=transport, cookies=no_cookies, trust_env=False) as upstream:
        app.state.upstream = upstream
        feeding = asyncio.create_task(app.state.feed.run())
        # A restart must not answer a model's callers that it knows none.
        await app.state.feed.read_until(lambda table: table.loaded, FIRST_ROUTES_S)
        yield
        await ended(feeding)


async def welcome() -> dict[str, object]:
    """What this is."""
    return {"ok": True, "message": "Mini Studio gateway", "infer": "/inference/infer/{model_name}", "health": "/health"}


async def health(routes: Routes, feed: Feed) -> JSONResponse:
    """`starting` (503) until the routes have been read once; then `ok`, or `degraded`: it goes on with those it has."""
    problems = routes_problem(routes, feed)
    status = ("degraded" if problems else "ok") if routes.loaded else "starting"
    content = {"ok": routes.loaded, "status": status, "problems": problems}
    return JSONResponse(content, 200 if routes.loaded else 503)


def routes_problem(routes: RouteTable, feed: RouteFeed) -> dict[str, str]:
    if feed.problem or not routes.loaded:
        return {"routes": feed.problem or "the routes are still being read"}
    return {}


async def metrics() -> Response:
    """Prometheus metrics of this process."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
