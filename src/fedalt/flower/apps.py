"""The two apps that Flower starts: the server's half, and a client's half for stock SuperNodes."""

import traceback
from contextlib import nullcontext
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedalt.core.files import atomic_write
from fedalt.flower.client_keys import ClientKeys
from fedalt.flower.config import (
    ServerConfig,
    client_from,
    read_client_config,
    read_server_config,
    server_from,
)
from fedalt.flower.crash_log import recording_crashes
from fedalt.flower.grid_transport import GridTransport
from fedalt.flower.message_content import bytes_of, content_of
from fedalt.flower.processes import write_pid
from fedalt.runs.folder import locked

MISPLACED = (IsADirectoryError, NotADirectoryError, PermissionError)
server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the federation of `--run-config config=...` from where its folder stands.

    What ends it too early goes into the file that `log=...` names: Flower shows it to nobody.
    """
    words = context.run_config
    log = Path(str(words["log"])) if words.get("log") else None
    with nullcontext() if log is None else recording_crashes(log):
        _serve(grid, read_server_config(Path(str(words["config"]))))


def _serve(grid: Grid, config: ServerConfig) -> None:
    place = config.place
    with locked(place.folder):
        write_pid(place.pid)
        with locked(place.run):  # `fedalt leave` locks it too, and is soon over
            _to_the_end(grid, config)
        place.ended.touch()


def _to_the_end(grid: Grid, config: ServerConfig) -> None:
    place, largest = config.place, config.firewall.max_upload_bytes
    try:
        transport = GridTransport(grid, ClientKeys(config).now, largest)
        server_from(config, transport).to_the_end()
    # Mistakes that do not go away by trying again; a full disk may.
    except (ValueError, *MISPLACED) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        atomic_write(place.failed, str(why).encode())
        raise


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Answer one call, where a stock SuperNode starts a process for each.

    Its node configuration names the client's file: `--node-config 'config="/client.toml"'`. The
    base model is loaded for each call; `fedalt client` keeps it.
    """
    try:
        config = read_client_config(Path(str(context.node_config["config"])))
        with locked(config.place.folder):
            reply = client_from(config).answer(bytes_of(message.content))
    except Exception:  # Flower sends its text to the server, and it may quote the data
        traceback.print_exc()
        raise RuntimeError(
            "this client cannot answer; what its SuperNode prints says why"
        ) from None
    return Message(content_of(reply), reply_to=message)
