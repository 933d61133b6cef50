"""The two apps that Flower starts: the server's half, and a client's half for stock SuperNodes."""

import os
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
    member_of,
    read_client_config,
    read_server_config,
)
from fedalt.flower.grid import GridChannel
from fedalt.flower.last_words import last_words
from fedalt.flower.records import bytes_of, content_of
from fedalt.flower.serve import host_of
from fedalt.runs.folder import locked

MISPLACED = (IsADirectoryError, NotADirectoryError, PermissionError)
server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the federation of `--run-config config=...` from where its folder stands.

    What ends it too early goes into the file that `log=...` names: Flower shows it to nobody.
    """
    about = context.run_config
    log = Path(str(about["log"])) if about.get("log") else None
    with nullcontext() if log is None else last_words(log):
        _serve(grid, read_server_config(Path(str(about["config"]))))


def _serve(grid: Grid, config: ServerConfig) -> None:
    place = config.place
    with locked(place.folder):
        atomic_write(place.pid, str(os.getpid()).encode())
        try:
            most = config.firewall.max_upload_bytes
            channel = GridChannel(grid, ClientKeys(config).now, most)
            host_of(config, channel).to_the_end()
        # Mistakes that do not go away by trying again; a full disk may.
        except (ValueError, *MISPLACED) as error:
            told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            atomic_write(place.failed, str(told).encode())
            raise
        place.ended.touch()


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Answer one call, where a stock SuperNode starts a process for each.

    Its node configuration names the client's file: `--node-config 'config="/client.toml"'`. The
    base model is loaded for each call; `fedalt client` keeps it.
    """
    try:
        config = read_client_config(Path(str(context.node_config["config"])))
        with locked(config.place.folder):
            reply = member_of(config).answer(bytes_of(message.content))
    except Exception:  # Flower sends its text to the server, and it may quote the data
        traceback.print_exc()
        raise RuntimeError(
            "this client cannot answer; what its SuperNode prints says why"
        ) from None
    return Message(content_of(reply), reply_to=message)
