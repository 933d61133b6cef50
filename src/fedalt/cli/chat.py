"""`fedalt chat`: a client's own model, the shared part and the base model side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.client import Model, Round
from fedalt.cli.output import console, hush_libraries, note
from fedalt.cli.typed import next_lines
from fedalt.core.foreign import shown, shown_lines

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from fedalt.methods.contract import Serving
    from fedalt.models.base import Base
    from fedalt.runs.answers import Served

_ROOM = 24  # columns of an answer beside others
HINT = "a question, /client NAME or /quit; an empty line ends"
# From all weight on the other adapters to all of it on the first: blue over white to orange.
_COLD, _EVEN, _WARM = (96, 165, 250), (245, 245, 244), (251, 146, 60)


def chat(
    path: Model,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="ID", help="A client of the run; without it, a list."),
    ] = None,
    round_: Round = None,
) -> None:
    """Ask a client's own model, the shared part and the base model the same questions.

    Where a mixer or router weighs the adapters, prompt and answer show how much of the own adapter
    is in each token.
    """
    hush_libraries()
    from fedalt.flower.client_model import client_at, clients_of
    from fedalt.runs.folder import StoreError
    from fedalt.runs.record import require_clients

    out = console()
    clients = clients_of(path)
    if client_at(path) is None:
        require_clients(path)
    elif client is None:
        (client,) = clients
    client = client or _choose(out, clients)
    if client is None:
        return
    members = _members(path, client, round_)
    note(f"{client}: {HINT}")
    for line in next_lines("> "):
        command, _, name = line.partition(" ")
        if command == "/quit":
            return
        if command == "/client":
            try:
                members = _members(path, name.strip(), round_, members.base)
                note(f"{name.strip()}: {HINT}")
            except StoreError as error:  # a slip of the finger does not end a conversation
                note(str(error))
        elif command.startswith("/"):
            note(f"there is no {command}; {HINT}")
        else:
            colours = out.color_system is not None and not out.no_color
            for part in _answered(members, line, colours=colours, width=out.width):
                out.print(part)


@dataclass(frozen=True)
class _Members:
    """Who answers: a client's own model and, if there is one, the shared part; then the base."""

    base: "Base"
    own: "Served"
    shared: "Served | None"


def _members(path: Path, client: str, round_: int | None, base: "Base | None" = None) -> _Members:
    """Raises StoreError for a client that the run does not have, DataError for a classifier's."""
    from fedalt.flower.client_model import served
    from fedalt.runs.answers import prompt_of
    from fedalt.runs.folder import StoreError

    own = served(path, client, "own", round_, base)
    prompt_of(own, "")
    base = own.parts.base
    try:
        return _Members(base, own, served(path, client, "shared", round_, base))
    except StoreError:  # the method shares nothing
        return _Members(base, own, None)


def _answered(
    members: _Members, text: str, *, colours: bool, width: int
) -> "Iterator[RenderableType]":
    """All answers side by side and, where tokens are weighed, the weights in the client's own.

    On a terminal of few columns the answers stand one below the other.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from fedalt.data.answers import ids_of
    from fedalt.engine.example_log import pieces
    from fedalt.evaluation import generate
    from fedalt.evaluation.gate_statistics import weights_of
    from fedalt.runs.answers import prompt_of

    own, scoring = members.own, members.own.parts.settings.scoring
    prompt = prompt_of(own, text)
    servings: dict[str, Serving | None] = {"own": own.serving}
    if members.shared is not None:
        servings["shared part"] = members.shared.serving
    servings["base model"] = None
    texts = {}
    for name, serving in servings.items():
        (texts[name],) = generate(members.base, serving, [prompt], scoring)
    answers = {name: Text(shown_lines(text), overflow="fold") for name, text in texts.items()}
    if width >= _ROOM * len(servings):
        table = Table(expand=True)
        for name in servings:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*answers.values())
        yield table
    else:
        for name, answered in answers.items():
            yield Text(f"{name}:", style="bold")
            yield Padding(answered, (0, 0, 0, 2))
    if own.serving.plan.gate is None:
        return
    answer = ids_of(texts["own"], members.base.tokenizer)
    ids = (*prompt, *answer)[: members.base.positions]
    weights = weights_of(members.base, own.serving, ids)
    if weights is None:
        return
    shown = zip(pieces(members.base.tokenizer, ids), weights[:, 0].tolist(), strict=True)
    yield Text(f"weight of {own.serving.plan.slots[0].name}, the mean over sites: ") + (
        _legend() if colours else Text("percent behind each token")
    )
    yield Text("").join(_token(text, weight, colours=colours) for text, weight in shown)


def _token(text: str, weight: float, *, colours: bool) -> "Text":
    """A token on the colour of its weight, or with its weight behind it."""
    from rich.text import Text

    text = shown_lines(text)
    if colours:
        return Text(text, style=f"black on {_colour(weight)}")
    body = text.rstrip()
    return Text(f"{body}[{weight:.0%}]{text[len(body) :]}" if body else text)


def _legend() -> "Text":
    from rich.text import Text

    steps = (0.0, 0.25, 0.5, 0.75, 1.0)
    return Text("").join(Text(f" {at:.0%} ", style=f"black on {_colour(at)}") for at in steps)


def _colour(weight: float) -> str:
    """Blue for 0 over white to orange for 1."""
    far = abs(2 * weight - 1)
    end = _WARM if weight > 0.5 else _COLD
    mixed = (round(e * far + m * (1 - far)) for e, m in zip(end, _EVEN, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _choose(out: "Console", clients: Sequence[str]) -> str | None:
    """The client whose number or name is typed; None after an empty line."""
    for number, name in enumerate(clients, 1):
        out.print(f"{number:4}  {shown(name)}", soft_wrap=True)
    for line in next_lines("client: "):
        if line in clients:
            return line
        if line.isdecimal() and 0 < int(line) <= len(clients):
            return clients[int(line) - 1]
        note(f"{line!r} is neither a client nor a number of 1 to {len(clients)}")
    return None
