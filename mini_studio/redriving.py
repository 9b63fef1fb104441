"""Shows dead letters in a terminal, and puts them back."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import typer

from mini_studio.bus.dead_letters import DeadLetter, DeadLetters, State
from mini_studio.bus.kafka import Publisher, all_left
from mini_studio.errors import StudioError
from mini_studio.settings import Settings

T = TypeVar("T")
MANY = 1000


async def _with(settings: Settings, do: Callable[[DeadLetters], Awaitable[T]]) -> T:
    async with Publisher(settings.kafka) as publisher:
        try:
            return await do(DeadLetters(settings.kafka, publisher))
        except StudioError as error:
            typer.echo(f"error: {error.message}", err=True)
            raise typer.Exit(1) from None
        finally:
            await all_left()


async def show_all(settings: Settings, consumer: str | None, state: State) -> None:
    """One line each, newest first."""
    letters = await _with(settings, lambda all: all.page(consumer=consumer, state=state, limit=MANY))
    for letter in letters:
        typer.echo(f"{letter.time}  {'redriven' if letter.redriven else 'open':8}  {letter.id}  {letter.reason}")
    if not letters:
        typer.echo(f"no dead letters ({state})", err=True)


async def show(settings: Settings, id: str) -> None:
    """Everything of one."""
    letter = await _with(settings, lambda all: all.get(id))
    typer.echo(f"id        {letter.id} ({'redriven' if letter.redriven else 'open'})")
    typer.echo(f"reason    {letter.reason}")
    typer.echo(
        f"came from {letter.topic}, partition {letter.partition}, offset {letter.offset}; put aside {letter.time}"
    )
    typer.echo(f"key       {readable(letter.key)}")
    for name, value in letter.headers:
        typer.echo(f"header    {name}: {readable(value)}")
    typer.echo(f"value     {letter.size} bytes")
    typer.echo(readable(letter.value))


async def redrive(settings: Settings, id: str) -> None:
    letter: DeadLetter = await _with(settings, lambda all: all.redrive(id))
    typer.echo(f"put back for consumer {letter.consumer}: {letter.id}")


async def redrive_all(settings: Settings, consumer: str) -> None:
    count = await _with(settings, lambda all: all.redrive_all(consumer))
    typer.echo(f"put back for consumer {consumer}: {count}")


def readable(data: bytes | None) -> str:
    """Text as it is, other bytes as Python writes them."""
    if data is None:
        return "(null)"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return repr(data)
