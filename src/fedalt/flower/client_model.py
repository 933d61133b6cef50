"""The model of a federation's client, for its owner: it answers, is exported, and scored again.

All of it is on the client's machine: its own state, and what the server sent last or for the round
that was tested.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedalt.data.folder import open_data
from fedalt.data.prompts import read_template
from fedalt.data.records import Columns
from fedalt.engine.client_work import servings
from fedalt.engine.generators import Given
from fedalt.engine.record_lines import score_line
from fedalt.engine.schedule import Arm, Column, HeldOut, Line
from fedalt.engine.states import client_of
from fedalt.federation.accepted import client_states_of
from fedalt.federation.client_folder import require_model, settings_here
from fedalt.federation.client_states import broadcast_after, round_to_serve
from fedalt.federation.messages import Call
from fedalt.flower.config import ClientConfig, client_from, read_client_config
from fedalt.methods.contract import Message
from fedalt.models.base import Base
from fedalt.runs.answers import Served
from fedalt.runs.answers import served as served_of_run
from fedalt.runs.folder import StoreError, locked, open_run
from fedalt.runs.record import is_client
from fedalt.runs.setup import Parts, Prepared, form_of, load_parts, prepare, trainer_of

FILE = "client.toml"


def client_at(path: Path) -> ClientConfig | None:
    """The federation's client that a path stands for, None where it stands for none.

    That is its client.toml, the folder of that file, or the state that it names. Raises
    SettingsError, and StoreError for a state without its client.toml.
    """
    if path.is_file() and path.suffix == ".toml":
        return read_client_config(path)
    if (path / FILE).is_file():
        return read_client_config(path / FILE)
    if not is_client(path):
        return None
    file = path.absolute().parent / FILE
    if file.is_file():
        config = read_client_config(file)
        if config.place.folder.resolve() == path.resolve():
            return config
    raise StoreError(
        f"{path} is the state of a federation's client whose client.toml lies elsewhere; name that "
        "file instead of the folder"
    )


def served(
    path: Path,
    client_id: str | None,
    column: Column = "own",
    round_: int | None = None,
    base: Base | None = None,
) -> Served:
    """A client's model: of a run, or a federation's client's own; see `answers.served`.

    `client_id` may be left out where there is one client alone.
    """
    if (config := client_at(path)) is not None:
        require_owner(config, client_id)
        return _own(config, column, round_, base)
    return served_of_run(path, client_id or only_client(path), column, round_, base)


def only_client(path: Path) -> str:
    """The client who need not be named, as there is no other. Raises StoreError."""
    clients = clients_of(path)
    if len(clients) > 1:
        raise StoreError(f"{path} has several clients: name one of {', '.join(clients)}")
    return clients[0]


def clients_of(path: Path) -> list[str]:
    """Whose models can be had here: the clients of a run, or a federation's client alone.

    Raises StoreError where all clients have left.
    """
    if (config := client_at(path)) is not None:
        return [config.place.name]
    return list(open_run(path).staying())


def require_owner(config: ClientConfig, client_id: str | None) -> None:
    """Raise StoreError where another client is asked for than the one that lives here."""
    if client_id not in (None, config.place.name):
        raise StoreError(
            f"{config.file} is the place of client {config.place.name!r}; the model of "
            f"{client_id!r} is with its own owner alone"
        )


def evaluate(
    config: ClientConfig, split: HeldOut, round_: int | None = None, base: Base | None = None
) -> list[Line]:
    """Score the client's model again; lines like those of a run's record. Nothing is written.

    `base` is the base model, if it is loaded already. Raises StoreError before the first round is
    over, and while the client takes part.
    """
    place = config.place
    round_to_serve(place.folder, "own", round_)  # before the model is loaded
    with locked(place.folder):
        member = client_from(config, base=base)
        lines: list[Line] = []
        for arm in member.parts.arms:
            at = round_to_serve(place.folder, arm.column, round_)
            call = Call(
                federation=config.terms.name,
                terms=config.terms.digest,
                client=place.name,
                round=at + 1,
                accepted=at,
                train=False,
                message=_message(config, member.parts, arm, at),
                split=split,
            )
            lines += [
                score_line(split, at, place.name, score.column, score.metrics)
                for score in member.score(arm, call, at)
            ]
        lines += [
            score_line(split, score.round, place.name, score.column, score.metrics)
            for score in member.score_base(call)
        ]
    return lines


def load_base_of(config: ClientConfig) -> Base:
    """The base model of a federation's client."""
    place, terms = config.place, config.terms
    settings = settings_here(terms, place.data, place.model, place.device)
    return load_parts(settings, terms.labels).base


def prepare_own(config: ClientConfig, parts: Parts) -> Prepared:
    """The data of a federation's client as it trains on them, with its base model loaded."""
    terms = config.terms
    return prepare(parts.settings, base=parts.base, clients=terms.clients, labels=terms.labels)


def _own(config: ClientConfig, column: Column, round_: int | None, base: Base | None) -> Served:
    """What this client serves after a round, the one that counts if none is named."""
    place, terms = config.place, config.terms
    wanted: Column = "local" if column == "local" else "own"
    at = round_to_serve(place.folder, wanted, round_)
    settings = settings_here(terms, place.data, place.model, place.device)
    data = open_data(place.data, Columns.of(settings.data), labels=terms.labels)
    if place.name not in data.clients:
        raise StoreError(f"{place.data} has no data of {place.name!r}, whose form prompts take")
    parts = load_parts(settings, terms.labels, base)
    require_model(parts, terms)
    arms = {arm.column: arm for arm in parts.arms}
    if wanted not in arms:
        raise StoreError(
            f"{place.folder} has no column 'local': no local-only baseline was trained"
        )
    arm = arms[wanted]

    def execute(orders: Sequence[Given]) -> Sequence[Any]:
        """As when it was scored. Most methods order nothing: data are encoded when one does."""
        return trainer_of(prepare_own(config, parts)).before_serving(at)(orders)

    with locked(place.folder):
        states = client_states_of(place.folder, wanted, at + 1)
        client = client_of(arm.method, parts.init, states, place.name)
        message = _message(config, parts, arm, at)
        serving, shared = servings(arm.method, client, message, place.name, execute)
        if column == "shared":
            if shared is None:
                raise StoreError(f"{place.folder} has no column 'shared': its method shares none")
            serving = shared
    template = read_template(settings.data.template)
    return Served(parts, serving, form_of(data.records(place.name, "train")[0]), template)


def _message(config: ClientConfig, parts: Parts, arm: Arm, round_: int) -> Message:
    """What the server sent; for the local-only baseline, what one without clients would send."""
    if arm.column == "own":
        return broadcast_after(config.place.folder, round_)
    return arm.method.broadcast(arm.method.init_server(parts.init), config.place.name)
