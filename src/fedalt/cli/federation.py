"""`fedalt federation`, `fedalt server`, `fedalt client`: a federation over machines."""

import errno
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedalt.cli.flags import Quiet, names_of
from fedalt.cli.output import hush_libraries, note, show_run, tell, warn
from fedalt.core.foreign import shown as one_line
from fedalt.core.reading import PassingError
from fedalt.report.docstrings import docstring

if TYPE_CHECKING:
    from fedalt.flower.config import ServerConfig

app = typer.Typer(
    help="Create and manage a federation over machines.",
    no_args_is_help=True,
    suggest_commands=False,
)
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Do without encryption, for tests on one machine.")
]
Place = Annotated[Path, typer.Argument(metavar="CONFIG", help="The server's federation.toml.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The client's name.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of new clients.")]
Config = Annotated[Path, typer.Option("--config", help="The server's federation.toml.")]


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for all of it.")],
    clients: Annotated[str, typer.Option("--clients", help="Their names, with commas.")],
    settings: Annotated[
        Path | None, typer.Option("--settings", help="Settings as for `fedalt run`, without data.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What the federation is called.")] = "",
    address: Annotated[
        str, typer.Option("--address", help="Where clients call the server, host:port.")
    ] = "127.0.0.1:8443",
    labels: Annotated[
        str, typer.Option("--labels", help="A classifier's labels, with commas.")
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Make a folder for the server and one for each client: keys, certificate, agreed settings."""
    hush_libraries()
    _require_flower()
    from fedalt.federation.agreement import require_apart
    from fedalt.flower.init import create_federation, require_possible
    from fedalt.runs.preflight import require_known
    from fedalt.runs.settings import advised_settings, method_name
    from fedalt.runs.setup import load_parts

    names, classes = names_of(clients), names_of(labels)
    title = name or folder.absolute().name
    require_possible(folder, names, address, name=title, labels=classes)
    chosen, advice = advised_settings(settings, {"data": {"path": "with-the-clients"}})
    require_apart(chosen)
    require_known(chosen, names)
    parts = load_parts(chosen, classes)
    terms = create_federation(folder, names, parts, name=title, address=address, labels=classes)
    if advice:
        note(advice, quiet=quiet)
    note(
        f"{terms.name}: {method_name(chosen.method)} for {len(names)} clients on "
        f"{parts.base.name}; the server's folder is {folder / 'server'}, a client's "
        f"{folder / 'clients'}/NAME, each with a README; keep {folder / 'authority'} offline",
        quiet=quiet,
    )


def status(config: Config = Path("federation.toml")) -> None:
    """Show which clients are online, how far the rounds are, and which uploads were rejected."""
    _require_flower()
    from fedalt.federation.roster import FILE, read_roster
    from fedalt.flower.places import read_participants, read_server_place
    from fedalt.flower.status import shown

    place, _ = read_server_place(config)
    agreed = read_participants(config.parent / "terms.toml")
    tell(shown(place, agreed, read_roster(config.parent / FILE)))


def revoke(
    client: Annotated[str, typer.Argument(metavar="CLIENT")],
    config: Config = Path("federation.toml"),
) -> None:
    """Revoke the key of a client: it can no longer connect. Its uploads stay."""
    _require_flower()
    from fedalt.flower.places import read_server_place
    from fedalt.flower.revocation import revoke_key

    revoke_key(read_server_place(config)[0], client)
    note(f"{client} can no longer connect; a running server drops it within seconds")


def add(config: Place, clients: Names) -> None:
    """Add clients to a federation, also while it runs: they take part from the next round on."""
    server_config = _server_config(config)
    from fedalt.flower.addresses import listens_only
    from fedalt.flower.roster_changes import add_clients

    places, address = add_clients(server_config, clients), server_config.place.address
    if listens_only(address):
        warn(
            [
                f"{place / 'client.toml'}: server = {address!r}, which no client can call; write "
                "the server's address there"
                for place in places
            ]
        )
    for place in places:
        note(f"{place}: send it to {place.name} and to nobody else; its README says the rest")


def remove(config: Place, client: Name) -> None:
    """Remove a client for good, also while the federation runs; its own state stays with it."""
    server_config = _server_config(config)
    from fedalt.flower.roster_changes import remove_client

    stays = remove_client(server_config, client)
    note(f"{client} can no longer connect and has left from the next round on; {stays}")


def rotate(config: Place, client: Name) -> None:
    """Make a new key for a client; the old one no longer counts."""
    server_config = _server_config(config)
    from fedalt.flower.roster_changes import rotate_key

    secret = rotate_key(server_config, client)
    note(f"{secret}: send it to {client}, which is shut out until it lies in its folder")


def backup(config: Place, file: Annotated[Path, typer.Argument(metavar="FILE.tar")]) -> None:
    """Write the folder of a server, which is stopped, into one file. It holds the server's key."""
    server_config = _server_config(config)
    from fedalt.flower.backup import back_up

    rounds = back_up(server_config, file)
    note(f"{file}: the server after {rounds} rounds; keep it secret, its key is in it")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's new folder.")],
) -> None:
    """Make the folder of a server out of a backup, in any place."""
    hush_libraries()
    _require_flower()
    from fedalt.flower.backup import restore as put_back

    rounds = put_back(file, folder)
    config = folder / "federation.toml"
    note(f"{folder}: the server after {rounds} rounds; `fedalt server --config {config}` goes on")
    note("clients that are ahead of it say so; `fedalt client --go-back` follows it, once")


def _server_config(file: Path) -> "ServerConfig":
    hush_libraries()
    _require_flower()
    from fedalt.flower.config import read_server_config

    return read_server_config(file)


for command in (init, status, revoke, add, remove, backup, restore):
    app.command(help=docstring(command))(command)
app.command("rotate-key", help=docstring(rotate))(rotate)


def server(
    config: Config = Path("federation.toml"),
    insecure: Insecure = False,
) -> None:
    """Run the server of a federation; started again, it continues."""
    hush_libraries()
    _require_flower()
    from fedalt.flower.config import read_server_config
    from fedalt.flower.supervisor import supervise

    server_config = read_server_config(config, insecure=insecure)
    _warn_of(insecure=server_config.place.insecure)
    if (count := len(server_config.clients)) < server_config.place.warn_below:
        warn(
            [
                f"{count} clients: from what one of them receives it can work out much about the "
                f"others' adapters (with two, all); warn_below = {server_config.place.warn_below}"
            ]
        )
    _until_stopped(lambda: supervise(server_config, _say))


def client(
    config: Annotated[Path, typer.Option("--config", help="The client's client.toml.")] = Path(
        "client.toml"
    ),
    insecure: Insecure = False,
    go_back: Annotated[
        bool, typer.Option("--go-back", help="Follow a server restored from a backup, once.")
    ] = False,
) -> None:
    """Take part in a federation; started again, it continues."""
    hush_libraries()
    _require_flower()
    from fedalt.flower.client_process import run_client
    from fedalt.flower.config import read_client_config

    client_config = replace(read_client_config(config, insecure=insecure), go_back=go_back)
    _warn_of(insecure=client_config.place.insecure)
    _until_stopped(lambda: run_client(client_config, _say))


def simulate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="As for `fedalt run`.")],
    out: Annotated[Path, typer.Option("--out", help="The run's folder; if it is one, continue.")],
    engine: Annotated[
        str, typer.Option("--engine", help="'in_process', or 'flower' on Ray.")
    ] = "in_process",
    gpus: Annotated[
        float, typer.Option("--gpus", help="With 'flower': share of a GPU per client.")
    ] = 0.0,
    quiet: Quiet = False,
) -> None:
    """Run a federation's clients in simulation, on this machine or on Ray's cluster."""
    hush_libraries()
    from fedalt.runs.settings import SettingsError, advised_settings

    settings, advice = advised_settings(config)
    match engine:
        case "flower":
            _require_flower()
            if find_spec("ray") is None:
                raise ValueError("Ray is not installed: `pip install 'fedalt[ray]'`")
            from fedalt.flower.simulate import simulate as run_on_ray

            if advice:
                note(advice, quiet=quiet)
            _until_stopped(lambda: run_on_ray(settings, out, _say, gpus=gpus))
            show_run(out / "run", quiet=quiet)
        case "in_process":
            from fedalt.cli.training import introduce, train
            from fedalt.runs.kept_settings import require_settings
            from fedalt.runs.lifecycle import new_run, reopen
            from fedalt.runs.setup import prepare

            if begun := (out / "run.json").exists():
                require_settings(out, settings)
            prepared = reopen(out) if begun else prepare(settings)
            introduce(prepared, out, "" if begun else advice, quiet=quiet)
            if not begun:
                new_run(prepared, out)
            train(prepared, out, quiet=quiet)
            show_run(out, quiet=quiet)
        case _:
            raise SettingsError(f"--engine {engine!r}: expected 'flower' or 'in_process'")


def _warn_of(*, insecure: bool) -> None:
    if insecure:
        warn(["--insecure: whoever is on the network can read and change every message"])


def _until_stopped(work: Callable[[], None]) -> None:
    """Ctrl-C and a service manager's TERM both end it in order; what is done stays done.

    Raises PassingError where the disk is full.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        note("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise PassingError(f"{where}{error.strerror}") from error


def _say(text: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S}  {one_line(text)}")


def _require_flower() -> None:
    if find_spec("flwr") is None:
        raise ValueError("Flower is not installed: `pip install 'fedalt[flower]'`")
