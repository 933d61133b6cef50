"""What is found before a run begins: mistakes in its settings, and what a user should know."""

from collections.abc import Iterator, Mapping, Sequence

from fedalt.core.foreign import listed
from fedalt.data.examples import Split
from fedalt.engine.members import Members
from fedalt.runs.settings import Settings, SettingsError, settings_of_method


def require_known(settings: Settings, clients: Sequence[str]) -> None:
    """Whoever settings name is a client, and each round has one; SettingsError otherwise."""
    for key in settings_of_method(settings.method):
        value = getattr(settings.method, key)
        if isinstance(value, Mapping) and (unknown := value.keys() - set(clients)):
            raise SettingsError(
                f"[method.{key}] names {min(unknown)!r}, but the clients are {listed(clients)}"
            )
    if unknown := settings.clients.keys() - set(clients):
        raise SettingsError(
            f"[clients.{min(unknown)}]: there is no such client, but {listed(clients)}"
        )
    members = Members(clients, settings.clients)
    for round_ in range(settings.rounds.rounds if settings.clients else 0):
        if not members.at(round_):
            raise SettingsError(
                f"[clients]: nobody takes part in round {round_ + 1}; by `joins` and `leaves` "
                "expected at least one client in each round"
            )


def require_room(settings: Settings, *, gpus: int) -> None:
    """Raise SettingsError where the device and the base model do not do for several processes."""
    processes, model = settings.training.processes, settings.model
    device = model.device or ("cuda" if gpus else "cpu")
    wanted = f"[training] processes={processes}"
    if processes == 1:
        return
    if model.quantise:
        raise SettingsError(f"{wanted}, but a quantised base model is for one process")
    if device not in ("cpu", "cuda"):
        raise SettingsError(
            f"{wanted} is for device='cpu' and for device='cuda', whose GPUs they take in turn, "
            f"not for device={device!r}"
        )
    if device == "cuda" and processes > gpus:
        raise SettingsError(f"{wanted}, one for each GPU, but the number of GPUs is {gpus}")


def warnings_of_run(
    settings: Settings, counts: Mapping[str, Mapping[Split, int]], *, shares: bool
) -> list[str]:
    """What a user should know of all who take part in a run before its first step, in sentences.

    `counts` are examples per client and split; `shares`: whether clients receive anything from
    others.
    """
    sentences = []
    if shares and len(counts) == 1:
        sentences.append("only one client: federation has no effect; use --method local")
    if shares and len(counts) == 2:
        sentences.append(
            "there are two clients: what one receives lets it work out the other's adapter exactly"
        )
    validated = any(of["validation"] for of in counts.values())
    if settings.rounds.select == "best" and not validated:
        sentences.append("no client has validation data: the last round is tested, not the best")
    return [*sentences, *_of_privacy(settings, counts)]


def warnings_of_data(
    settings: Settings,
    counts: Mapping[str, Mapping[Split, int]],
    cut: Sequence[int],
    limit: int,
) -> list[str]:
    """What a user should know of some clients' data, in sentences.

    `cut` are truncated prompts and answers, `limit` is the most tokens of an example.
    """
    sentences = []
    if untested := [client for client, of in counts.items() if not of["test"]]:
        sentences.append(f"trained but not scored, without test data: {listed(untested)}")
    total = sum(sum(of.values()) for of in counts.values())
    if limit < (wanted := settings.data.max_length):
        sentences.append(f"the base model takes {limit} tokens at most, not max_length={wanted}")
    prompts, answers = cut
    if prompts:
        sentences.append(f"{prompts} of {total} prompts lose their middle at max_length={limit}")
    if answers:
        sentences.append(f"{answers} of {total} answers lose their end at max_length={limit}")
    return sentences


def _of_privacy(settings: Settings, counts: Mapping[str, Mapping[Split, int]]) -> Iterator[str]:
    """What a user should know of a private run's promise."""
    privacy = settings.privacy
    if privacy.unit is None:
        return
    if privacy.seed is not None:
        yield (
            f"[privacy] seed = {privacy.seed}: whoever knows it can take the noise out again: "
            "this run is NOT private; leave the seed out for noise that nobody can foresee"
        )
    if privacy.noise == 0:
        yield "[privacy] noise = 0: nothing is hidden, and epsilon is infinite"
    many = len(counts) if privacy.unit == "client" else max(of["train"] for of in counts.values())
    if privacy.delta > 1 / many:
        yield (
            f"[privacy] delta = {privacy.delta:g} is more than 1 in {many} {privacy.unit}s: one of "
            "them could be shown openly within that promise"
        )
