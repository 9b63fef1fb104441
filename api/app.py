"""The REST application."""

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from api import admin, fine_tuning, inference, usage
from api.deps import Feed, Routes, TheStudio
from api.gateway import app as gateway
from api.gateway import infer
from api.openai import files, models
from api.openai import fine_tuning as openai_jobs
from mini_studio.settings import Settings
from mini_studio.wiring import DECIDED_BY, open_studio


def create_app(settings: Settings) -> FastAPI:
    """The application; its parts open when it starts and close when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_studio(settings, relayed=DECIDED_BY["api"]) as studio, gateway.proxying(app, settings):
            app.state.studio = studio

            def leave() -> None:
                studio.leaving = True
                app.state.holding.leave()

            app.state.leave = leave
            yield

    app = FastAPI(
        title="Mini Studio",
        version=version("mini-studio"),
        summary="Self-hosted fine-tuning and serving of language models, event-driven over Kafka.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    gateway.surround(app, settings)
    app.include_router(fine_tuning.router)
    app.include_router(inference.router)
    app.include_router(infer.router)
    for dialect in (models.router, models.removing, files.router, openai_jobs.router):
        app.include_router(dialect)
    app.include_router(infer.openai)
    app.include_router(usage.router)
    app.include_router(admin.router)
    app.add_api_route("/", welcome, tags=["studio"])
    app.add_api_route("/health", health, tags=["studio"])
    app.add_api_route("/metrics", gateway.metrics, tags=["studio"], response_class=Response)
    return app


async def welcome() -> dict[str, object]:
    """Where to go next."""
    return {"ok": True, "message": "Welcome to Mini Studio", "docs": "/docs", "health": "/health"}


async def health(studio: TheStudio, routes: Routes, feed: Feed) -> JSONResponse:
    """`ok`, or `degraded` with the reasons: requests are accepted all the same."""
    problems = gateway.routes_problem(routes, feed)
    if studio.relay.problem:
        problems["relay"] = studio.relay.problem
    try:
        await studio.store.read_journal(limit=1)
        await studio.store.journal([])  # a write of nothing needs the lock all the same
    except Exception as error:
        problems["records"] = str(error)
    status = "degraded" if problems else "ok"
    return JSONResponse({"ok": True, "status": status, "problems": problems})
