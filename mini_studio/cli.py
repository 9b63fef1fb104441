"""The command line: `mini-studio --help`."""

import asyncio
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from mini_studio.examples import MODEL
from mini_studio.settings import Settings

app = typer.Typer(
    name="mini-studio",
    help="Fine-tune and serve language models, event-driven over Kafka. Start with `mini-studio run`, then `mini-studio demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # help texts flow with the terminal's width
)
models = typer.Typer(help="The base models that fine-tunes start from.", no_args_is_help=True)
events = typer.Typer(help="The event log.", no_args_is_help=True)
app.add_typer(models, name="models")
journal = typer.Typer(
    help="The journal: every event that was ever decided, kept in the record store.", no_args_is_help=True
)
app.add_typer(events, name="events")
app.add_typer(journal, name="journal")
dead_letters = typer.Typer(
    help="Records that a consumer could never handle: look at them, remove the cause, put them back.",
    no_args_is_help=True,
)
app.add_typer(dead_letters, name="dead-letters")
records = typer.Typer(help="The record store: a SQLite file, or a MongoDB.", no_args_is_help=True)
app.add_typer(records, name="records")
keys = typer.Typer(help="API keys of clients.", no_args_is_help=True)
app.add_typer(keys, name="keys")

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="The studio's data folder.", envvar="MINI_STUDIO_DATA", show_default=".studio"),
]


class ConsumerName(StrEnum):
    DATASETS = "datasets"
    TRAINING = "training"
    SERVING = "serving"
    JOBS = "jobs"
    ROUTES = "routes"
    USAGE = "usage"


class Rebuilt(StrEnum):
    DATASETS = "datasets"
    JOBS = "jobs"
    DEPLOYMENTS = "deployments"
    ROUTES = "routes"
    ALL = "all"


class EventSource(StrEnum):
    JOURNAL = "journal"
    TOPICS = "topics"


class LetterState(StrEnum):
    OPEN = "open"
    REDRIVEN = "redriven"
    ALL = "all"


@contextmanager
def failing(hint: str = "", code: int = 2) -> Iterator[None]:
    """What goes wrong inside is told in a line, and ends the command with this exit code."""
    from mini_studio.errors import StudioError

    try:
        yield
    except StudioError as error:
        typer.echo(f"error: {error.message}{hint}", err=True)
        raise typer.Exit(code) from None


def settings_for(data: Path | None, process: str) -> Settings:
    """The settings of the studio in `data`, and logging set up for `process`."""
    if data is not None:
        os.environ["MINI_STUDIO_DATA"] = str(data)
    from mini_studio import logs, variables

    try:
        settings = Settings()
    except ValidationError as error:
        for wrong in error.errors():
            name = variables.PREFIX + "__".join(str(part) for part in wrong["loc"]).upper()
            typer.echo(f"error: {name}: {wrong['msg']}", err=True)
        raise typer.Exit(2) from None
    logs.configure(settings.log, process)
    variables.warn_of_unknown(os.environ)
    return settings


def process_settings(data: Path | None, process: str) -> Settings:
    """The same for a process of the studio, which does not start with what is unsafe in production."""
    settings = settings_for(data, process)
    from mini_studio import production

    try:
        production.check(settings, process)
    except production.UnsafeSettings as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    return settings


def service_settings(data: Path | None, process: str) -> Settings:
    """The same for a process that stays: structlog loads rich if it can, 4 MB that only a person at a terminal uses."""
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
    return process_settings(data, process)


@app.command()
def run(
    data: DataOption = None,
    port: Annotated[int, typer.Option(help="Port of the REST API.", envvar="PORT")] = 8000,
) -> None:
    """Start the whole studio on this machine, in the foreground; Ctrl-C stops all of it."""
    from mini_studio.embedded.launcher import run_studio

    raise typer.Exit(run_studio(data or Path(".studio"), port))


@app.command()
def api(data: DataOption = None) -> None:
    """The REST API and the inference proxy."""
    settings = service_settings(data, "api")
    from api.app import create_app
    from api.server import serve

    serve(create_app(settings), settings)


@app.command()
def gateway(data: DataOption = None) -> None:
    """The inference proxy alone: /inference/infer, /health and /metrics.

    It needs the event log, from which it reads the routes, and no record store. It listens where MINI_STUDIO_API__HOST
    and MINI_STUDIO_API__PORT say. /health answers 503 until the routes have been read once.
    """
    settings = service_settings(data, "gateway")
    from api.gateway.app import create_gateway
    from api.server import serve

    serve(create_gateway(settings), settings)


@app.command()
def consume(
    names: Annotated[list[ConsumerName] | None, typer.Argument(help="Which consumers; all when none is named.")] = None,
    data: DataOption = None,
    health_port: Annotated[
        int | None, typer.Option(help="Serve /health and /metrics here.", envvar="MINI_STUDIO_HEALTH_PORT")
    ] = None,
) -> None:
    """Run one consumer, several, or all of them, each with a group of its own."""
    chosen = [name.value for name in names or list(ConsumerName)]
    settings = service_settings(data, "consumer:" + "+".join(chosen))
    from consumers.app import BrokerReplaced
    from consumers.app import run as run_consumers

    try:
        asyncio.run(run_consumers(chosen, settings, health_port))
    except BrokerReplaced:
        raise typer.Exit(3) from None


@app.command()
def relay(
    data: DataOption = None,
    health_port: Annotated[
        int | None, typer.Option(help="Serve /health and /metrics here.", envvar="MINI_STUDIO_HEALTH_PORT")
    ] = None,
) -> None:
    """Publish what other processes left in their outboxes when they died."""
    settings = service_settings(data, "relay")
    from mini_studio import maintenance

    asyncio.run(maintenance.relay(settings, health_port))


@app.command()
def prepare(data: DataOption = None) -> None:
    """Create what is missing (indexes, topics, bucket) and refill an embedded broker that starts empty from the journal."""
    settings = process_settings(data, "prepare")
    from mini_studio import maintenance

    with failing("; run it again when that is mended"):
        asyncio.run(maintenance.prepare(settings))


@app.command()
def replay(
    projection: Annotated[Rebuilt, typer.Argument(help="Whose records to rebuild.")],
    source: Annotated[
        EventSource,
        typer.Option("--from", help="Read the events from the journal, or from the topics, which are then trusted."),
    ] = EventSource.JOURNAL,
    check: Annotated[bool, typer.Option("--check", help="Compare only: change no record.")] = False,
    data: DataOption = None,
) -> None:
    """Rebuild records from their events, compare them with the live ones, and put right what differs.

    Records are nothing but their events, folded. Every event is folded anew into a shadow beside the live records; these
    are then compared with it one by one. Those that differ are replaced, missing ones are inserted (so a collection that
    was lost comes back), and those that no event explains are named in the counts and left alone. No job is started, no
    model is touched and no event is published; only a route that was repaired goes out to the gateways.

    It may run beside a live studio, and again after it was interrupted. With --check on a live studio, let the consumers
    catch up first: a record that is still behind its events counts as different.

    Exit code: 0 when the live records are (now) what their events make, 1 when not, 2 when it could not be done.

    Examples: `mini-studio replay all --check`, `mini-studio replay jobs --from topics`
    """
    settings = settings_for(data, "replay")
    from mini_studio import replaying

    names = list(replaying.REBUILDABLE) if projection is Rebuilt.ALL else [projection.value]
    from_topics = source is EventSource.TOPICS
    with failing():
        right = asyncio.run(replaying.run(settings, names, topics=from_topics, swap=not check, say=typer.echo))
    raise typer.Exit(0 if right else 1)


@journal.command("refill")
def refill(data: DataOption = None) -> None:
    """Fill a broker that lost its topics, or some of them, from the journal.

    Missing topics are created. Then everything is published that the topics lack of the journal, in its order and with
    ids, sequences, keys and headers unchanged, and last the routes as they are now. What a topic holds already, by the
    event's id, is not published again, so this can be run again after it was interrupted, or to make sure.

    Best before the studio's processes start: a running one publishes what waits in its outboxes at the same time, and
    that may then stand on the log twice, or before older events. The studio's consumers take either; a subscriber that
    keeps only the last sequence may not. For the same reason delete a topic that lost a part in its middle first.

    The embedded broker, which forgets at every stop, is refilled in the same way at every start, without asking.
    """
    settings = settings_for(data, "refill")
    from mini_studio import maintenance

    with failing("; run it again, it goes on where it stopped"):
        done = asyncio.run(
            maintenance.refill_topics(settings, lambda d: typer.echo(f"{d.published:,} published, {d.held:,} held"))
        )
    typer.echo(f"done: {done.published:,} published, {done.held:,} were there")


@records.command("migrate")
def migrate(
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="Where the records are now: a SQLite file, or a MongoDB's URL.",
            envvar="MINI_STUDIO_MIGRATE_FROM",
        ),
    ],
    database: Annotated[str, typer.Option("--from-database", help="The database in that MongoDB.")] = "mini_studio",
    data: DataOption = None,
) -> None:
    """Bring all records from another store into the one that the settings name, and check that they are the same.

    The journal is copied in its order; datasets, jobs, deployments and routes are built anew from it; what consumers decide
    from (training runs, releases, profiles), idempotency keys and usage are copied. Then both stores are read and compared. The
    source is only read. Nothing is published, and no job or model is touched.

    Stop the studio first, API and consumers, when `pending` events have left: a source that has some is refused, and so is a
    target with anything that the source does not have. After an interruption run it again: it goes on where it stopped.
    Then start the studio with the new settings, and the same Kafka.

    Exit code: 0 when the stores hold the same, 1 when they do not, 2 when it could not be done.

    Example, from a file to MongoDB:
    `MINI_STUDIO_RECORDS__MONGO_URL=mongodb://... mini-studio records migrate --from .studio/records.sqlite`
    """
    settings = settings_for(data, "migrate")
    from mini_studio import migrating

    with failing():
        right = asyncio.run(migrating.run(settings, source, database, typer.echo))
    typer.echo("done: the stores hold the same" if right else "not done: the stores differ")
    raise typer.Exit(0 if right else 1)


@keys.command("new")
def new_key(
    client: Annotated[str, typer.Argument(help="Whose key it is: a client code, or `*` for the operator.")],
    data: DataOption = None,
) -> None:
    """Make an API key, and say which setting lets it in. The studio keeps only its digest: the key is shown this once.

    A second key of a client is valid beside its first, until that is taken out of the setting.
    """
    settings = settings_for(data, "keys")
    from api.gateway import identity
    from mini_studio.settings import Api

    key = identity.new_key()
    known = settings.api.keys | {client: [*settings.api.keys.get(client, []), identity.digest(key)]}
    try:
        Api(keys=known)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from None
    typer.echo(f"{key}\n\nGive it to the client, then set this for every API and gateway, and start them again:\n")
    typer.echo(f"MINI_STUDIO_API__KEYS='{json.dumps(known)}'")


@models.command("list")
def list_models(data: DataOption = None) -> None:
    """Base models that a fine-tune can name."""
    settings = settings_for(data, "models")
    from rich.console import Console
    from rich.table import Table

    from mini_studio.drivers.catalogue import ModelCatalogue

    table = Table("name", "parameters", "installed", "description")
    for entry in ModelCatalogue(settings.models).list():
        size = f"{entry.parameters / 1e6:.0f}M" if entry.parameters else "?"
        table.add_row(entry.name, size, "yes" if entry.installed else "on first use", entry.description)
    Console().print(table)


@models.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help="A built-in name, a hub id (org/name), or the name of a local folder.")],
    path: Annotated[Path | None, typer.Option(help="A local folder that transformers can load.")] = None,
    data: DataOption = None,
) -> None:
    """Install a base model: fetch it, or register a local folder under a name."""
    settings = settings_for(data, "models")
    from mini_studio.drivers.catalogue import ModelCatalogue

    with failing(code=1):
        for said in ModelCatalogue(settings.models).add(name, path and path.resolve()):
            typer.echo(said)


@events.command("tail")
def tail(
    data: DataOption = None,
    follow: Annotated[bool, typer.Option(help="Wait for more; else stop at the end.")] = True,
    subject: Annotated[str | None, typer.Option(help="Only events of this job, dataset or deployment.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print the events on the log, from the first one on."""
    settings = settings_for(data, "events")
    from mini_studio import tailing

    with_json = as_json or not sys.stdout.isatty()
    try:
        asyncio.run(tailing.tail(settings, follow=follow, subject=subject, as_json=with_json))
    except (KeyboardInterrupt, BrokenPipeError):
        raise typer.Exit(0) from None


@dead_letters.command("list")
def list_dead_letters(
    data: DataOption = None,
    consumer: Annotated[ConsumerName | None, typer.Option(help="Only this consumer's.")] = None,
    state: Annotated[
        LetterState, typer.Option(help="Open ones wait for you; redriven ones were put back.")
    ] = LetterState.OPEN,
) -> None:
    """Time, state, id and reason of dead letters, newest first.

    A consumer puts aside what no repeat can help: what is not an event, what did not come from this studio, and what its
    handler refuses. It goes on with the records behind it. Outages put nothing aside, they are waited out.
    """
    settings = settings_for(data, "dead-letters")
    from mini_studio import redriving

    asyncio.run(redriving.show_all(settings, consumer and consumer.value, state.value))


@dead_letters.command("show")
def show_dead_letter(
    id: Annotated[str, typer.Argument(help="As `dead-letters list` prints it.")], data: DataOption = None
) -> None:
    """The whole record as it was sent, where it came from, and why it was put aside."""
    settings = settings_for(data, "dead-letters")
    from mini_studio import redriving

    asyncio.run(redriving.show(settings, id))


@dead_letters.command("redrive")
def redrive_dead_letters(
    id: Annotated[str | None, typer.Argument(help="One of them, as `dead-letters list` prints it.")] = None,
    consumer: Annotated[ConsumerName | None, typer.Option(help="All open ones of this consumer.")] = None,
    data: DataOption = None,
) -> None:
    """Put one dead letter, or all of a consumer, back where they came from.

    First remove the cause: deploy the version that knows the event, mend the handler, restore the journal. Only the consumer
    that failed takes the record again; other subscribers see an event they know by its id. One that fails again is a new dead letter.
    """
    if (id is None) == (consumer is None):
        raise typer.BadParameter("name one dead letter by its id, or a consumer: --consumer NAME")
    settings = settings_for(data, "dead-letters")
    from mini_studio import redriving

    if id is not None:
        asyncio.run(redriving.redrive(settings, id))
    elif consumer is not None:
        asyncio.run(redriving.redrive_all(settings, consumer.value))


@app.command()
def demo(
    data: DataOption = None,
    url: Annotated[str | None, typer.Option(help="The studio's URL; by default that of the one in --data.")] = None,
    model: Annotated[str, typer.Option(help="Base model to fine-tune.")] = MODEL,
    client_code: Annotated[
        str, typer.Option(help="The client to act as; by default a new one, to whom only the base model answers.")
    ] = "",
) -> None:
    """Do the main job on a running studio: upload the example, fine-tune, deploy, and ask before and after."""
    settings = settings_for(data, "demo")
    from mini_studio.demo import run as run_demo

    target = url or f"http://{settings.api.host}:{settings.api.port}"
    raise typer.Exit(run_demo(target, model, client_code or f"demo-{secrets.token_hex(3)}"))


def main() -> None:
    """Entry point of `mini-studio`."""
    os.environ.setdefault("COLUMNS", str(shutil.get_terminal_size((110, 40)).columns))
    app()


if __name__ == "__main__":
    main()
