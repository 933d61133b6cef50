"""What a run's settings ask of its base model, and what not every one can do."""

from typing import Final

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import Shape, Similarity
from fedalt.engine.dry_run import play
from fedalt.methods.contract import AnyMethod
from fedalt.models.base import Base
from fedalt.runs.settings import Settings, SettingsError, lora_of, method_name
from fedalt.training.checkpointing import can_checkpoint

_PLAYED: Final = 3  # rounds; what a client serves later is of the same kind


def require_weighable(settings: Settings, base: Base) -> None:
    """Raise SettingsError for a method that weighs adapters text by text, where no layer may.

    Layers that do not see all texts in their order cannot tell which weights are whose.
    """
    partial = base.adapted.partial
    if partial and _weighs_texts(settings.method, settings.rounds.rounds):
        raise SettingsError(
            f"--method {method_name(settings.method)} weighs adapters anew for each text, but "
            f"{min(partial)!r} of the model {base.name!r} does not see all texts in their order; "
            "expected another method, or [model] targets without such layers"
        )


def require_checkpointable(settings: Settings, base: Base) -> None:
    """Raise SettingsError where the base model's blocks cannot be run again."""
    if settings.training.gradient_checkpointing and not can_checkpoint(base.adapted.model):
        raise SettingsError(
            f"[training] gradient_checkpointing=True, but the model {base.name!r} "
            f"({base.adapted.model.config.model_type}) cannot do it; expected False"
        )


def warnings_of_ranks(settings: Settings, base: Base) -> list[str]:
    """A sentence where an adapter's rank is above that of every layer's own weights.

    More than that reaches no further, and a mistyped rank can fill the memory.
    """
    whole = max(min(shape) for shape in base.adapted.sites.values())
    ranks = [lora_of(settings.method).rank, *getattr(settings.method, "ranks", {}).values()]
    if (most := max(ranks)) <= whole:
        return []
    return [
        f"rank={most}, but the weights of the largest adapted layer have rank {whole}: more than "
        "that costs memory and reaches no further"
    ]


def _weighs_texts(method: AnyMethod, rounds: int) -> bool:
    """Whether clients come to serve with weights of each text: played, as nothing else tells."""
    toy = Initializer({"site": Shape(4, 3)}, {}, seed=0, clients=1)
    server, client = method.init_server(toy), method.init_client(toy, "a")
    for _ in range(min(rounds, _PLAYED)):
        sent = method.broadcast(server, "a")
        client, upload = play(method.local(client, sent), toy, examples=1)
        server = method.aggregate(server, [("a", upload)])
        sent = method.broadcast(server, "a")
        serving = play(method.deploy(client, sent), toy, examples=1)
        if isinstance(serving.plan.combine, Similarity):
            return True
    return False
