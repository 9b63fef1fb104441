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

from api import errors
from api.deps import Feed, Routes
from api.gateway import infer
from api.gateway.exchange import Exchanger
from api.gateway.identity import Identity
from api.gateway.protocol import FastGateway
from api.gateway.proxy import Plain
from api.gateway.replicas import follow
from api.openai import models
from api.requests import RequestContext
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.bus.wakeups import WakeUps
from mini_studio.settings import Settings
from mini_studio.wiring import broker_epoch, ended

FIRST_ROUTES_S = 3.0


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
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    surround(app, settings)
    app.include_router(infer.router)
    app.include_router(models.router)
    app.include_router(infer.openai)
    app.add_api_route("/", welcome)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics, response_class=Response)
    return app


def surround(app: FastAPI, settings: Settings) -> None:
    """What every request goes through, and how every failure is answered."""
    app.add_middleware(RequestContext, max_body_bytes=settings.api.max_body_bytes, identity=Identity(settings))
    errors.install(app)


@contextlib.asynccontextmanager
async def proxying(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """What the proxy needs, in the application's state: the routes, kept up to date, and a client for the models."""
    app.state.routes = RouteTable()
    app.state.feed = RouteFeed(settings.kafka, app.state.routes, lambda: broker_epoch(settings))
    wake_ups = WakeUps(settings.kafka)
    exchanger = Exchanger(settings, app.state.routes, wake_ups.publish)
    app.state.exchanger = exchanger
    app.state.holding, app.state.load = exchanger.holding, exchanger.load
    # Behind a Service of Kubernetes a connection that is kept would stay with its pod, and a new replica would have no request.
    keep = settings.serving.driver != "kubernetes"
    async with plain_client(settings) as client, fast_gateway(app, exchanger, keep=keep):
        app.state.plain = Plain(client, settings.gateway)
        feeding = asyncio.create_task(app.state.feed.run())
        recording = asyncio.create_task(exchanger.usage.run())
        forgetting = asyncio.create_task(follow(exchanger.replicas, app.state.routes))
        telling = asyncio.create_task(wake_ups.run())
        # A restart must not answer a model's callers that it knows none.
        await app.state.feed.read_until(lambda table: table.loaded, FIRST_ROUTES_S)
        yield
        await ended(feeding)
        await ended(telling)
        await ended(forgetting)
        await ended(recording)
        await exchanger.usage.aclose()


@contextlib.asynccontextmanager
async def fast_gateway(app: FastAPI, exchanger: Exchanger, *, keep: bool) -> AsyncIterator[None]:
    """What `api.server`'s protocol looks for, if the fast client is the chosen one."""
    if exchanger.settings.client == "plain":
        yield
        return
    fast = app.state.fast = FastGateway(exchanger, keep=keep)
    try:
        yield
    finally:
        fast.pool.close()


def plain_client(settings: Settings) -> httpx.AsyncClient:
    """httpx as the plain client has it; what httpx cannot time is timed around it.

    It keeps no connection: bytes that a model server sends beyond its answer would be the beginning of the next client's.
    """
    timeout = httpx.Timeout(None, connect=settings.gateway.connect_s)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
    # One client serves every tenant: a cookie it kept would go to the next one's model.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    return httpx.AsyncClient(timeout=timeout, transport=transport, cookies=no_cookies, trust_env=False)


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
